"""Paths that differ in one block from a good one."""

import numpy as np
import pytest

from hf_merge.search.layers.edits import edited
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.pool import Block, Pool

POOL = Pool.of({"a": 3, "b": 3})


def distance(one, other):
    """Blocks to exchange, put in or take out (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        row, before = [i], row
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def edits(ledger, count=200, pool=POOL, longest=4, scales=False):
    rng = np.random.default_rng(0)
    found = [edited(pool, ledger, [1.0], longest=longest, scales=scales, rng=rng) for _ in range(count)]
    return [path for path in found if path is not None]


@pytest.fixture
def ledger():
    """The only path known is a[0] a[1] a[2]."""
    one = Ledger(lambda path: [0.0])
    one(POOL.identity("a"))
    return one


def test_an_edit_is_one_block_away(ledger):
    assert {distance(path, POOL.identity("a")) for path in edits(ledger)} == {1}


def test_blocks_are_exchanged_put_in_and_taken_out(ledger):
    assert {len(path) for path in edits(ledger)} == {2, 3, 4}


def test_an_edit_is_never_a_path_that_was_scored(ledger):
    for path in edits(ledger):
        ledger(path)
    assert not set(edits(ledger)) & {POOL.identity("a")}
    assert len(set(edits(ledger, 5))) > 0


def test_better_paths_are_edited_more_often():
    ledger = Ledger(lambda path: [1.0 if path[0].model == "b" else 0.0])
    for model in ("a", "b"):
        ledger(POOL.identity(model))
    near = [distance(path, POOL.identity("b")) == 1 for path in edits(ledger)]
    assert 0.3 < np.mean(near) < 0.7  # the better of two: half of all, the other one the rest


def test_widths_fit_after_an_edit():
    pool = Pool(blocks=(Block("a", 0, 4, 4), Block("a", 1, 4, 4), Block("b", 0, 4, 8), Block("b", 1, 8, 4)))
    ledger = Ledger(lambda path: [0.0])
    ledger(pool.identity("a"))
    assert all(pool.allowed(path, 4) for path in edits(ledger, pool=pool))


def test_a_neighborhood_that_is_all_scored_has_no_edit():
    pool = Pool.of({"a": 1})
    ledger = Ledger(lambda path: [0.0])
    ledger(pool.identity("a"))
    assert edits(ledger, 5, pool=pool, longest=1) == []


def test_nothing_scored_has_no_edit():
    assert edits(Ledger(lambda path: [0.0]), 3) == []


@pytest.mark.parametrize("scales", [False, True])
def test_a_scale_changes_only_if_scales_are_searched(ledger, scales):
    assert any(step.scale != 1 for path in edits(ledger, scales=scales) for step in path) == scales
