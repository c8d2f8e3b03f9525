"""Dominance, hypervolume and choice, against brute force, Optuna and their laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from hf_merge import pareto

law = settings(derandomize=True, deadline=None)


def grids(m: int | None = None) -> st.SearchStrategy[np.ndarray]:
    """Points on a coarse grid: ties, copies and points beyond the reference are common there."""
    shape = st.tuples(st.integers(1, 8), st.just(m) if m else st.integers(1, 4))
    return shape.flatmap(lambda s: arrays(np.float64, s, elements=st.integers(-1, 4).map(float)))


def cells(points: np.ndarray) -> float:
    """Hypervolume above 0 of points on the integer grid: the unit cells below some point, counted."""
    corners = np.array(list(itertools.product(range(4), repeat=points.shape[1])))
    return float((points[None] >= corners[:, None] + 1).all(-1).any(1).sum())


@law
@given(grids(2), st.integers(0, 7), st.integers(0, 7))
def test_dominating_is_being_no_worse_anywhere_and_better_somewhere(points: np.ndarray, i: int, j: int) -> None:
    a, b = points[i % len(points)], points[j % len(points)]
    assert pareto.dominates(a, b) == (all(x >= y for x, y in zip(a, b, strict=True)) and list(a) != list(b))


@law
@given(grids())
def test_the_front_is_what_no_other_point_dominates(points: np.ndarray) -> None:
    expected = [not any(pareto.dominates(q, p) for q in points) for p in points]
    assert pareto.non_dominated(points).tolist() == expected


def test_equal_points_all_stay_on_the_front() -> None:
    assert pareto.non_dominated([[1, 2], [1, 2], [0, 2]]).tolist() == [True, True, False]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_no_points_have_no_front_and_no_volume(m: int) -> None:
    assert pareto.non_dominated(np.empty((0, m))).shape == (0,)
    assert pareto.hypervolume(np.empty((0, m)), np.zeros(m)) == 0.0


@law
@given(grids())
def test_the_hypervolume_counts_the_cells_below_the_points(points: np.ndarray) -> None:
    assert pareto.hypervolume(points, np.zeros(points.shape[1])) == pytest.approx(cells(points))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_hypervolume_agrees_with_optuna(m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, reference = rng.normal(size=(25, m)), rng.normal(-1.0, 0.3, size=m)
    above = points[(points > reference).all(1)]
    assert len(above) > 0
    assert pareto.hypervolume(points, reference) == pytest.approx(compute_hypervolume(-above, -reference))


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_hypervolume_agrees_with_monte_carlo(m: int) -> None:
    rng = np.random.default_rng(m)
    points = rng.random((12, m))
    darts = rng.random((100_000, m))
    share = (darts[:, None] < points[None]).all(-1).any(1).mean()
    assert pareto.hypervolume(points, np.zeros(m)) == pytest.approx(share, abs=0.006)


@law
@given(grids(3), grids(3))
def test_more_points_never_have_less_hypervolume(points: np.ndarray, more: np.ndarray) -> None:
    zero = np.zeros(3)
    assert pareto.hypervolume(np.vstack([points, more]), zero) >= pareto.hypervolume(points, zero) - 1e-9


@law
@given(grids())
def test_dominated_points_do_not_change_the_hypervolume(points: np.ndarray) -> None:
    zero = np.zeros(points.shape[1])
    front = points[pareto.non_dominated(points)]
    assert pareto.hypervolume(front, zero) == pytest.approx(pareto.hypervolume(points, zero))


@law
@given(grids(), st.randoms(use_true_random=False))
def test_the_hypervolume_knows_no_order_of_points_or_objectives(points: np.ndarray, random: object) -> None:
    rows, columns = list(range(len(points))), list(range(points.shape[1]))
    random.shuffle(rows)  # type: ignore[attr-defined]
    random.shuffle(columns)  # type: ignore[attr-defined]
    zero = np.zeros(points.shape[1])
    assert pareto.hypervolume(points[rows][:, columns], zero) == pytest.approx(pareto.hypervolume(points, zero))


@law
@given(grids(), st.floats(0.1, 10))
def test_the_hypervolume_is_measured_in_the_objectives_units(points: np.ndarray, unit: float) -> None:
    m = points.shape[1]
    shift = np.arange(m, dtype=float)
    assert pareto.hypervolume(points * unit + shift, shift) == pytest.approx(pareto.hypervolume(points, np.zeros(m)) * unit**m)


@law
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.floats(0, 1)))
def test_the_hypervolume_never_exceeds_the_box_of_the_best(points: np.ndarray) -> None:
    assert pareto.hypervolume(points, np.zeros(points.shape[1])) <= points.max(0).prod() + 1e-12


@pytest.mark.parametrize("point", [[0.0, 5.0], [-1.0, 5.0]])
def test_a_point_that_is_not_above_the_reference_adds_nothing(point: list[float]) -> None:
    assert pareto.hypervolume([point, [1.0, 1.0]], [0.0, 0.0]) == 1.0


@pytest.mark.parametrize("points", [[1.0, 2.0], [[[1.0]]], []])
def test_points_that_are_no_table_are_refused(points: list[object]) -> None:
    with pytest.raises(ValueError, match=r"shape \(n, m\)"):
        pareto.hypervolume(points, [0.0])


@law
@given(grids())
def test_a_contribution_is_what_is_lost_without_the_point(points: np.ndarray) -> None:
    zero = np.zeros(points.shape[1])
    expected = [cells(points) - cells(np.delete(points, i, axis=0)) for i in range(len(points))]
    assert pareto.contributions(points, zero) == pytest.approx(np.array(expected))


@law
@given(grids())
def test_contributions_add_up_to_no_more_than_the_whole(points: np.ndarray) -> None:
    zero = np.zeros(points.shape[1])
    lost = pareto.contributions(points, zero)
    assert (lost >= -1e-9).all()
    assert lost.sum() <= pareto.hypervolume(points, zero) + 1e-9


def test_normalized_points_span_0_to_1_and_a_constant_objective_is_1() -> None:
    assert pareto.normalized([[1, 5], [3, 5], [2, 5]]).tolist() == [[0, 1], [1, 1], [0.5, 1]]


@law
@given(
    arrays(np.float64, st.tuples(st.integers(1, 8), st.just(3)), elements=st.floats(0, 1)),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
def test_the_preferred_point_is_never_dominated(points: np.ndarray, preference: list[float]) -> None:
    chosen = points[pareto.preferred(points, preference)]
    # Gains below the precision of the distances cannot be told apart.
    assert not any((q >= chosen).all() and (q > chosen + 1e-6).any() for q in points)


@pytest.mark.parametrize("objective", [0, 1, 2])
def test_caring_for_one_objective_alone_prefers_the_best_in_it(objective: int) -> None:
    points = np.random.default_rng(1).random((20, 3))
    assert pareto.preferred(points, np.eye(3)[objective]) == points[:, objective].argmax()


def test_a_preference_is_about_the_ratio_of_its_weights() -> None:
    points = np.random.default_rng(2).random((20, 3))
    assert pareto.preferred(points, [2, 4, 6]) == pareto.preferred(points, [1, 2, 3])


def test_the_preferred_point_does_not_depend_on_the_objectives_units() -> None:
    points = np.random.default_rng(3).random((20, 2))
    assert pareto.preferred(points * [1000, 1] + [5, -7], [1, 2]) == pareto.preferred(points, [1, 2])


def test_an_improved_point_stays_preferred() -> None:
    points = np.array([[1.0, 0.0], [0.7, 0.7], [0.0, 1.0]])
    assert pareto.preferred(points, [1, 1]) == 1
    points[1, 0] = 5.0
    assert pareto.preferred(points, [1, 1]) == 1


def test_the_knee_is_where_giving_up_little_of_one_gains_much_of_the_other() -> None:
    assert pareto.knee([[1.0, 0.0], [0.95, 0.5], [0.9, 0.9], [0.5, 0.95], [0.0, 1.0]]) == 2
