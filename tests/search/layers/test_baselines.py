"""The plain searches: they keep the rules and count as HM3's search does."""

import numpy as np
import pytest

from hf_merge.errors import RecipeError
from hf_merge.search.layers.baselines import BASELINES, baseline
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.pool import Block, Pool

WIDTHS = Pool(blocks=(Block("a", 0, 4, 4), Block("a", 1, 4, 4), Block("b", 0, 4, 8), Block("b", 1, 8, 8), Block("b", 2, 8, 4)))


def run(name, toy, limit=60, seed=0, **options):
    toy.asked.clear()
    ledger = Ledger(toy, limit=limit, length_cost=0.2)
    return baseline(name, ledger, toy.pool, np.eye(2), longest=5, seed=seed, **options)


@pytest.mark.parametrize("name", BASELINES)
def test_the_models_as_they_are_come_first(toy, name):
    run(name, toy)
    assert toy.asked[:2] == [toy.pool.identity("a"), toy.pool.identity("b")]


@pytest.mark.parametrize("name", BASELINES)
def test_distinct_paths_are_counted_up_to_the_limit(toy, name):
    ledger = run(name, toy, limit=12)
    assert len(set(toy.asked)) == len(toy.asked) == ledger.evaluations == 12


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_asks_for_the_same_paths(toy, name):
    first = list(run(name, toy).values)
    assert list(run(name, toy).values) == first


@pytest.mark.parametrize("name", BASELINES)
def test_paths_keep_to_their_widths_and_length(name):
    ledger = Ledger(lambda path: [len(path), -len(path)], limit=40)
    baseline(name, ledger, WIDTHS, np.eye(2), longest=5, seed=0)
    assert ledger.evaluations > 3
    assert all(WIDTHS.allowed(path, 5) for path in ledger.values)


@pytest.mark.parametrize("name", ["de", "beam"])
def test_it_finds_something_better_than_where_it_began(name):
    pool, wanted = Pool.of({"a": 3, "b": 3}), (3, 1, 2)

    def score(path):
        return [-sum(a != b for a, b in zip(pool.encode(path), wanted, strict=False)) - abs(len(path) - 3)]

    ledger = Ledger(score, limit=400)
    baseline(name, ledger, pool, [[1.0]], longest=4, seed=0)
    assert pool.encode(ledger.best([1.0])) == wanted


def test_only_the_scaled_search_has_scales(toy):
    scales = {name: {step.scale for path in run(name, toy).values for step in path} for name in BASELINES}
    assert [name for name, found in scales.items() if found != {1.0}] == ["cmaes-scales"]


def test_the_grid_ends_when_all_is_tried(toy):
    ledger = run("grid", toy, limit=10_000)
    assert 10 < ledger.evaluations < 40


def test_a_baseline_needs_a_limit(toy):
    with pytest.raises(RecipeError, match="limit"):
        baseline("random", Ledger(toy), toy.pool, np.eye(2), longest=5, seed=0)


def test_an_unknown_baseline_is_refused(toy):
    with pytest.raises(RecipeError, match="Did you mean 'beam'"):
        run("beem", toy)
