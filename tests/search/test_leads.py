"""Margins that are kept with trials."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score, Scores
from hf_merge.search.leads import LEADS, ROWS, leads, leads_of
from hf_merge.search.loop import search
from hf_merge.search.study import Study

RNG = np.random.default_rng(0)
MARGINS = {"x": RNG.normal(size=100).astype(np.float32), "y": 1e6 * RNG.normal(size=3 * ROWS).astype(np.float32)}


def scored(recipe: Recipe, **given: Any) -> Scores:
    plain = {name: Score(value=RNG.random(), examples=len(m), margins=m) for name, m in MARGINS.items()}
    return plain | {"size": Score(value=RNG.random(), examples=0)}


@pytest.fixture
def study(problem: Any, tmp_path: Path) -> Study:
    directions = {"x": "maximize", "y": "maximize", "size": "minimize"}
    search(scored, problem.space, directions, trials=5, storage=tmp_path / "study.log", progress=False)
    return Study.load(tmp_path / "study.log")


def test_a_stored_trial_has_its_margins_to_three_digits(study: Study) -> None:
    found = leads_of(study.optuna.trials, 0)
    assert found is not None
    assert found.shape == (5, 100)
    assert found[3] == pytest.approx(MARGINS["x"], rel=1e-3)


def test_of_many_rows_an_even_selection_is_kept_and_margins_that_are_too_large_are_cut(study: Study) -> None:
    found = leads_of(study.optuna.trials, 1)
    assert found is not None
    kept = MARGINS["y"][np.linspace(0, 3 * ROWS - 1, ROWS).round().astype(int)]
    assert found[0] == pytest.approx(np.clip(kept, -65504, 65504), rel=1e-3)


def test_an_objective_without_margins_has_none(study: Study) -> None:
    assert leads_of(study.optuna.trials, 2) is None


def test_one_trial_without_margins_or_with_other_rows_leaves_none(study: Study) -> None:
    trials = study.optuna.trials
    trials[2].system_attrs[LEADS] = leads(
        [Score(value=0.5, examples=9, margins=MARGINS["x"][:9]), *[Score(value=0.5, examples=0)] * 2]
    )
    assert leads_of(trials, 0) is None
    del trials[2].system_attrs[LEADS]
    assert leads_of(trials, 1) is None


def test_of_what_a_race_stopped_the_expected_margins_are_kept() -> None:
    rows = np.arange(4)
    stopped = Score(value=0.5, examples=4, margins=MARGINS["x"][:4], rows=rows, expected=MARGINS["x"].astype(np.float64))
    whole = Score(value=0.5, examples=100, margins=MARGINS["x"])
    assert leads([stopped]) == leads([whole])


def test_nothing_is_kept_where_there_are_no_margins(problem: Any, tmp_path: Path) -> None:
    search(problem, problem.space, problem.directions, trials=4, storage=tmp_path / "study.log", progress=False)
    assert all(LEADS not in trial.system_attrs for trial in Study.load(tmp_path / "study.log").optuna.trials)
