"""Pools: blocks, what may follow what, paths as actions."""

import numpy as np
import pytest

from hf_merge.errors import MergeError, RecipeError
from hf_merge.recipes.path import Step
from hf_merge.search.layers.pool import Block, Pool

NARROW_WIDE = Pool(
    blocks=(
        Block("a", 0, 4, 4),
        Block("a", 1, 4, 4),
        Block("b", 0, 4, 8),
        Block("b", 1, 8, 8),
        Block("b", 2, 8, 4),
    )
)


def test_a_path_goes_to_actions_and_back():
    path = (Step("a", 2), Step("b", 0))
    pool = Pool.of({"a": 3, "b": 2})
    assert pool.decode(pool.encode(path)) == path


def test_scales_go_along():
    assert Pool.of({"a": 2}).decode([1], [0.5]) == (Step("a", 1, 0.5),)


def test_models_of_other_depths_have_their_own_identity_paths():
    pool = Pool.of({"a": 3, "b": 2})
    assert pool.identities(8) == (tuple(Step("a", i) for i in range(3)), tuple(Step("b", i) for i in range(2)))


def test_a_model_that_is_too_deep_has_no_identity_path():
    assert Pool.of({"a": 3, "b": 2}).identities(2) == ((Step("b", 0), Step("b", 1)),)


def test_a_path_cannot_stop_before_its_first_block():
    pool = Pool.of({"a": 2})
    assert pool.mask((), 4).tolist() == [True, True, False]


def test_after_the_last_allowed_block_there_is_only_the_stop():
    pool = Pool.of({"a": 2})
    assert pool.mask((0, 0, 0, 0), 4).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("taken", "longest", "allowed"),
    [
        ((), 9, [0, 1, 2]),
        ((0,), 9, [0, 1, 2, 5]),
        ((2,), 9, [3, 4]),
        ((2, 3), 9, [3, 4]),
        ((2, 3, 4), 9, [0, 1, 2, 5]),
        ((2,), 2, [4]),  # no time for block 3: the way back to width 4 takes the last block
        ((0,), 2, [0, 1, 5]),  # block 2 would need block 4 after it
    ],
)
def test_widths_fit_and_a_path_can_always_end_in_time(taken, longest, allowed):
    assert np.flatnonzero(NARROW_WIDE.mask(taken, longest)).tolist() == allowed


def test_a_path_takes_one_of_the_alternatives():
    pool = Pool.of({"a": 2, "merged": 2, "merged 2": 2}, alternatives=("merged", "merged 2"))
    assert np.flatnonzero(pool.mask((0,), 9)).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(pool.mask((0, 2), 9)).tolist() == [0, 1, 2, 3, 6]
    assert np.flatnonzero(pool.mask((5, 1), 9)).tolist() == [0, 1, 4, 5, 6]
    assert pool.allowed((Step("merged 2", 0), Step("a", 1), Step("merged 2", 1)), 9)
    assert not pool.allowed((Step("merged 2", 0), Step("a", 1), Step("merged", 1)), 9)
    assert len(pool.identities(9)) == 3


def test_an_allowed_path_ends_at_the_width_of_the_head():
    assert not NARROW_WIDE.allowed((Step("b", 0), Step("b", 1)), 9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pool(blocks=()),
        lambda: Pool(blocks=(Block("a", 0), Block("a", 0))),
        lambda: Pool.of({"a": 2}, statistics=np.zeros((3, 1))),
        lambda: Pool.of({"a": 2}, statistics=np.full((2, 1), np.nan)),
        lambda: Pool.of({"a": 2}).identity("b"),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(RecipeError):
        make()


def test_an_unknown_block_is_named():
    with pytest.raises(MergeError, match=r"no block a\[7\]"):
        Pool.of({"a": 2}).encode((Step("a", 7),))
