from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.metrics.classes import Accuracy
from hf_merge.evaluation.metrics.table import METRICS
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.runners.probes import PROBES
from hf_merge.evaluation.runners.table import RUNNERS
from hf_merge.evaluation.tasks import LM_EVAL, NONE, TASKS

ROWS = Dataset.from_dict({"text": ["a"], "label": ["b"]})


def judge(predictions, references):
    return 0.0


def objective(**fields):
    return Objective(**{"name": "o", "dataset": ROWS, **fields})


@pytest.mark.parametrize(
    ("task", "metric"),
    [("text-classification", "accuracy"), ("language-modeling", "perplexity"), ("text-generation", "exact_match")],
)
def test_each_task_has_a_metric_of_its_own(task, metric):
    assert objective(task=task).metric == metric


def test_the_light_table_of_metrics_names_exactly_the_metrics_that_exist():
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS) | set(PROBES)


def test_every_task_with_data_has_a_runner():
    assert set(RUNNERS) | {NONE, LM_EVAL} == set(TASKS)


@pytest.mark.parametrize(
    ("fields", "direction"),
    [
        ({}, "maximize"),
        ({"task": "language-modeling"}, "minimize"),
        ({"task": "language-modeling", "metric": "token_accuracy"}, "maximize"),
        ({"metric": judge}, "maximize"),
        ({"task": "none", "dataset": None, "metric": "delta_norm"}, "minimize"),
        ({"metric": judge, "metric_key": "loss"}, "minimize"),
        ({"metric": judge, "direction": "minimize"}, "minimize"),
        ({"metric": "evaluate-metric/wer", "task": "text-generation", "trust_metric_code": True}, "minimize"),
    ],
)
def test_the_direction_is_the_metrics_own_unless_given(fields, direction):
    assert objective(**fields).direction == direction


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": " "}, "`name` is a non-empty text"),
        ({"task": "text-clasification"}, "Did you mean 'text-classification'?"),
        ({"direction": "up"}, "Unknown direction 'up'"),
        ({"dataset": ["a", "b"]}, "`dataset` is a Dataset, a DatasetDict, a Hub id or a path, got list"),
        ({"max_length": 0}, "`max_length` is a positive whole number or None, got 0"),
        ({"batch_size": True}, "`batch_size` is a positive whole number, got True"),
        ({"limit": 2.5}, "`limit` is a positive whole number or None"),
        ({"labels": ("a",)}, "at least two names"),
        ({"labels": ("a", "a")}, "each once"),
        ({"labels": "ab"}, "a list of names"),
        ({"labels": ("a", "b"), "task": "text-generation"}, "`labels` belongs to text-classification"),
        ({"prompt": "{text}"}, "`prompt` belongs to text-generation"),
        ({"corpus": ROWS}, "`corpus` belongs to text-retrieval"),
        ({"corpus": 3, "task": "text-retrieval"}, "`corpus` is a Dataset, a DatasetDict, a Hub id or a path, got int"),
        ({"pooling": "mean"}, "`pooling` belongs to sentence-similarity and text-retrieval"),
        ({"pooling": "man", "task": "text-retrieval"}, "Did you mean 'mean'?"),
        ({"smoothed": 1}, "`smoothed` is True or False, got 1"),
        ({"smoothed": True, "metric": "f1"}, "`smoothed` goes with the metric 'accuracy', got 'f1'"),
        ({"smoothed": True, "task": "language-modeling"}, "`smoothed` belongs to text-classification and image-classification"),
        ({"choices": None, "task": "multiple-choice"}, "`choices` is a column's name, got None"),
        ({"task": "sentence-similarity"}, "`input` is a pair of columns for sentence-similarity"),
        ({"input": ("a", "b", "c")}, "`input` is one column or a pair for text-classification"),
        ({"task": "none"}, "the task 'none' has no data: leave out dataset"),
        ({"task": "none", "dataset": None, "metric": "sise"}, "none is scored by size or delta_norm or latency"),
        ({"dataset": None}, "`dataset` is a Dataset, a DatasetDict, a Hub id or a path, got NoneType"),
        ({"prompt": "{text", "task": "text-generation"}, "`prompt` is not a template"),
        ({"prompt": "{}", "task": "text-generation"}, "'{text}'"),
        ({"input": ("a", "b"), "task": "language-modeling"}, "`input` is one column"),
        ({"input": ()}, "`input` is a column's name"),
        ({"target": 3}, "`target` is a column's name"),
        ({"metric": Accuracy}, "give an instance, Accuracy()"),
        ({"metric": 7}, "a name, a path, an evaluate module or a callable"),
        (
            {"metric": "perplexity"},
            "scores language-modeling; the task 'text-classification' is scored by accuracy",
        ),
        ({"metric": judge, "task": "language-modeling"}, "scored by perplexity or token_accuracy, got the metric 'judge'"),
        ({"metric": "./no/such.py"}, "metric script './no/such.py' does not exist"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'?"),
        ({"metric": "org/metric"}, "trust_metric_code=True"),
        ({"metric_arguments": ["average"]}, "`metric_arguments` maps names"),
        ({"split": "train"}, "a Dataset has no splits"),
        ({"held_out": "test"}, "a Dataset has no split 'test' to hold out"),
        ({"held_out": 1.0}, "strictly between 0 and 1"),
        ({"held_out": 1}, "a split's name, a Dataset or a share"),
        ({"dataset": "org/data", "split": "a", "held_out": "a"}, "never saw"),
        ({"revision": "main"}, "belong to a dataset that is loaded by name"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused_and_the_reason_said(fields, said):
    with pytest.raises(EvaluationError) as caught:
        objective(**fields)
    assert said in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(EvaluationError) as caught:
        objective(direction="up", limit=0, held_out=2.0)
    assert len(str(caught.value).splitlines()) == 3


def test_a_folder_in_the_working_directory_does_not_stand_for_a_metric_name(tmp_path, monkeypatch):
    (tmp_path / "bleu").mkdir()
    (tmp_path / "bleu" / "bleu.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="trust_metric_code=True"):
        objective(metric="bleu")


def test_it_prints_on_one_readable_line():
    shown = str(Objective(name="mood", dataset="org/mood", config="en", split="validation"))
    assert shown == "mood: maximize accuracy of text-classification on org/mood (en) [validation]"


def test_an_objective_without_data_prints_on_one_readable_line():
    assert str(Objective(name="parameters", task="none", metric="size")) == "parameters: minimize size"


def test_a_local_dataset_is_named_without_its_path(tmp_path):
    assert objective(dataset=tmp_path / "mood.csv").dataset_label == "mood.csv"


@pytest.mark.parametrize("dataset", [ROWS, DatasetDict({"train": ROWS})])
def test_a_dataset_in_memory_is_called_that(dataset):
    assert objective(dataset=dataset).dataset_label == "a dataset in memory"


@pytest.mark.parametrize(
    ("metric", "name"), [(judge, "judge"), (Accuracy(), "accuracy"), (Path("a/b/own.py"), "own"), ("f1", "f1")]
)
def test_a_metric_is_printed_by_its_name(metric, name, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "own.py").touch()
    monkeypatch.chdir(tmp_path)
    assert objective(metric=metric).metric_name == name
