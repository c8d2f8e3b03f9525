from dataclasses import replace

import numpy as np
import pytest

from hf_merge.model_ref import ModelRef
from hf_merge.publishing.position import Gap, Volume, gap, hypervolume_gain, position, ranks, volume
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

NAMES = ("a", "b")
BOTH = dict.fromkeys(NAMES, "maximize")
ORIGIN = dict.fromkeys(NAMES, 0.0)


def make(number: int, held_out: tuple[float, ...], search: tuple[float, ...] | None = None, spread: float = 0.0) -> Trial:
    shift = np.linspace(-spread, spread, 101)
    scores = {n: Score(value=v, examples=9) for n, v in zip(NAMES, search or held_out, strict=True)}
    sure = {n: Score(value=v, examples=9, replicates=v + shift) for n, v in zip(NAMES, held_out, strict=True)}
    models = (RecipeModel(ref=ModelRef("x/y"), parameters={"weight": 1 + number}), RecipeModel(ref=ModelRef("x/z")))
    return Trial(number=number, recipe=Recipe(method="linear", models=models), scores=scores, held_out=sure)


def of(*trials: Trial) -> Front:
    return Front(trials=trials, directions=BOTH, reference=ORIGIN)


def test_a_gap_is_paired() -> None:
    found = gap(make(0, (0.8, 0.5), spread=0.1), make(1, (0.7, 0.5), spread=0.1), "a", "maximize")
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))
    assert found.clear


def test_a_gap_is_positive_where_less_is_better_and_there_is_less() -> None:
    assert gap(make(0, (0.2, 0.5)), make(1, (0.7, 0.5)), "a", "minimize").value == pytest.approx(0.5)


def test_a_gap_of_unequal_replicates_has_no_interval() -> None:
    other = make(1, (0.7, 0.5))
    short = replace(other, held_out={n: replace(s, replicates=np.zeros(3)) for n, s in other.held_out.items()})
    found = gap(make(0, (0.8, 0.5)), short, "a", "maximize")
    assert found.interval is None
    assert not found.clear


@pytest.mark.parametrize(
    ("low", "high", "clear"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (0.0, 0.0, False)]
)
def test_a_gap_is_clear_if_its_interval_leaves_out_zero(low: float, high: float, clear: bool) -> None:
    assert Gap(value=0.0, low=low, high=high).clear is clear


def test_a_reversed_gap_is_seen_from_the_other_side() -> None:
    assert Gap(value=0.1, low=-0.1, high=0.3).reversed() == Gap(value=-0.1, low=-0.3, high=0.1)


def test_a_volume_has_a_replicate_for_each_resample() -> None:
    found = volume([make(0, (0.8, 0.5), spread=0.1)], BOTH, ORIGIN)
    assert found.value == pytest.approx(0.4)
    assert found.replicates is not None
    assert found.replicates[0] == pytest.approx(0.7 * 0.4)
    assert found.replicates[-1] == pytest.approx(0.9 * 0.6)


def test_a_volume_without_replicates_has_no_interval() -> None:
    bare = make(0, (0.8, 0.5))
    assert volume([bare], BOTH, ORIGIN, "search").interval is None


def test_the_gain_of_a_front_is_its_extra_volume() -> None:
    found = hypervolume_gain([make(0, (0.8, 0.5)), make(1, (0.5, 0.8))], [make(2, (0.5, 0.5))], BOTH, ORIGIN)
    assert found.value == pytest.approx(0.3)
    assert found.interval == pytest.approx((0.3, 0.3))


def test_volumes_of_unequal_replicates_are_not_paired() -> None:
    assert Volume(value=1.0, replicates=np.ones(3)).minus(Volume(value=0.5, replicates=np.ones(4))) == Gap(value=0.5)


def test_ranks_peel_one_front_after_the_other() -> None:
    assert ranks(np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0], [0.0, 0.0]])) == [2, 1, 1, 3]


def test_a_front_point_may_be_dominated_on_held_out_data() -> None:
    worse, better = make(0, (0.7, 0.5), (0.9, 0.5)), make(1, (0.8, 0.6), (0.8, 0.6))
    found = position(worse, of(worse, better))
    assert found.on_front
    assert found.rank == 2
    assert found.dominated_by == (better,)


def test_a_rival_may_dominate_a_front_point_on_held_out_data() -> None:
    chosen, parent = make(0, (0.7, 0.5)), make(9, (0.8, 0.6))
    found = position(chosen, of(chosen), [parent])
    assert found.rank == 1
    assert found.dominated_by == (parent,)


def test_position_tells_whom_the_trial_dominates() -> None:
    chosen, parent, other = make(0, (0.7, 0.5)), make(8, (0.6, 0.5)), make(9, (0.6, 0.9))
    assert position(chosen, of(chosen), [parent, other]).dominates == (parent,)


def test_the_neighbor_is_the_nearest_better_one() -> None:
    chosen, near, far = make(0, (0.7, 0.7)), make(1, (0.75, 0.6)), make(2, (0.9, 0.1))
    assert position(chosen, of(chosen, near, far)).neighbors == {"a": near}


def test_of_two_neighbors_as_near_the_one_that_costs_less_counts() -> None:
    chosen, dear, cheap = make(0, (0.7, 0.7)), make(1, (0.75, 0.2)), make(2, (0.75, 0.6))
    assert position(chosen, of(chosen, dear, cheap)).neighbors == {"a": cheap}


def test_a_trial_may_be_best_in_an_objective() -> None:
    chosen, other = make(0, (0.9, 0.2)), make(1, (0.5, 0.5))
    assert position(chosen, of(chosen, other)).best_in == ("a",)


def test_the_knee_is_of_search_data() -> None:
    ends = make(0, (0.9, 0.1)), make(2, (0.1, 0.9))
    knee = make(1, (0.2, 0.2), search=(0.7, 0.7))
    front = of(ends[0], knee, ends[1])
    assert position(knee, front).is_knee
    assert not position(ends[0], front).is_knee


def test_a_trial_that_is_not_on_the_front_is_told_so() -> None:
    assert not position(make(5, (0.1, 0.1)), of(make(0, (0.7, 0.5)))).on_front


def test_without_held_out_scores_only_search_facts_remain() -> None:
    bare = replace(make(0, (0.7, 0.5)), held_out={})
    found = position(bare, of(bare))
    assert found.on_front
    assert (found.rank, found.neighbors) == (None, {})
