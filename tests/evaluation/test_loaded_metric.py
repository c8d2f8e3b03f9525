import functools
import logging

import evaluate
import numpy as np
import pytest
from datasets import Dataset

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.loaded_metric import MOST_RECOMPUTED, load_metric
from hf_merge.evaluation.metrics.classes import F1, Accuracy
from hf_merge.evaluation.metrics.table import METRICS
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.tasks import TASKS

SCRIPT = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, offset=0.0):
        share = sum(a == b for a, b in zip(predictions, references)) / len(references)
        return {"share": share + offset, "rows": len(references)}
"""
PREDICTIONS, REFERENCES = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
TEXTS = (["a", "bc", "d", "e f"], ["a", "bd", "d", "e g"])
SUMS = (np.array([3.0, 5.0, 1.0, 2.0]), np.array([4.0, 6.0, 1.0, 5.0]))
TAGS = ([["O", "B-x"], ["B-x", "I-x"], ["O"], ["B-y"]], [["O", "B-x"], ["B-x", "O"], ["B-x"], ["B-y"]])
NUMBERS = (np.array([0.1, 0.7, 0.5, 0.2]), np.array([1.0, 2.0, 5.0, 0.5]))
RANKED = ([["a", "b"], ["c"], ["b", "a"], ["d"]], [["a"], ["a", "b"], ["a"], ["c"]])
AMOUNTS = (["so 3", "no", "4.0", "5"], ["3", "2", "4", "6"])
ROWS = {
    "class": (PREDICTIONS, REFERENCES),
    "choice": (PREDICTIONS, REFERENCES),
    "text": TEXTS,
    "tags": TAGS,
    "number": NUMBERS,
    "documents": RANKED,
    None: SUMS,
}
TASK = {name: task for task in reversed(TASKS) for name in TASKS[task].metrics}


def share(predictions, references):
    return float((predictions == references).mean())


def loaded(metric, **fields):
    task = TASK.get(metric, "text-classification") if isinstance(metric, str) else "text-classification"
    if TASKS[task].columns == (2, 2):
        fields["input"] = ("text", "label")
    rows = Dataset.from_dict({"text": ["a"], "label": [0]})
    return load_metric(Objective(name="o", dataset=rows, task=task, metric=metric, **fields))


def measured(metric, predictions=PREDICTIONS, references=REFERENCES, replicates=0, seed=(0,), **fields):
    return loaded(metric, **fields).measure(predictions, references, replicates=replicates, seed=seed)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "share" / "share.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def test_a_metric_may_be_a_name_an_instance_or_a_callable():
    assert [measured(metric).value for metric in ("accuracy", Accuracy(), share)] == [0.75, 0.75, 0.75]


@pytest.mark.parametrize("form", ["file", "folder", "text"])
def test_a_metric_may_be_a_script_on_disk(form, script):
    metric = {"file": script, "folder": script.parent, "text": str(script)}[form]
    assert measured(metric, metric_key="rows").value == 4


def test_arguments_reach_the_metric(script):
    assert measured(script, metric_key="share", metric_arguments={"offset": 0.5}).value == 1.25


def test_metrics_can_be_combined():
    combined = evaluate.combine({"right": Accuracy(), "f": F1()}, force_prefix=True)
    assert measured(combined, metric_key="right_accuracy").value == 0.75


def test_several_numbers_without_a_key_are_refused_with_the_keys():
    with pytest.raises(EvaluationError, match="gives several numbers: say which as metric_key: a, b"):
        measured(lambda predictions, references: {"a": 1, "b": 2})


def test_of_several_numbers_the_one_with_the_metrics_name_is_meant(script):
    assert measured(script).value == 0.75


def test_a_key_that_does_not_exist_is_refused(script):
    with pytest.raises(EvaluationError, match=r"Unknown metric_key of share 'shares'. Did you mean 'share'"):
        measured(script, metric_key="shares")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(EvaluationError, match="expected a finite number"):
        measured(lambda predictions, references: value)


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.array(0.5), {"x": np.array([0.5])[0]}])
def test_every_kind_of_number_becomes_a_float(value):
    assert type(measured(lambda predictions, references: value).value) is float


def test_a_result_that_is_no_number_is_refused():
    with pytest.raises(EvaluationError, match=r"gave list .* expected a number"):
        measured(lambda predictions, references: [0.1, 0.2])


def test_an_error_of_the_metrics_code_is_told_with_the_metrics_name():
    def broken(predictions, references):
        raise KeyError("inside")

    with pytest.raises(EvaluationError, match=r"The metric broken failed: KeyError: 'inside'"):
        measured(broken)


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"spearman", "pass_at_k"}))
def test_replicates_of_ours_equal_the_metric_on_resampled_rows(name):
    rows = AMOUNTS if name == "number_match" else ROWS[TASKS[TASK[name]].target]
    metric = loaded(name)
    found = metric.measure(*rows, replicates=5, seed=(7,)).replicates
    drawn = np.random.default_rng((7,)).integers(0, 4, size=(5, 4))
    expected = [metric.value([rows[0][i] for i in draw], [rows[1][i] for i in draw]) for draw in drawn]
    assert found.tolist() == pytest.approx(expected)


def test_replicates_of_a_metric_that_is_not_ours_draw_the_same_rows():
    ours, callables = (measured(metric, replicates=20, seed=(3,)).replicates for metric in ("accuracy", share))
    assert ours.tolist() == pytest.approx(callables.tolist())


def test_fewer_replicates_are_the_first_of_many():
    few, many = (measured("accuracy", replicates=count).replicates for count in (5, 300))
    assert few.tolist() == many[:5].tolist()


def test_a_metric_that_is_not_ours_is_recomputed_only_so_often():
    assert len(measured(share, replicates=10_000).replicates) == MOST_RECOMPUTED


def test_without_replicates_there_are_none():
    assert measured("accuracy").replicates is None
    assert measured(share).replicates is None


def test_a_metric_that_fails_on_some_resample_keeps_its_score_and_says_that_there_is_no_bootstrap(caplog):
    def needs_three_classes(predictions, references):
        return 0.5 if len(set(references)) == 3 else float("nan")

    with caplog.at_level(logging.WARNING):
        score = measured(needs_three_classes, replicates=50)
    assert (score.value, score.replicates) == (0.5, None)
    assert "No bootstrap of needs_three_classes" in caplog.text


def test_the_outcomes_of_a_metric_that_is_not_ours_say_which_rows_are_right():
    assert measured(share).outcomes.tolist() == [1, 1, 0, 1]
    assert measured(lambda predictions, references: 1.0, ["a ", "b"], ["a", "c"]).outcomes.tolist() == [1, 0]


def test_the_implementation_that_runs_is_named(script):
    assert loaded("f1").implementation == "hf_merge f1"
    assert loaded(script).implementation == "evaluate module from the local script share.py"
    assert loaded(Accuracy()).implementation == "evaluate module hf_merge.evaluation.metrics.classes.Accuracy"
    assert loaded(share).implementation.endswith("test_loaded_metric.share")


def test_an_identity_changes_with_the_code_and_only_with_it(script, tmp_path):
    moved = tmp_path / "elsewhere" / "share.py"
    moved.parent.mkdir()
    moved.write_text(SCRIPT)
    changed = tmp_path / "changed" / "share.py"
    changed.parent.mkdir()
    changed.write_text(SCRIPT.replace("share + offset", "share - offset"))
    assert loaded(script).identity == loaded(moved).identity != loaded(changed).identity


def test_the_identity_of_a_partial_does_not_hold_an_address():
    assert loaded(functools.partial(share)).identity == loaded(functools.partial(share)).identity


def test_a_script_that_does_not_run_is_refused(script):
    script.write_text("import evaluate\nraise RuntimeError('broken')\n")
    with pytest.raises(EvaluationError, match=r"could not be loaded from the script .*RuntimeError: broken"):
        loaded(script)


def test_a_metric_that_cannot_be_fetched_offline_is_told_so(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"'rouge_like' could not be loaded from .*evaluate-metric/rouge_like: .*offline"):
        loaded("rouge_like", trust_metric_code=True)


def test_a_metric_that_the_hub_does_not_have_is_told_so(hub):
    with pytest.raises(EvaluationError, match="the Hub has no such metric or cannot be reached"):
        loaded("no-org/no-metric", trust_metric_code=True)


def test_offline_for_the_hub_means_offline_for_evaluate(monkeypatch):
    monkeypatch.setattr("hf_merge.evaluation.loaded_metric.is_offline_mode", lambda: True)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    with pytest.raises(EvaluationError, match="set to work offline"):
        loaded("no-org/no-metric", trust_metric_code=True)


def test_a_metric_from_the_hub_runs_when_its_code_is_trusted(hub):
    hub.seed("demo/share", {"share.py": SCRIPT.encode()}, repo_type="space")
    metric = loaded("demo/share", trust_metric_code=True)
    assert metric.value(PREDICTIONS, REFERENCES) == 0.75
    assert metric.implementation == "evaluate module demo/share from the Hub"
