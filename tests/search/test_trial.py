"""Trials and their front."""

import numpy as np
import pytest

from hf_merge import pareto
from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial, hypervolume, to_points

DIRECTIONS = {"accuracy": "maximize", "loss": "minimize"}
REFERENCE = {"accuracy": 0.0, "loss": 1.0}


def trial(number: int, *values: float, weight: float | None = None, held_out: tuple[float, ...] = (), label: str = "") -> Trial:
    """A trial with these scores; its recipe is its own unless `weight` says which."""
    model = RecipeModel(ref=ModelRef("lab/model"), parameters={"weight": float(number) if weight is None else weight})
    recipe = Recipe(method="task_arithmetic", models=(model,), base="lab/base")
    return Trial(number=number, recipe=recipe, scores=_scores(values), held_out=_scores(held_out), label=label)


def _scores(values: tuple[float, ...]) -> dict[str, Score]:
    return {name: Score(value=v, examples=10) for name, v in zip(DIRECTIONS, values, strict=False)}


def front(*trials: Trial) -> Front:
    return Front.of(trials, DIRECTIONS, REFERENCE)


def numbers(found: Front) -> list[int]:
    return [t.number for t in found]


def test_the_front_keeps_what_no_trial_dominates_best_in_the_first_objective_first() -> None:
    assert numbers(front(trial(0, 0.2, 0.1), trial(1, 0.9, 0.8), trial(2, 0.5, 0.5), trial(3, 0.4, 0.6))) == [1, 2, 0]


def test_a_minimized_objective_is_better_when_smaller() -> None:
    assert numbers(front(trial(0, 0.5, 0.5), trial(1, 0.5, 0.4))) == [1]


def test_a_failed_trial_is_not_on_the_front() -> None:
    failed = Trial(number=0, recipe=trial(0, 1.0, 0.0).recipe, error="RuntimeError: out of memory")
    assert numbers(front(failed, trial(1, 0.1, 0.9))) == [1]


def test_a_recipe_that_was_tried_twice_is_on_the_front_once_under_its_first_number() -> None:
    assert numbers(front(trial(3, 0.5, 0.5, weight=1.0), trial(7, 0.5, 0.5, weight=1.0))) == [3]


def test_different_recipes_with_equal_scores_are_all_kept_in_the_order_of_their_numbers() -> None:
    assert numbers(front(trial(4, 0.5, 0.5), trial(2, 0.5, 0.5))) == [2, 4]


def test_a_front_of_failures_is_empty_and_says_so_when_asked_to_choose() -> None:
    failed = Trial(number=0, recipe=trial(0).recipe, error="ValueError: no")
    assert len(front(failed)) == 0
    assert front(failed).hypervolume() == 0.0
    with pytest.raises(RecipeError, match="every trial failed"):
        front(failed).choose()


def test_the_front_is_a_sequence_of_trials() -> None:
    found = front(trial(0, 0.9, 0.9), trial(1, 0.1, 0.1))
    assert (found[0].number, found[-1].number, len(found), found[1] in found) == (0, 1, 2, True)


def test_points_have_minimized_objectives_negated() -> None:
    assert to_points([trial(0, 0.5, 0.25), trial(1, 0.1, 0.0)], DIRECTIONS).tolist() == [[0.5, -0.25], [0.1, 0.0]]


def test_points_of_no_trials_have_a_column_for_each_objective() -> None:
    assert to_points([], DIRECTIONS).shape == (0, 2)


def test_the_hypervolume_is_the_area_between_the_front_and_the_reference() -> None:
    assert front(trial(0, 0.5, 0.8), trial(1, 0.2, 0.5)).hypervolume() == pytest.approx(0.5 * 0.2 + 0.2 * 0.3)


def test_the_front_has_the_hypervolume_of_all_its_trials() -> None:
    rng = np.random.default_rng(0)
    trials = [trial(i, *rng.random(2)) for i in range(30)]
    assert front(*trials).hypervolume() == pytest.approx(hypervolume(trials, DIRECTIONS, REFERENCE))


def test_held_out_scores_have_a_hypervolume_of_their_own() -> None:
    found = front(trial(0, 0.5, 0.5, held_out=(0.4, 0.6)))
    assert found.hypervolume("search") == pytest.approx(0.25)
    assert found.hypervolume("held_out") == pytest.approx(0.16)


def test_search_and_held_out_scores_are_not_mixed() -> None:
    one = trial(0, 0.5, 0.5, held_out=(0.4, 0.6))
    assert (one.on("search")["accuracy"].value, one.on("held_out")["accuracy"].value) == (0.5, 0.4)


@pytest.fixture
def three() -> Front:
    return front(trial(0, 1.0, 1.0), trial(1, 0.7, 0.3), trial(2, 0.0, 0.0))


@pytest.mark.parametrize(("objective", "number"), [("accuracy", 0), ("loss", 2)])
def test_choosing_an_objective_gives_the_best_in_it(three: Front, objective: str, number: int) -> None:
    assert three.choose(objective=objective).number == number


@pytest.mark.parametrize(
    ("preference", "number"),
    [({"accuracy": 1.0}, 0), ({"loss": 3.0}, 2), ({"accuracy": 0.5, "loss": 0.5}, 1), ({"accuracy": 20, "loss": 1}, 0)],
)
def test_a_preference_gives_the_nearest_point(three: Front, preference: dict[str, float], number: int) -> None:
    assert three.choose(preference).number == number


def test_the_knee_is_the_choice_without_a_preference(three: Front) -> None:
    assert three.choose().number == three.choose("knee").number == 1


@pytest.mark.parametrize("preference", [{}, {"loss": 0.0}, {"loss": -1.0, "accuracy": 2.0}, {"loss": float("nan")}])
def test_a_preference_that_prefers_nothing_is_refused(three: Front, preference: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="non-negative weights"):
        three.choose(preference)


def test_a_preference_that_is_no_mapping_is_refused(three: Front) -> None:
    with pytest.raises(RecipeError, match="mapping from objectives"):
        three.choose("accuracy")  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"preference": {"acuracy": 1.0}}, {"objective": "acuracy"}])
def test_an_unknown_objective_is_answered_with_the_nearest_name(three: Front, asked: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'accuracy'"):
        three.choose(**asked)  # type: ignore[arg-type]


def test_a_trial_is_called_by_its_label_or_else_by_its_number() -> None:
    assert (trial(3, 0.0, 0.0, label="math").name, trial(3, 0.0, 0.0).name) == ("math", "trial 3")


def test_the_front_prints_every_trial_with_its_scores(three: Front) -> None:
    lines = repr(three).splitlines()
    assert len(lines) == 4
    assert "Front of 3" in lines[0]
    assert "accuracy 0.7000  loss 0.3000" in lines[2]


def test_choosing_agrees_with_the_points_preferred(three: Front) -> None:
    points = to_points(three.trials, DIRECTIONS)
    assert three.choose({"accuracy": 0.3, "loss": 0.7}) is three[pareto.preferred(points, [0.3, 0.7])]
