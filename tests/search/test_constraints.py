"""Constraints: what they may say, what they do to the front and to the samplers."""

import math
from typing import Any

import pytest

from hf_merge.errors import RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score
from hf_merge.search.constraints import Bound, bounds
from hf_merge.search.loop import search
from hf_merge.search.study import Study
from hf_merge.search.trial import Front, Trial

Problem = Any
LABELS = ("base", "spam-2", "math + code")
BASE = Recipe(method="linear", models=("lab/base",))  # type: ignore[arg-type]


def run(problem: Problem, constraints: dict[str, str], trials: int = 40, **given: Any) -> Study:
    return search(problem, problem.space, problem.directions, trials=trials, constraints=constraints, progress=False, **given)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (">= 0.9", Bound(sign=1, offset=0.9)),
        ("<=-3", Bound(sign=-1, offset=-3.0)),
        (">= base", Bound(sign=1, offset=0.0, anchor="base")),
        (" >=  base - 0.01 ", Bound(sign=1, offset=-0.01, anchor="base")),
        ("<= base+1e-3", Bound(sign=-1, offset=1e-3, anchor="base")),
        (">= best parent - .5", Bound(sign=1, offset=-0.5, anchor="best parent")),
        (">= spam-2", Bound(sign=1, offset=0.0, anchor="spam-2")),
        (">= spam-2 - 2", Bound(sign=1, offset=-2.0, anchor="spam-2")),
        ("<= math + code + 1", Bound(sign=-1, offset=1.0, anchor="math + code")),
    ],
)
def test_a_constraint_is_a_number_or_a_model_and_a_distance(text: str, bound: Bound) -> None:
    assert bounds({"x": text}, ["x"], LABELS) == {"x": bound}


@pytest.mark.parametrize("text", ["0.9", "> 0.9", ">=", "== base", 0.9, None, ">= bass - 0.01", ">= base - 1 %", ">= base * 2"])
def test_another_text_is_refused(text: object) -> None:
    with pytest.raises(RecipeError, match=r">= base - 0\.01"):
        bounds({"x": text}, ["x"], LABELS)  # type: ignore[dict-item]


def test_a_constraint_on_what_is_not_an_objective_is_refused(problem: Problem) -> None:
    with pytest.raises(RecipeError, match="Unknown objective in a constraint 'z'"):
        run(problem, {"z": ">= 0"})


def test_a_base_that_is_not_among_the_first_recipes_is_refused(problem: Problem) -> None:
    with pytest.raises(RecipeError, match="Unknown model in the constraint of 'x' 'base'"):
        run(problem, {"x": ">= base"})


@pytest.mark.parametrize(
    ("bound", "value", "anchor", "violation"),
    [
        (Bound(sign=1, offset=0.5), 0.25, None, 0.25),
        (Bound(sign=-1, offset=0.5), 0.25, None, -0.25),
        (Bound(sign=1, offset=-0.01, anchor="base"), 0.89, 0.9, 0.0),
        (Bound(sign=1, offset=-0.25, anchor="base"), 0.25, 1.0, 0.5),
        (Bound(sign=1, offset=0.0, anchor="base"), 0.0, None, 0.0),
        (Bound(sign=1, offset=0.0, anchor="base"), 0.0, math.nan, math.inf),
    ],
)
def test_a_violation_is_the_distance_beyond_the_bound(
    bound: Bound, value: float, anchor: float | None, violation: float
) -> None:
    assert bound.violation(value, anchor) == violation


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe", "gp", "random"])
def test_the_front_keeps_the_constraints_with_every_sampler(problem: Problem, sampler: str) -> None:
    study = run(problem, {"x": ">= best parent - 0.2"}, trials=14, sampler=sampler)
    assert study.front
    assert all(t.scores["x"].value >= 0.8 for t in study.front)
    assert {t.label for t in study.trials if t.violations} >= {"y", "uniform average"}


def test_the_front_is_that_of_the_trials_that_keep_the_constraints(problem: Problem) -> None:
    study = run(problem, {"x": ">= 0.8", "y": ">= 0.5"})
    allowed = [t for t in study.trials if t.scores["x"].value >= 0.8 and t.scores["y"].value >= 0.5]
    assert {t.number for t in study.front} == {t.number for t in Front.of(allowed, study.directions, study.reference)}
    assert {t.number for t in study.trials if not t.violations} == {t.number for t in allowed}


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe"])
def test_the_samplers_heed_the_constraints(problem: Problem, sampler: str) -> None:
    def kept(constraints: dict[str, str]) -> float:
        late = [t for s in range(3) for t in run(type(problem)(), constraints, 50, sampler=sampler, seed=s).trials[-25:]]
        return sum(t.scores["x"].value >= 0.9 for t in late) / len(late)

    assert kept({"x": ">= 0.9"}) > kept({}) + 0.1


def test_optuna_s_best_trials_keep_the_constraints(problem: Problem) -> None:
    study = run(problem, {"x": ">= 0.8"})
    assert {t.number for t in study.optuna.best_trials} >= {t.number for t in study.front}
    assert all(t.values[0] >= 0.8 for t in study.optuna.best_trials)


def test_the_model_that_a_constraint_names_is_tried_first(problem: Problem) -> None:
    study = run(problem, {"x": ">= base + 0.1"}, seeds={"base": BASE})
    assert study.trials[0].label == "base"
    assert study.trials[1].violations == {}
    assert all(t.scores["x"].value >= study.trials[0].scores["x"].value + 0.1 for t in study.front)


def test_no_trial_that_keeps_the_constraints_makes_an_empty_front_that_says_so(problem: Problem) -> None:
    study = run(problem, {"x": ">= 1.5"}, trials=8)
    assert len(study.front) == 0
    assert study.front.hypervolume() == 0.0
    assert "no trial keeps the constraints. x comes nearest; it misses x by 0.5" in repr(study.front)
    with pytest.raises(RecipeError, match=r"no trial keeps the constraints\. x comes nearest"):
        study.front.choose()


def test_a_named_model_that_cannot_be_scored_leaves_the_front_empty(problem: Problem) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        if recipe.digest == BASE.digest:
            raise RuntimeError("no")

    problem.before = fail
    study = run(problem, {"x": ">= base"}, trials=8, seeds={"base": BASE})
    assert len(study.front) == 0
    assert all(t.violations == {"x": math.inf} for t in study.trials if t.scores)


def test_a_minimized_objective_has_a_highest_value(problem: Problem) -> None:
    problem.directions = {"x": "maximize", "y": "minimize"}
    study = run(problem, {"y": "<= best parent + 0.25"})
    assert all(t.scores["y"].value <= 0.25 for t in study.front)


def test_constraints_are_a_setting_of_the_study(problem: Problem, tmp_path: Any) -> None:
    run(problem, {"x": ">= 0.8"}, trials=5, storage=tmp_path / "study.log")
    with pytest.raises(RecipeError, match=r"constraints, x: was '>= 0\.8', is '>= 0\.9'"):
        run(problem, {"x": ">= 0.9"}, trials=8, storage=tmp_path / "study.log")
    loaded = Study.load(tmp_path / "study.log")
    assert [t.violations for t in loaded.trials] == [t.violations for t in run(problem, {"x": ">= 0.8"}, trials=5).trials]


def test_a_trial_without_violations_is_unchanged_by_them() -> None:
    trial = Trial(number=0, recipe=BASE, scores={"x": Score(value=1.0, examples=1)})
    assert Front.of([trial], {"x": "maximize"}, {"x": 0.0}).trials == (trial,)
