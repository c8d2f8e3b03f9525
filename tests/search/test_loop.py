"""The search on a problem with a known front: what it finds, what it evaluates, what it survives."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from hf_merge.errors import HfMergeError, MergeError, RecipeError
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score
from hf_merge.search import loop
from hf_merge.search.loop import PATIENCE, search
from hf_merge.search.samplers.names import SAMPLERS
from hf_merge.search.study import Study
from hf_merge.search.trial import Trial

Problem = Any


def run(problem: Problem, trials: int = 20, **given: Any) -> Study:
    return search(problem, problem.space, problem.directions, **{"trials": trials, "progress": False} | given)


def points(study: Study) -> list[tuple[str, tuple[float, ...]]]:
    return [(t.recipe.digest, tuple(s.value for s in t.scores.values())) for t in study.trials]


# What it finds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe", "random"])
def test_the_front_covers_most_of_the_known_hypervolume(problem: Problem, whole: float, sampler: str, seed: int) -> None:
    study = run(problem, trials=60, sampler=sampler, seed=seed)
    assert study.reference == {"x": pytest.approx(-0.1), "y": pytest.approx(-0.1)}
    least = 0.9 if sampler == "nsga3" else 0.93  # its reference directions cost it points of so small a front
    assert least * whole < study.front.hypervolume() <= whole


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_searches_methods_and_numbers(problem: Problem, sampler: str) -> None:
    study = run(problem, trials=12, sampler=sampler)
    assert study.evaluated == 12
    assert len({t.recipe.method for t in study.trials}) > 1


def test_a_minimized_objective_is_searched_downwards(problem: Problem, whole: float) -> None:
    def loss(recipe: Recipe, call: int) -> dict[str, Score]:
        scores = type(problem)()(recipe)
        return {"x": scores["x"], "y": Score(value=-scores["y"].value, examples=1)}

    problem.before, problem.directions = loss, {"x": "maximize", "y": "minimize"}
    study = run(problem, trials=60)
    assert study.reference == {"x": pytest.approx(-0.1), "y": pytest.approx(0.1)}
    assert 0.93 * whole < study.front.hypervolume() <= whole


def test_one_objective_alone_is_searched_as_well(problem: Problem) -> None:
    problem.directions = {"x": "maximize"}
    assert run(problem).front[0].name == "x"


def test_the_first_trials_are_the_parents_and_their_uniform_average(problem: Problem) -> None:
    first = run(problem).trials[:3]
    assert [t.label for t in first] == ["x", "y", "uniform average"]
    assert [t.scores["x"].value for t in first] == [1.0, 0.0, 0.75]


def test_known_recipes_come_next(problem: Problem) -> None:
    known = Recipe(method="ties", models=("lab/x", "lab/y"), base="lab/base", parameters={"density": 0.3})  # type: ignore[arg-type]
    fourth = run(problem, seeds={"last year's": known}).trials[3]
    assert (fourth.label, fourth.recipe.digest) == ("last year's", known.digest)


def test_every_trial_has_the_same_parameters(problem: Problem) -> None:
    study = run(problem, trials=30).optuna
    assert {tuple(sorted(t.params)) for t in study.trials} == {tuple(sorted(problem.space.distributions))}


def test_the_same_seed_finds_the_same_trials(problem: Problem) -> None:
    assert points(run(problem, seed=5)) == points(run(problem, seed=5))


def test_another_seed_finds_other_trials(problem: Problem) -> None:
    assert points(run(problem, seed=5)) != points(run(problem, seed=6))


def test_a_sampler_of_optuna_s_can_be_given(problem: Problem) -> None:
    study = run(problem, sampler=optuna.samplers.QMCSampler(seed=0))
    assert type(study.optuna.sampler) is optuna.samplers.QMCSampler
    assert study.evaluated == 20


# What it evaluates


@pytest.mark.parametrize("trials", [20, 60])
def test_every_recipe_is_evaluated_once_and_the_budget_counts_evaluations(problem: Problem, trials: int) -> None:
    study = run(problem, trials)
    assert len(problem.calls) == len(set(problem.calls)) == trials == study.evaluated
    assert problem.calls == [t.recipe.digest for t in study.trials]


def two_points(problem: Problem) -> None:
    """Leaves five recipes in the space besides the seeds, at most."""
    problem.space = type(problem.space)(
        models=problem.space.models, base=problem.space.base, methods=("task_arithmetic",), ranges={"weight": (0.25, 0.25)}
    )


def test_a_repeated_recipe_is_told_with_the_scores_it_had(problem: Problem) -> None:
    two_points(problem)
    study = run(problem)
    repeats = [t for t in study.optuna.trials if "repeat_of" in t.user_attrs]
    first = study.optuna.trials[repeats[0].user_attrs["repeat_of"]]
    assert {(tuple(t.values), t.state) for t in repeats} == {(tuple(first.values), TrialState.COMPLETE)}
    assert study.repeats == len(repeats)


def test_a_search_that_finds_nothing_new_stops_and_says_so(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    two_points(problem)
    study = run(problem)
    assert (study.evaluated, study.repeats) == (4, PATIENCE)
    assert "Stopped after 4 of 20 evaluations" in caplog.text


class Stutter(optuna.samplers.RandomSampler):
    """Draws the same point in every second trial."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if trial.number % 2:
            return "ties" if param_name == "method" else 0.5
        return super().sample_independent(study, trial, param_name, param_distribution)


def test_only_repeats_in_a_row_end_a_search(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 2)
    study = run(problem, sampler=Stutter(seed=0))
    assert study.evaluated == 20
    assert study.repeats > 2


def test_what_is_known_already_is_not_evaluated_and_not_counted(problem: Problem) -> None:
    parent = problem.space.parents()["x"].digest
    already = {parent: {name: Score(value=0.5, examples=7) for name in "xy"}}
    study = run(problem, already=already)
    assert parent not in problem.calls
    assert len(problem.calls) == study.evaluated == 20
    assert (study.trials[0].label, study.trials[0].scores["x"].value) == ("x", 0.5)


def test_trials_are_given_away_as_they_end(problem: Problem) -> None:
    seen: list[Trial] = []
    study = run(problem, on_trial=seen.append)
    assert [t.number for t in seen] == [t.number for t in study.trials]
    assert [t.recipe.digest for t in seen] == problem.calls


def test_a_trial_is_stored_with_its_recipe_scores_and_costs(problem: Problem) -> None:
    replicates = np.linspace(0.0, 1.0, 101)
    problem.before = lambda recipe, call: {
        name: Score(value=0.5, examples=50, seconds=1.5, replicates=replicates) for name in "xy"
    }
    stored = run(problem, trials=4).optuna.trials[0].user_attrs
    assert stored["scores"]["x"] == {"value": 0.5, "examples": 50, "seconds": 1.5, "interval": pytest.approx([0.025, 0.975])}
    assert stored["recipe"]["merge_method"] == "linear"
    assert stored["digest"] == problem.calls[0]
    assert stored["seconds"] > 0


def test_scores_are_told_by_name_and_not_by_order(problem: Problem) -> None:
    problem.before = lambda recipe, call: {n: Score(value=v, examples=1) for n, v in (("z", 3.0), ("y", 2.0), ("x", 1.0))}
    assert run(problem, trials=4).optuna.trials[0].values == [1.0, 2.0]


def test_the_reference_point_is_a_tenth_of_the_parents_range_beyond_their_worst(problem: Problem) -> None:
    values = {"x": (10.0, 0.8), "y": (30.0, 0.8)}
    problem.directions = {"loss": "minimize", "accuracy": "maximize"}
    problem.before = lambda recipe, call: {
        name: Score(value=v, examples=1)
        for name, v in zip(problem.directions, values.get(recipe.models[0].name, (0.0, 0.0)), strict=True)
    }
    assert run(problem, trials=4).reference == {"loss": pytest.approx(32.0), "accuracy": pytest.approx(0.72)}


# What it survives


FAILURES = [
    MergeError("shapes differ"),
    RuntimeError("expected scalar type"),
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("no rows"),
    FloatingPointError("overflow"),
    ZeroDivisionError("no examples"),
    MemoryError("no room"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failed_trial_is_stored_with_its_error_and_the_search_goes_on(problem: Problem, error: Exception) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        if call == 5:
            raise error

    problem.before = fail
    study = run(problem)
    failed = [t for t in study.trials if t.error]
    assert [t.error for t in failed] == [f"{type(error).__name__}: {error}"]
    assert not failed[0].scores
    assert (study.evaluated, len(study.trials)) == (20, 20)
    assert study.optuna.trials[failed[0].number].state == TrialState.FAIL


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failure(problem: Problem, value: float) -> None:
    problem.before = lambda recipe, call: {n: Score(value=value, examples=1) for n in "xy"} if call == 5 else None
    failed = [t for t in run(problem).trials if t.error]
    assert [t.error for t in failed] == [f"EvaluationError: The score of 'x' is {value}."]


def test_a_missing_score_is_a_failure(problem: Problem) -> None:
    problem.before = lambda recipe, call: {"x": Score(value=1.0, examples=1)} if call == 5 else None
    failed = [t for t in run(problem).trials if t.error]
    assert [t.error for t in failed] == ["EvaluationError: No score for y; got x."]


def test_a_failed_recipe_is_not_tried_again(problem: Problem) -> None:
    two_points(problem)

    def fail(recipe: Recipe, call: int) -> None:
        if call == 4:
            raise RuntimeError("no")

    problem.before = fail
    study = run(problem)
    assert len(problem.calls) == 4
    assert {t.state for t in study.optuna.trials if "repeat_of" in t.user_attrs} == {TrialState.FAIL}


def test_a_search_whose_first_recipes_all_fail_raises_the_error(problem: Problem) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        raise MergeError(f"failure {call}")

    problem.before = fail
    with pytest.raises(MergeError, match="failure 3") as caught:
        run(problem)
    assert caught.value.__notes__ == ["None of the first 3 recipes of the search could be scored."]
    assert len(problem.calls) == 3


def test_a_search_in_which_nothing_worked_starts_anew(problem: Problem, tmp_path: Path) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        raise MergeError("no disk")

    broken = type(problem)(before=fail)
    with pytest.raises(MergeError):
        run(broken, storage=tmp_path / "study.log")
    study = run(problem, storage=tmp_path / "study.log")
    assert [t.label for t in study.trials[:3]] == ["x", "y", "uniform average"]
    assert not any(t.error for t in study.trials)


def test_parents_that_fail_leave_the_reference_to_those_that_did_not(problem: Problem) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        if call == 1:
            raise RuntimeError("no")

    problem.before = fail
    assert run(problem).reference == {"x": pytest.approx(-0.1), "y": pytest.approx(0.9)}


def test_a_mistake_in_the_program_ends_the_search_and_the_trial_is_run_again(problem: Problem, tmp_path: Path) -> None:
    def mistake(recipe: Recipe, call: int) -> None:
        if call == 5:
            raise KeyError("accurcy")

    problem.before = mistake
    with pytest.raises(KeyError):
        run(problem, storage=tmp_path / "study.log")
    study = run(problem, storage=tmp_path / "study.log")
    assert not any(t.error for t in study.trials)
    assert Counter(problem.calls).most_common(2) == [(problem.calls[4], 2), (problem.calls[0], 1)]


def interrupt_at(call: int) -> Any:
    def interrupt(recipe: Recipe, now: int) -> None:
        if now == call:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("call", [1, 2, 7])
def test_an_interrupted_search_returns_what_there_is(problem: Problem, call: int, caplog: pytest.LogCaptureFixture) -> None:
    problem.before = interrupt_at(call)
    study = run(problem)
    assert [t.recipe.digest for t in study.trials] == problem.calls[: call - 1]
    assert len(study.front) == min(call - 1, len(study.front))
    assert f"Interrupted after {call - 1} of 20 evaluations" in caplog.text
    assert not [t for t in study.optuna.trials if t.state == TrialState.RUNNING]


@pytest.mark.parametrize("call", [2, 4, 7])
def test_an_interrupted_search_resumes_with_the_recipe_that_was_running(problem: Problem, tmp_path: Path, call: int) -> None:
    problem.before = interrupt_at(call)
    run(problem, storage=tmp_path / "study.log")
    study = run(problem, storage=tmp_path / "study.log")
    assert [d for d, n in Counter(problem.calls).items() if n > 1] == [problem.calls[call - 1]]
    assert study.evaluated == len(study.trials) == 20
    assert {t.label for t in study.trials} == {"", "x", "y", "uniform average"}


def test_the_reference_point_waits_for_a_parent_that_was_interrupted(problem: Problem, tmp_path: Path) -> None:
    def interrupt(recipe: Recipe, call: int) -> dict[str, Score] | None:
        if call == 2:
            raise KeyboardInterrupt
        return None if len(recipe.models) == 1 else {name: Score(value=-9.0, examples=1) for name in "xy"}

    problem.before = interrupt
    run(problem, storage=tmp_path / "study.log")
    study = run(problem, storage=tmp_path / "study.log")
    assert [t.label for t in study.trials[:3]] == ["x", "uniform average", "y"]
    assert study.reference == {"x": pytest.approx(-0.1), "y": pytest.approx(-0.1)}


def test_a_resumed_search_does_not_draw_the_first_run_s_points_again(problem: Problem, tmp_path: Path) -> None:
    space = type(problem.space)(models=problem.space.models, base=problem.space.base, methods=("task_arithmetic",))
    problem.space = space
    run(problem, trials=10, sampler="random", storage=tmp_path / "study.log")
    assert run(problem, trials=20, sampler="random", storage=tmp_path / "study.log").repeats == 0


def test_the_reference_point_stays_when_a_search_is_resumed(problem: Problem, tmp_path: Path) -> None:
    before = run(problem, trials=10, storage=tmp_path / "study.log").reference
    problem.before = lambda recipe, call: {n: Score(value=-5.0, examples=1) for n in "xy"}
    assert run(problem, trials=20, storage=tmp_path / "study.log").reference == before


@pytest.mark.parametrize("kind", ["journal", "sqlite", "memory"])
def test_a_second_search_continues_the_first(problem: Problem, tmp_path: Path, kind: str) -> None:
    made = {
        "journal": tmp_path / "study.log",
        "sqlite": f"sqlite:///{tmp_path}/s.db",
        "memory": optuna.storages.InMemoryStorage(),
    }
    before = points(run(problem, trials=5, storage=made[kind]))
    study = run(problem, trials=8, storage=made[kind])
    assert points(study)[:5] == before
    assert len(problem.calls) == len(set(problem.calls)) == study.evaluated == 8


def test_a_finished_search_only_returns_its_study(problem: Problem, tmp_path: Path) -> None:
    first = run(problem, storage=tmp_path / "study.log")
    again = run(problem, storage=tmp_path / "study.log")
    assert len(problem.calls) == 20
    assert points(again) == points(first)


def test_a_recipe_known_only_later_is_run_when_the_search_is_resumed(problem: Problem, tmp_path: Path) -> None:
    run(problem, trials=10, storage=tmp_path / "study.log")
    known = Recipe(method="ties", models=("lab/x", "lab/y"), base="lab/base")  # type: ignore[arg-type]
    study = run(problem, trials=12, storage=tmp_path / "study.log", seeds={"known": known})
    assert study.trials[10].label == "known"


def test_two_studies_share_a_storage_by_their_names(problem: Problem, tmp_path: Path) -> None:
    run(problem, trials=5, storage=tmp_path / "study.log", study_name="one")
    assert run(problem, trials=6, storage=tmp_path / "study.log", study_name="two").evaluated == 6
    assert Study.load(tmp_path / "study.log", "one").evaluated == 5


CHANGES = [
    ({"fingerprint": {"data": "b"}}, "fingerprint, data: was 'a', is 'b'"),
    ({"fingerprint": {}}, "fingerprint, data: was 'a', is None"),
    ({"directions": {"x": "maximize", "y": "minimize"}}, "directions, y: was 'maximize', is 'minimize'"),
    ({"space": {"methods": ("ties",)}}, r"space, methods: was \['task_arithmetic', 'ties', 'dare_ties'\], is \['ties'\]"),
    ({"space": {"seed": 3}}, "space, seed: was 0, is 3"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=["data", "no data", "directions", "methods", "seed"])
def test_a_study_with_other_settings_is_not_resumed(
    problem: Problem, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = {"trials": 5, "storage": tmp_path / "study.log", "progress": False, "fingerprint": {"data": "a"}}
    search(problem, problem.space, problem.directions, **given)
    other = type(problem.space)(models=problem.space.models, base=problem.space.base, **change.get("space", {}))
    with pytest.raises(RecipeError, match=message) as caught:
        search(
            problem,
            other,
            change.get("directions", problem.directions),
            **given | {"fingerprint": change.get("fingerprint", {"data": "a"})},
        )
    assert "give another study_name or storage to start anew" in str(caught.value)
    assert len(problem.calls) == 5


def test_objectives_in_another_order_are_the_same_study(problem: Problem, tmp_path: Path) -> None:
    run(problem, trials=5, storage=tmp_path / "study.log")
    problem.directions = {"y": "maximize", "x": "maximize"}
    study = run(problem, trials=8, storage=tmp_path / "study.log")
    stored = study.optuna.trials[7]
    assert stored.values == [stored.user_attrs["scores"]["x"]["value"], stored.user_attrs["scores"]["y"]["value"]]


def test_a_study_of_another_program_is_left_alone(problem: Problem, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    theirs = optuna.create_study(storage=storage, study_name="hf_merge")
    theirs.set_user_attr("owner", "somebody")
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(RecipeError, match="was not made by hf_merge"):
        run(problem, storage=storage)
    assert len(theirs.trials) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 2}, "trials=2 is not enough for the 3 first recipes: x, y, uniform average"),
        ({"sampler": "nsga"}, "Unknown sampler 'nsga'"),
        ({"seeds": {"x": Recipe(method="linear", models=("lab/y",))}}, "has the name of a parent"),  # type: ignore[arg-type]
        ({"seeds": {"z": Recipe(method="linear", models=("lab/z",))}}, "not a model of this space"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_make_no_sense_are_refused(problem: Problem, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(problem, **given)
    assert not problem.calls


@pytest.mark.parametrize(("directions", "message"), [({}, "needs objectives"), ({"x": "max"}, "Unknown direction 'max'")])
def test_objectives_need_directions(problem: Problem, directions: dict[str, str], message: str) -> None:
    problem.directions = directions
    with pytest.raises(RecipeError, match=message):
        run(problem)


def test_the_progress_bar_shows_the_front_and_the_best(problem: Problem, capsys: pytest.CaptureFixture[str]) -> None:
    run(problem, progress=True)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "front " in shown
    assert "hypervolume " in shown
    assert "x 1, y 1" in shown


def test_the_progress_bar_of_a_resumed_search_starts_where_it_was(
    problem: Problem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(problem, trials=10, storage=tmp_path / "study.log")
    run(problem, trials=12, storage=tmp_path / "study.log", progress=True)
    shown = capsys.readouterr().err
    assert "10/12" in shown
    assert "12/12" in shown


def test_a_quiet_search_prints_nothing(problem: Problem, capfd: pytest.CaptureFixture[str]) -> None:
    run(problem)
    assert capfd.readouterr() == ("", "")


def test_optuna_is_as_talkative_after_a_search_as_before(problem: Problem) -> None:
    optuna.logging.set_verbosity(logging.DEBUG)
    try:
        run(problem, trials=4)
        assert optuna.logging.get_verbosity() == logging.DEBUG
    finally:
        optuna.logging.set_verbosity(logging.INFO)


# kill -9

KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Specialists
from hf_merge.search.loop import search

folder = Path(sys.argv[1])
problem = Specialists()

def score(recipe):
    with (folder / "calls").open("a") as file:
        file.write(recipe.digest + "\\n")
    time.sleep(float(sys.argv[2]))
    return problem(recipe)

search(score, problem.space, problem.directions, trials=16, storage=folder / "study.log", progress=False)
"""


def start(folder: Path, seconds: float) -> "subprocess.Popen[str]":
    code = KILLED.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(seconds)], stderr=subprocess.PIPE, text=True)


def called(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().split() if path.exists() else []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_search_resumes_and_evaluates_no_finished_recipe_twice(tmp_path: Path) -> None:
    in_flight = []
    for goal in (2, 7):
        process = start(tmp_path, 0.15)
        while len(called(tmp_path)) < goal + len(in_flight):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        in_flight.append(called(tmp_path)[-1])
    last = start(tmp_path, 0.0)
    assert last.communicate()[1] == ""
    study = Study.load(tmp_path / "study.log")
    assert (study.evaluated, len(study.trials)) == (16, 16)
    assert {t.label for t in study.trials} == {"", "x", "y", "uniform average"}
    twice = {digest for digest, n in Counter(called(tmp_path)).items() if n > 1}
    assert twice <= set(in_flight)
    assert len(called(tmp_path)) <= 16 + len(in_flight)
    assert {t.recipe.digest for t in study.trials} == set(called(tmp_path))


def test_a_trial_that_was_scored_when_its_process_died_is_not_evaluated_again(problem: Problem, tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    def die(self: Study, number: int, attrs: Any) -> None:
        if number == 5:
            raise Died
        return tell(self, number, attrs)

    tell = Study._tell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "_tell", die)
        with pytest.raises(Died):
            run(problem, storage=tmp_path / "study.log")
    assert len(problem.calls) == 6
    study = run(problem, storage=tmp_path / "study.log")
    assert len(problem.calls) == len(set(problem.calls)) == study.evaluated == 20
    assert study.optuna.trials[5].state == TrialState.COMPLETE
    assert [t.number for t in study.optuna.trials if t.user_attrs["digest"] == problem.calls[5]] == [5]


def test_a_parent_is_not_lost_when_the_process_dies_while_it_is_put_back(problem: Problem, tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    def die(self: Study, number: int, attrs: Any) -> None:
        raise Died

    problem.before = interrupt_at(2)
    tell = Study._tell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "_tell", lambda self, number, attrs: (die if number == 1 else tell)(self, number, attrs))
        with pytest.raises(Died):
            run(problem, storage=tmp_path / "study.log")
    study = run(problem, storage=tmp_path / "study.log")
    assert sorted(t.label for t in study.trials if t.label) == ["uniform average", "x", "y"]
    assert study.evaluated == len({t.recipe.digest for t in study.trials}) == 20


def test_two_searches_at_once_in_one_journal_are_refused(problem: Problem, tmp_path: Path) -> None:
    def inner(recipe: Recipe, call: int) -> None:
        if call == 4:
            run(type(problem)(), storage=tmp_path / "study.log")

    problem.before = inner
    failed = [t.error for t in run(problem, storage=tmp_path / "study.log").trials if t.error]
    assert len(failed) == 1
    assert "Another process is searching" in failed[0]


def test_a_study_can_be_read_while_it_is_searched(problem: Problem, tmp_path: Path) -> None:
    counts = []
    run(
        problem,
        storage=tmp_path / "study.log",
        on_trial=lambda t: counts.append(len(Study.load(tmp_path / "study.log").trials)),
    )
    assert counts == list(range(1, 21))


def test_loading_a_study_that_is_not_there_says_so_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(HfMergeError, match="no study 'hf_merge'"):
        Study.load(tmp_path / "typo.log")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_study_is_the_one_that_was_searched(problem: Problem, tmp_path: Path) -> None:
    study = run(problem, storage=tmp_path / "study.log")
    loaded = Study.load(tmp_path / "study.log")
    assert points(loaded) == points(study)
    assert (loaded.directions, loaded.reference, repr(loaded)) == (study.directions, study.reference, repr(study))
    assert [t.number for t in loaded.front] == [t.number for t in study.front]


def test_a_model_s_name_may_be_anything(problem: Problem) -> None:
    models = tuple(RecipeModel(ref=m.ref, name=name) for m, name in zip(problem.space.models, ("a b.c=1", "数学"), strict=True))
    problem.space = type(problem.space)(models=models, base=problem.space.base)
    assert [t.label for t in run(problem).trials[:2]] == ["a b.c=1", "数学"]
