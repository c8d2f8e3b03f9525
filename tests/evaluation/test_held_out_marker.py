"""What the search sees of held-out rows: nothing. And a search that looks at a test set says so.

Seen means: a model reads a row, or a number that the search stores or decides by depends on it. Before the search, held-out
rows are loaded, checked, tokenized and hashed into the data's fingerprint, which says only whether a resumed run has the same.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tiny_models import WORDS, Maker
from transformers import AutoConfig, AutoTokenizer

import hf_merge.wiring
from hf_merge.auto import auto_merge
from hf_merge.evaluation.lm_eval import Harness
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.named_test import searches_test_data
from hf_merge.evaluation.objective import Objective
from hf_merge.result import MergeResult

MARKER = "w92"
ROWS = 12


class Watch:
    """Sees every tensor of token ids that enters any module, and in which phase."""

    def __init__(self) -> None:
        self.searching, self.marked = True, {True: 0, False: 0}
        self.rows = {True: 0, False: 0}

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].ndim == 2:
            self.rows[self.searching] += len(inputs[0])
            self.marked[self.searching] += int((inputs[0] == WORDS.index(MARKER)).any(1).sum())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """The watch; its phase changes when the search returns."""
    found, search = Watch(), hf_merge.wiring.search

    def searched(*arguments: Any, **keywords: Any) -> Any:
        study = search(*arguments, **keywords)
        found.searching = False
        return study

    monkeypatch.setattr(hf_merge.wiring, "search", searched)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(found)
    yield found
    hook.remove()


def texts(seed: int, marker: str = "") -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join([*(f"w{i}" for i in rng.integers(0, 90, 6)), marker]).strip() for _ in range(ROWS)]


def splits(held_out: int = 1, marker: str = MARKER) -> DatasetDict:
    return DatasetDict(
        {
            "search": Dataset.from_dict({"text": texts(0), "label": texts(7)}),
            "held_out": Dataset.from_dict({"text": texts(held_out, marker), "label": texts(held_out + 20)}),
        }
    )


def objectives(data: DatasetDict) -> list[Objective]:
    return [
        Objective(name="perplexity", dataset=data, task="language-modeling"),
        Objective(name="generation", dataset=data, task="text-generation", max_new_tokens=2, metric=shared_words),
    ]


def shared_words(predictions: list[str], references: list[str]) -> float:
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([len(set(a.split()) & set(b.split())) for a, b in pairs]))


def run(make: Maker, folder: Path, chosen: list[Objective]) -> MergeResult:
    base, *models = make("llama", 3)
    return auto_merge(base, models, chosen, trials=8, seed=1, folder=folder, progress=False)


def test_no_model_reads_a_held_out_row_before_the_search_has_ended(make: Maker, tmp_path: Path, watch: Watch) -> None:
    result = run(make, tmp_path / "run", objectives(splits()))
    assert result.search.evaluated == 8
    assert watch.rows[True] >= 8 * ROWS
    assert watch.marked[True] == 0
    assert watch.marked[False] >= len(result.front) * ROWS  # the watch does see them


def test_a_share_set_aside_is_not_read_before_the_search_has_ended(make: Maker, tmp_path: Path, watch: Watch) -> None:
    plain = [Objective(name="perplexity", dataset=splits()["search"], task="language-modeling")]
    (base,) = make("llama", 1)
    reader = {"config": AutoConfig.from_pretrained(base), "tokenizer": AutoTokenizer.from_pretrained(base)}
    aside = Evaluator(plain, **reader)._prepared[0].parts["held_out"]
    hidden = {tuple(row.tolist()) for row in aside.runner.items.ids}  # type: ignore[attr-defined]
    seen: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs[0].ndim == 2:
            seen[watch.searching] |= {tuple(row) for row in inputs[0].tolist()}

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    run(make, tmp_path / "run", plain)
    hook.remove()
    assert len(hidden) > 2
    assert not hidden & seen[True]
    assert hidden <= seen[False]


def test_a_search_stores_the_same_numbers_whatever_the_held_out_rows_are(make: Maker, tmp_path: Path) -> None:
    stored = []
    for held_out, marker in ((1, MARKER), (50, "w91 w91 w91")):
        folder = tmp_path / f"run{held_out}"
        run(make, folder, objectives(splits(held_out, marker)))
        storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
        study = optuna.load_study(study_name="hf_merge", storage=storage)
        kept = {name: value for name, value in study.user_attrs.items() if name != "settings"}
        settings = dict(study.user_attrs["settings"])
        settings["fingerprint"] = [[name, value] for name, value in settings["fingerprint"] if name != "data"]
        trials = [(t.params, t.values, without_seconds(t.user_attrs), t.state) for t in study.get_trials()]
        stored.append((trials, kept, settings))
    assert len(stored[0][0]) >= 8
    assert stored[0] == stored[1]


def test_held_out_scores_do_depend_on_the_held_out_rows(make: Maker, tmp_path: Path) -> None:
    one = run(make, tmp_path / "one", objectives(splits(1, MARKER)))
    other = run(make, tmp_path / "other", objectives(splits(50, "w91 w91 w91")))
    assert [t.recipe.digest for t in one.front] == [t.recipe.digest for t in other.front]
    assert one.front[0].held_out["perplexity"].value != other.front[0].held_out["perplexity"].value


def test_no_model_reads_a_held_out_row_of_the_harness_before_the_search_has_ended(
    make: Maker, tmp_path: Path, watch: Watch
) -> None:
    pytest.importorskip("lm_eval")
    files = {}
    for name, marker in (("validation", ""), ("test", MARKER)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        rows = [{"text": text, "label": "w3"} for text in texts(len(name), marker)]
        Path(files[name]).write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "loglikelihood",
        "test_split": "test",
        "fewshot_split": "test",
        "validation_split": "validation",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{label}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(task))
    chosen = Objective.from_lm_eval(path, metric="perplexity", split="validation", held_out="test")
    run(make, tmp_path / "run", [chosen])
    assert watch.rows[True] >= 8 * ROWS
    assert watch.marked[True] == 0
    assert watch.marked[False] >= ROWS


# a search on a test set


@pytest.mark.parametrize(
    ("settings", "tested"),
    [
        ({"dataset": "sst2", "split": "test"}, True),
        ({"dataset": "sst2", "split": "50% of test"}, True),
        ({"dataset": "sst2", "split": "test_matched"}, True),
        ({"dataset": "sst2", "split": "testset"}, True),
        ({"dataset": "sst2", "split": "train", "config": "clean.Test"}, True),
        ({"dataset": "data/my-test.jsonl", "split": "train"}, True),
        ({"dataset": "sst2", "split": "validation"}, False),
        ({"dataset": "sst2", "split": "latest"}, False),
        ({"dataset": "sst2", "split": "contest"}, False),
        ({"dataset": "data/test", "split": "train"}, False),
        ({"dataset": "data/contests.jsonl", "split": "train"}, False),
    ],
)
def test_a_test_set_is_known_by_its_name(settings: dict[str, Any], tested: bool) -> None:
    objective = Objective(name="a", **settings)
    assert searches_test_data(objective, settings["split"]) is tested


@pytest.mark.parametrize(("search", "warned"), [("test", 1), ("validation", 0)])
def test_a_search_on_a_test_set_warns_once(
    make: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture, search: str, warned: int
) -> None:
    data = DatasetDict({search: splits()["search"], "train": splits()["held_out"]})
    chosen = Objective(name="perplexity", dataset=data, task="language-modeling", split=search, held_out="train")
    with caplog.at_level(logging.WARNING, "hf_merge"):
        result = run(make, tmp_path / "run", [chosen])
    assert sum("the search looks at test data" in record.message for record in caplog.records) == warned
    assert result.objectives[0]["searched_on_test"] is bool(warned)


def test_half_a_test_set_of_the_harness_is_a_test_set(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(0)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "w3",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task))
    objective = Objective.from_lm_eval(tmp_path / "local.yaml")
    assert searches_test_data(objective, Harness(objective).rows["search"].label)


def without_seconds(value: Any) -> Any:
    """A stored attribute without what a clock measured."""
    if isinstance(value, dict):
        return {name: without_seconds(inner) for name, inner in value.items() if name != "seconds"}
    return value
