"""auto_merge on the real specialists: the whole walk, resuming after kill -9 and Ctrl-C, and bad input refused in time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, ModelCard
from tiny_models import WORDS, Maker
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_merge.auto import auto_merge, study_arguments
from hf_merge.demo.hub.server import LocalHub
from hf_merge.demo.specialists import FamilyFolder
from hf_merge.errors import CheckpointError, EvaluationError, HfMergeError, MergeError, PublishError, RecipeError
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.recipes.recipe import Recipe
from hf_merge.result import MergeResult

ROWS, TRIALS = 120, 9


def objectives_of(family: FamilyFolder, rows: int = ROWS) -> list[Objective]:
    def rows_of(task: str) -> DatasetDict:
        return DatasetDict({split: family.dataset(task, split).select(range(rows)) for split in ("search", "held_out")})

    return [Objective(name=task.name, dataset=rows_of(task.name), labels=task.labels) for task in family.family.tasks]


def run(family: FamilyFolder, folder: Path, **more: object) -> MergeResult:
    settings = {"trials": TRIALS, "seed": 3, "folder": folder, "progress": False} | more
    return auto_merge(family.base, list(family.models.values()), objectives_of(family), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(specialists: FamilyFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeResult, Path]:
    folder = tmp_path_factory.mktemp("run")
    return run(specialists, folder), folder


@pytest.fixture
def on_hub(specialists: FamilyFolder, hub: LocalHub) -> list[str]:
    folders = [specialists.base, *specialists.models.values()]
    for folder in folders:
        hub.seed(f"trio/{folder.name}", folder)
    hub.clear_requests()
    return [f"trio/{folder.name}" for folder in folders]


def test_the_front_beats_every_parent_and_the_uniform_average_on_held_out_data(finished: tuple[MergeResult, Path]) -> None:
    result, _ = finished
    assert len(result.front) >= 3
    assert result.search.evaluated == TRIALS
    assert [trial.label for trial in result.parents] == ["bert-tiny-sentiment", "bert-tiny-question", "bert-tiny-spam"]
    assert [trial.label for trial in result.others] == ["uniform average", "base"]
    for rival in (*result.parents, *result.others):
        alone = replace(result.front, trials=(rival,))
        assert result.front.hypervolume("held_out") > alone.hypervolume("held_out")


def test_search_and_held_out_scores_come_from_their_own_rows(finished: tuple[MergeResult, Path]) -> None:
    result, _ = finished
    for trial in result.front:
        for name in result.front.objectives:
            search, held_out = trial.scores[name], trial.held_out[name]
            assert search.outcomes is not None
            assert held_out.outcomes is not None
            assert not np.array_equal(search.outcomes, held_out.outcomes)
            assert search.value == pytest.approx(search.outcomes.mean())
            assert held_out.value == pytest.approx(held_out.outcomes.mean())
            assert held_out.replicates is not None
    assert all(not t.held_out for t in result.trials if t.number not in {f.number for f in result.front} and not t.label)


def test_the_same_call_again_evaluates_nothing(specialists: FamilyFolder, finished: tuple[MergeResult, Path]) -> None:
    result, folder = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.npz")}
    again = run(specialists, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.npz")} == before
    assert [t.number for t in again.front] == [t.number for t in result.front]
    assert again.front.reference == result.front.reference


def test_a_saved_result_loads_as_it_was(finished: tuple[MergeResult, Path], tmp_path: Path) -> None:
    result, _ = finished
    loaded = MergeResult.load(result.save(tmp_path / "copy"))
    assert repr(loaded) == repr(result)
    assert loaded.to_dict() == result.to_dict()
    assert loaded.to_pandas().equals(result.to_pandas())


def test_a_folder_without_a_result_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(HfMergeError, match=str(tmp_path)):
        MergeResult.load(tmp_path)


def test_a_notebook_sees_the_table_and_the_picture(finished: tuple[MergeResult, Path]) -> None:
    html = finished[0]._repr_html_()
    assert html.count("<tr>") == len(finished[0].front) + 0 or "<table" in html
    assert "data:image/png;base64," in html
    assert "held_out.sentiment" in html


def test_build_gives_the_model_whose_scores_were_reported(
    specialists: FamilyFolder, finished: tuple[MergeResult, Path]
) -> None:
    result, _ = finished
    trial = result.choose({"question": 1.0})
    model, tokenizer = result.build(trial)
    evaluator = Evaluator(objectives_of(specialists), tokenizer=tokenizer, config=model.config, progress=False)
    assert {n: s.value for n, s in evaluator.measure(model, "held_out").items()} == {
        n: s.value for n, s in trial.held_out.items()
    }


def test_a_published_point_scores_what_its_card_says(
    specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, tmp_path: Path
) -> None:
    objectives = objectives_of(specialists)
    result = auto_merge(
        on_hub[0], on_hub[1:], objectives, trials=TRIALS, folder=tmp_path / "run", push_to="demo/point", progress=False
    )
    chosen = result.choose()
    model = AutoModelForSequenceClassification.from_pretrained("demo/point")
    evaluator = Evaluator(
        objectives, tokenizer=AutoTokenizer.from_pretrained("demo/point"), config=model.config, progress=False
    )
    again = evaluator.measure(model, "held_out")
    card = ModelCard.load("demo/point")
    on_card = {entry.metric_name: entry.metric_value for entry in card.data.eval_results or []}
    assert on_card == {f"{name}: accuracy (held out)": round(score.value, 6) for name, score in again.items()}
    assert {name: score.value for name, score in again.items()} == {n: s.value for n, s in chosen.held_out.items()}
    assert set(card.data.base_model) == {ref.id for ref in chosen.recipe.inputs}
    files = set(HfApi().list_repo_files("demo/point"))
    assert {
        "README.md",
        "front.json",
        "front.png",
        "recipe.yaml",
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    } <= files


def test_a_whole_front_is_published_with_a_collection_that_leaves_the_parents_out(
    specialists: FamilyFolder, on_hub: list[str], tmp_path: Path
) -> None:
    result = auto_merge(on_hub[0], on_hub[1:], objectives_of(specialists), trials=6, folder=tmp_path / "run", progress=False)
    slug = result.push_front_to_hub("demo/front", progress=False)
    known = {trial.recipe.digest for trial in (*result.parents, *result.others)}
    merged = [trial for trial in result.front if trial.recipe.digest not in known]
    assert merged
    items = HfApi().get_collection(slug).items
    assert [item.item_id for item in items] == [f"demo/front-{trial.number}" for trial in merged]
    assert "held out: sentiment 0." in str(items[0].note)


INTERRUPTED = """
import json, sys
from pathlib import Path
from test_auto import objectives_of, run
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.specialists import build_family
result = run(build_family(CLASSIFIERS, progress=False), Path(sys.argv[1]), trials=14)
print(json.dumps([result.search.evaluated, len(result.front)]))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", INTERRUPTED, str(folder)]
    # A shell starts what it runs in the background with SIGINT ignored, and that would be inherited.
    attend = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=attend)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_search_that_was_killed_goes_on_and_evaluates_no_finished_trial_again(
    specialists: FamilyFolder, tmp_path: Path
) -> None:
    scores = tmp_path / "scores" / "search"
    first = start(tmp_path)
    wait_for(lambda: len(list(scores.glob("*.npz"))) >= 5, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = [json.loads(line) for line in (tmp_path / "study.log").read_text().splitlines() if line.endswith("}")]
    told = sum("values" in entry and entry.get("state") == 1 for entry in finished)
    before = {path.name: path.stat().st_mtime_ns for path in scores.glob("*.npz")}
    second = start(tmp_path)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0
    assert json.loads(output.splitlines()[-1])[0] == 14
    after = {path.name: path.stat().st_mtime_ns for path in scores.glob("*.npz")}
    again = [name for name in before if after[name] != before[name]]
    # At most the one that was measured but not yet stored when the kill came.
    assert len(again) <= 1
    assert len(before) - told <= 1
    assert len(after) == 14


def test_ctrl_c_returns_what_there_is(specialists: FamilyFolder, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: len(list((tmp_path / "scores" / "search").glob("*.npz"))) >= 6, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    evaluated, front = json.loads(output.splitlines()[-1])
    assert 5 <= evaluated < 14
    assert front >= 1
    assert MergeResult.load(tmp_path).search.evaluated == evaluated


def refused(
    error: type[HfMergeError],
    match: str,
    hub: LocalHub,
    base: object,
    models: list,
    objectives: list,
    folder: Path,
    **more: object,
) -> None:
    hub.clear_requests()
    with pytest.raises(error, match=match):
        auto_merge(base, models, objectives, trials=9, folder=folder, progress=False, **more)  # type: ignore[arg-type]
    assert not (folder / "study.log").exists()
    # Headers at most.
    assert hub.bytes_served("*.safetensors") <= 100_000 * (len(models) + 1)


def test_no_permission_to_write_is_told_before_the_search(
    specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, tmp_path: Path
) -> None:
    refused(
        PublishError,
        "somebody-else",
        hub,
        on_hub[0],
        on_hub[1:],
        objectives_of(specialists),
        tmp_path,
        push_to="somebody-else/m",
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input": "sentence"}, r"sentence.*text"),
        ({"target": "answer"}, r"answer.*label"),
        ({"split": "nowhere"}, "nowhere"),
        ({"labels": ("sentiment:good", "sentiment:bad")}, "sentiment:good"),
        ({"held_out": "search"}, "search"),
    ],
)
def test_a_wrong_objective_is_told_before_a_tensor_is_read(
    change: dict, match: str, specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, tmp_path: Path
) -> None:
    first, *rest = objectives_of(specialists)
    objectives = [replace(first, **change), *rest]
    refused(EvaluationError, match, hub, on_hub[0], on_hub[1:], objectives, tmp_path)


def test_an_unknown_metric_is_told_with_the_one_that_was_meant(specialists: FamilyFolder) -> None:
    with pytest.raises(EvaluationError, match=r"acuracy.*accuracy"):
        replace(objectives_of(specialists)[0], metric="acuracy")


def test_overlapping_search_and_held_out_rows_are_refused(
    specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, tmp_path: Path
) -> None:
    rows = specialists.dataset("spam", "search").select(range(50))
    leaking = DatasetDict(
        {
            "search": rows,
            "held_out": Dataset.from_list([*specialists.dataset("spam", "held_out").select(range(49)).to_list(), rows[0]]),
        }
    )
    objective = Objective(name="spam", dataset=leaking, labels=("spam:ham", "spam:spam"))
    refused(EvaluationError, "both", hub, on_hub[0], on_hub[1:], [objective], tmp_path)


def test_models_that_do_not_fit_are_refused_with_every_mismatch(
    specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, make: Maker, tmp_path: Path
) -> None:
    hub.seed("trio/llama", make("llama", 1)[0])
    hub.seed("trio/words", make("bert", 1, parent="w", words=[*WORDS[:-1], "other"])[0])
    refused(MergeError, "architecture", hub, on_hub[0], [on_hub[1], "trio/llama"], objectives_of(specialists), tmp_path)
    refused(MergeError, "vocabulary", hub, on_hub[0], [on_hub[1], "trio/words"], objectives_of(specialists), tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"methods": ["tise"]}, RecipeError, "ties"),
        ({"sampler": "nsga"}, RecipeError, "nsga2"),
        ({"ranges": {"density": (0.5, 2)}}, RecipeError, "density"),
        ({"dtype": "int4"}, RecipeError, "bfloat16"),
        ({"trials": 2}, RecipeError, "2"),
    ],
)
def test_wrong_settings_are_told_before_a_tensor_is_read(
    settings: dict,
    error: type[HfMergeError],
    match: str,
    specialists: FamilyFolder,
    on_hub: list[str],
    hub: LocalHub,
    tmp_path: Path,
) -> None:
    arguments = {"trials": 9, "folder": tmp_path / "run", "progress": False} | settings
    with pytest.raises(error, match=match):
        auto_merge(on_hub[0], on_hub[1:], objectives_of(specialists), **arguments)
    assert not (tmp_path / "run").exists()
    assert hub.bytes_served("*.safetensors") <= 100_000 * len(on_hub)


def test_a_model_that_is_not_there_is_named(
    specialists: FamilyFolder, on_hub: list[str], hub: LocalHub, tmp_path: Path
) -> None:
    refused(CheckpointError, "trio/nothing", hub, on_hub[0], ["trio/nothing"], objectives_of(specialists), tmp_path)


def test_a_folder_of_a_run_on_other_data_is_refused(specialists: FamilyFolder, finished: tuple[MergeResult, Path]) -> None:
    with pytest.raises(RecipeError, match="other data"):
        auto_merge(
            specialists.base,
            list(specialists.models.values()),
            objectives_of(specialists, ROWS - 1),
            folder=finished[1],
            progress=False,
        )


def test_a_study_file_gives_the_arguments_and_unknown_keys_are_errors() -> None:
    study = {
        "base": "org/base",
        "models": ["org/a"],
        "objectives": [{"name": "x", "dataset": "org/rows", "labels": ["a", "b"]}],
        "ranges": {"weight": [0, 2]},
        "trials": 7,
    }
    arguments = study_arguments(study)
    assert arguments["objectives"][0].labels == ("a", "b")
    assert arguments["ranges"] == {"weight": (0, 2)}
    for broken, match in [
        ({"trails": 7}, "trials"),
        ({"token": "x"}, "token"),
        ({"objectives": [{"name": "x", "dataset": "d", "metrics": "f1"}]}, "metric"),
        ({"objectives": [{"dataset": "d"}]}, "name"),
        ({"models": "org/a"}, "models"),
    ]:
        with pytest.raises(RecipeError, match=match):
            study_arguments(study | broken)


def test_parents_are_scored_as_they_are(specialists: FamilyFolder, finished: tuple[MergeResult, Path]) -> None:
    result, _ = finished
    for parent, folder in zip(result.parents, specialists.models.values(), strict=True):
        assert parent.recipe.digest == Recipe(method="linear", models=(str(folder),), seed=3).digest  # type: ignore[arg-type]
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        evaluator = Evaluator(
            objectives_of(specialists), tokenizer=AutoTokenizer.from_pretrained(folder), config=model.config, progress=False
        )
        assert {n: s.value for n, s in evaluator.measure(model).items()} == {n: s.value for n, s in parent.scores.items()}
