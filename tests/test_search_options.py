"""auto_merge's ways to search, on the real specialists: samplers, constraints, racing, groups, the distance from the base."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_merge.auto import auto_merge
from hf_merge.demo.specialists import FamilyFolder
from hf_merge.errors import RecipeError
from hf_merge.evaluation.objective import Objective
from hf_merge.result import MergeResult
from hf_merge.scores import load_scores, smoothed
from hf_merge.scoring import scores_path
from hf_merge.search.leads import leads_of
from hf_merge.search.samplers.names import SAMPLERS
from hf_merge.search.study import Study

Run = Callable[..., MergeResult]


@pytest.fixture
def run(specialists: FamilyFolder, tmp_path: Path) -> Run:
    """A search over 160 rows a task, kept in a folder of its own."""

    def search(more: list[Objective] = [], *, smoothed: bool = False, **settings: object) -> MergeResult:  # noqa: B006
        objectives = [
            Objective(
                name=task.name,
                dataset=DatasetDict(
                    {split: specialists.dataset(task.name, split).select(range(160)) for split in ("search", "held_out")}
                ),
                labels=task.labels,
                smoothed=smoothed,
            )
            for task in specialists.family.tasks
        ]
        usual = {"trials": 9, "seed": 3, "folder": tmp_path / "run", "progress": False}
        return auto_merge(specialists.base, list(specialists.models.values()), [*objectives, *more], **usual | settings)  # type: ignore[arg-type]

    return search


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_searches_the_trio(run: Run, sampler: str) -> None:
    if sampler == "mmmo":
        pytest.importorskip("botorch")
    result = run(sampler=sampler, trials=12)
    assert result.search.evaluated == 12
    assert len({trial.recipe.digest for trial in result.trials}) == 12
    assert not any(trial.error for trial in result.trials)
    assert len(result.front) >= 3


def test_the_front_keeps_a_constraint_that_is_broken_off_it(run: Run) -> None:
    result = run(trials=16, constraints={"spam": ">= best parent - 0.05"})
    least = max(parent.scores["spam"].value for parent in result.parents) - 0.05
    assert result.front
    assert all(trial.scores["spam"].value >= least - 1e-9 for trial in result.front)
    assert any(trial.scores["spam"].value < least for trial in result.trials)


def test_racing_sees_fewer_rows_and_keeps_what_it_stopped_off_the_front(run: Run) -> None:
    result = run(trials=30, racing=True, sampler="random")
    stopped = [trial for trial in result.trials if trial.stopped]
    assert stopped
    assert all(min(score.examples for score in trial.scores.values()) < 160 for trial in stopped)
    assert not {trial.number for trial in stopped} & {trial.number for trial in result.front}
    assert all(score.examples == 160 for trial in result.front for score in trial.scores.values())
    first = {trial.number for trial in (*result.parents, *result.others)}
    assert not first & {trial.number for trial in stopped}


def test_a_search_over_smoothed_rows_learns_from_margins_races_by_them_and_reports_plain_accuracies(
    run: Run, tmp_path: Path
) -> None:
    result = run(trials=32, smoothed=True, racing=True, sampler="map")
    stored = Study.load(tmp_path / "run" / "study.log").optuna.trials
    assert any(trial.stopped for trial in result.trials)
    assert all(margins is not None and margins.shape == (32, 160) for margins in (leads_of(stored, i) for i in range(3)))
    for trial in result.front:
        kept = load_scores(scores_path(tmp_path / "run", "search", trial.recipe.digest))
        for name, score in trial.held_out.items():
            assert score.value * 160 == pytest.approx(round(score.value * 160))
            assert trial.scores[name].value == pytest.approx(smoothed(kept[name].margins).mean(), abs=1e-6)
    assert result.optimism().empty


def test_map_searches_a_distance_in_the_thousands_beside_accuracies(run: Run) -> None:
    result = run([Objective(name="change", task="none", metric="delta_norm")], sampler="map", trials=23)
    assert max(trial.scores["change"].value for trial in result.trials) > 1000
    assert len({trial.recipe.digest for trial in result.trials if not trial.error}) == 23


def test_weights_may_differ_between_groups_of_layers(run: Run) -> None:
    result = run(layer_groups=2, methods=["task_arithmetic"])
    assert any(not trial.recipe.constant for trial in result.trials)


def test_more_groups_than_layers_are_refused(run: Run) -> None:
    with pytest.raises(RecipeError, match="layer_groups=5 is more than the 2 layers"):
        run(layer_groups=5)


def test_the_distance_from_the_base_is_an_objective(run: Run) -> None:
    result = run([Objective(name="change", task="none", metric="delta_norm")])
    by_label = {trial.label: trial.scores["change"].value for trial in (*result.parents, *result.others)}
    assert result.front.directions["change"] == "minimize"
    assert by_label["base"] == 0
    assert 0 < by_label["uniform average"] < max(by_label[parent.label] for parent in result.parents)
