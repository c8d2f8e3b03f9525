"""Normalization, scalarization, preferences."""

import numpy as np
import pytest

from hf_merge.errors import RecipeError
from hf_merge.search.layers.rewards import checked, drawn, lattice, normalizer, scalarize, spread


def test_the_base_is_0_and_the_best_model_is_1():
    scaled = normalizer([0.2, 10.0], [[0.4, 30.0], [0.3, 50.0]])
    assert np.allclose([scaled([0.2, 10.0]), scaled([0.4, 50.0])], [[0, 0], [1, 1]])


def test_better_than_the_best_model_is_more_than_1():
    assert normalizer([0.0], [[0.5]])([0.75])[0] == pytest.approx(1.5)


def test_far_below_the_base_counts_as_the_floor():
    assert normalizer([0.5], [[0.6]])([0.0])[0] == -1.0


def test_a_base_that_no_model_beats_is_no_division_by_zero():
    assert np.allclose(normalizer([0.5, 0.9], [[0.5, 0.4], [0.5, 0.6]])([0.5, 0.6]), [0.0, 1.0])


def test_a_failed_value_counts_as_the_floor():
    assert normalizer([0.0], [[1.0]])([np.nan])[0] == -1.0


def test_linear_is_the_weighted_sum():
    assert scalarize([0.5, 1.0], [0.25, 0.75]) == pytest.approx(0.875)


@pytest.mark.parametrize("how", ["linear", "tchebycheff"])
@pytest.mark.parametrize("at", [0.3, 1.0, 1.4])
def test_more_of_an_objective_is_never_worse_also_beyond_the_ideal(how, at):
    before, after = scalarize([at, 0.5], [0.5, 0.5], how), scalarize([at + 0.2, 0.5], [0.5, 0.5], how)
    assert after > before


def test_tchebycheff_looks_at_the_worst_objective():
    assert scalarize([0.5, 0.5], [0.5, 0.5], "tchebycheff") > scalarize([1.0, 0.1], [0.5, 0.5], "tchebycheff")


def test_preferences_begin_with_the_vertices_and_the_centroid():
    rows = drawn(3, 6, np.random.default_rng(0))
    assert np.allclose(rows[:4], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3] * 3])
    assert rows.shape == (6, 3)
    assert np.allclose(rows.sum(1), 1)


def test_the_lattice_has_every_multiple_once():
    rows = lattice(3, 4)
    assert len(rows) == len({tuple(row) for row in rows.tolist()}) == 15
    assert np.allclose(rows.sum(1), 1)
    assert np.allclose(rows * 4, np.round(rows * 4))


def test_a_preference_is_made_to_add_up_to_1():
    assert np.allclose(checked([2, 6]), [[0.25, 0.75]])


@pytest.mark.parametrize("given", [[0, 0], [1, -1], [np.nan, 1]])
def test_a_preference_that_is_none_is_refused(given):
    with pytest.raises(RecipeError):
        checked(given)


def test_a_spread_reward_is_the_same_altogether():
    assert sum(spread(0.6, 4)) == pytest.approx(0.6)
