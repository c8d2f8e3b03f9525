"""The ledger scores each path once and counts."""

import numpy as np
import pytest

from hf_merge.errors import RecipeError
from hf_merge.search.layers.ledger import BudgetSpentError, Ledger


def test_a_path_is_scored_once(toy):
    ledger = Ledger(toy)
    path = toy.pool.identity("a")
    ledger(path)
    ledger(path)
    assert (len(toy.asked), ledger.evaluations) == (1, 1)


def test_another_scale_is_another_path(toy):
    ledger = Ledger(toy)
    ledger(toy.pool.decode([0], [1.0]))
    ledger(toy.pool.decode([0], [0.5]))
    assert ledger.evaluations == 2


def test_the_evaluation_after_the_limit_is_refused(toy):
    ledger = Ledger(toy, limit=1)
    ledger(toy.pool.decode([0]))
    with pytest.raises(BudgetSpentError):
        ledger(toy.pool.decode([1]))
    assert ledger.evaluations == 1


def test_known_paths_cost_nothing(toy):
    path = toy.pool.identity("a")
    ledger = Ledger(toy, limit=0, known={path: np.array([0.5, 0.5])})
    assert ledger(path).tolist() == [0.5, 0.5]
    assert ledger.evaluations == 0


def test_each_block_costs(toy):
    path = toy.pool.identity("a")
    assert Ledger(toy).reward(path, [1, 0]) - Ledger(toy, length_cost=0.1).reward(path, [1, 0]) == pytest.approx(0.3)


def test_the_best_path_is_the_one_for_the_preference(toy):
    ledger = Ledger(toy)
    for model in ("a", "b"):
        ledger(toy.pool.identity(model))
    assert ledger.best([0.1, 0.9]) == toy.pool.identity("b")


def test_a_failed_evaluation_is_kept_and_is_never_the_best(toy):
    good, bad = toy.pool.decode([0]), toy.pool.decode([1])
    ledger = Ledger(lambda path: [0.1, 0.1] if path == good else [np.nan, np.inf])
    ledger(bad)
    ledger(good)
    assert ledger.best([1, 1]) == good
    assert ledger.values[bad].tolist() == [-1, -1]


def test_a_score_that_changes_its_shape_is_refused(toy):
    ledger = Ledger(lambda path: [1.0] * len(path))
    ledger(toy.pool.decode([0]))
    with pytest.raises(RecipeError, match="one value for each objective"):
        ledger(toy.pool.decode([0, 1]))


def test_nothing_scored_has_no_best_path(toy):
    with pytest.raises(RecipeError, match="No path was scored"):
        Ledger(toy).best([1, 0])


def test_every_new_path_is_told(toy):
    told = []
    ledger = Ledger(toy, on_path=lambda path, values: told.append((path, values.tolist())))
    path = toy.pool.identity("a")
    ledger(path)
    ledger(path)
    assert told == [(path, ledger.values[path].tolist())]
