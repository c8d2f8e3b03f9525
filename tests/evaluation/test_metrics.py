import math
import pickle

import evaluate
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_merge.errors import EvaluationError
from hf_merge.evaluation import metrics
from hf_merge.evaluation.metrics import F1, METRICS, Accuracy, ChrF, ExactMatch, Matthews, Perplexity, TokenAccuracy

CASES = {
    "two classes": ([0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]),
    "five classes": (np.random.default_rng(0).integers(0, 5, 200), np.random.default_rng(1).integers(0, 5, 200)),
    "numbers with gaps": ([0, 7, 7, 2], [7, 7, 2, 2]),
    "one class predicted": ([1, 1, 1, 1], [0, 1, 2, 1]),
    "all wrong": ([1, 0, 1], [0, 1, 0]),
    "perfect": ([3, 1, 2], [3, 1, 2]),
}
classes = pytest.mark.parametrize(("predictions", "references"), CASES.values(), ids=CASES)
OURS = {
    Accuracy: ([1, 0], [1, 1]),
    F1: ([1, 0], [1, 1]),
    Matthews: ([1, 0], [1, 1]),
    ExactMatch: (["a", "b"], ["a", "c"]),
    ChrF: (["abc", "de"], ["abd", "de"]),
    Perplexity: ([2.0, 3.0], [2, 1]),
    TokenAccuracy: ([1, 1], [2, 1]),
}
every = pytest.mark.parametrize(("metric", "rows"), OURS.items(), ids=lambda value: getattr(value, "__name__", ""))


def score(metric, predictions, references, **arguments):
    result = metric().compute(predictions=predictions, references=references, **arguments)
    assert list(result) == [metric.key]
    assert type(result[metric.key]) is float
    return result[metric.key]


@every
def test_ours_are_true_evaluate_metrics_that_can_be_pickled(metric, rows):
    assert isinstance(metric(), evaluate.Metric)
    copy = pickle.loads(pickle.dumps(metric()))
    assert copy.compute(predictions=rows[0], references=rows[1]) == {metric.key: score(metric, *rows)}


def test_every_metric_of_the_table_is_tried_here():
    assert set(METRICS.values()) == set(OURS)


@every
def test_they_gather_batches_as_every_evaluate_metric_does(metric, rows):
    module = metric()
    for prediction, reference in zip(*rows, strict=True):
        module.add_batch(predictions=[prediction], references=[reference])
    assert module.compute() == {metric.key: score(metric, *rows)}


@every
def test_they_keep_everything_in_memory(metric, rows):
    assert metric().keep_in_memory


@every
def test_an_argument_that_a_metric_does_not_take_is_refused(metric, rows):
    with pytest.raises(EvaluationError, match=r"Unknown metric argument of .* 'nonsense'"):
        score(metric, *rows, nonsense=1)


@every
def test_a_value_is_a_function_of_sums_over_the_rows(metric, rows):
    module = metric()
    doubled = module.statistics(rows[0] * 2, rows[1] * 2)
    once = module.statistics(*rows)
    assert module.value(doubled.sum(0, keepdims=True)) == pytest.approx(module.value(2 * once.sum(0, keepdims=True)))
    assert score(metric, *rows) == pytest.approx(module.value(once.sum(0, keepdims=True))[0])


@classes
def test_accuracy_equals_scikit_learns(predictions, references):
    assert score(Accuracy, predictions, references) == pytest.approx(accuracy_score(references, predictions))


@classes
@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
def test_f1_equals_scikit_learns(predictions, references, average):
    expected = f1_score(references, predictions, average=average, zero_division=0)
    assert score(F1, predictions, references, average=average) == pytest.approx(expected)


@pytest.mark.parametrize("pos_label", [0, 1])
def test_binary_f1_equals_scikit_learns(pos_label):
    predictions, references = CASES["two classes"]
    expected = f1_score(references, predictions, average="binary", pos_label=pos_label)
    assert score(F1, predictions, references, average="binary", pos_label=pos_label) == pytest.approx(expected)


def test_binary_f1_of_a_class_that_never_occurs_is_zero():
    assert score(F1, [0, 0], [0, 0], average="binary", pos_label=4) == 0


def test_an_average_that_does_not_exist_is_refused():
    with pytest.raises(EvaluationError, match="Did you mean 'macro'"):
        score(F1, [0], [0], average="makro")


@classes
def test_matthews_equals_scikit_learns(predictions, references):
    assert score(Matthews, predictions, references) == pytest.approx(matthews_corrcoef(references, predictions))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, 0.25), ({"ignore_case": True}, 0.5), ({"ignore_case": True, "ignore_punctuation": True}, 0.75)],
)
def test_exact_match_strips_and_loosens_as_told(arguments, expected):
    predictions, references = [" a b\n", "A", "c.", "d"], ["a b", "a", "c", "e"]
    assert score(ExactMatch, predictions, references, **arguments) == expected


TEXTS = ["the cat sat", "on a mat", "", "ab"], ["the cat sits", "on the mat", "so", "a b"]


@pytest.mark.parametrize("arguments", [{}, {"word_order": 2}, {"lowercase": True, "beta": 1}])
def test_chrf_equals_sacrebleus(arguments):
    expected = sacrebleu.metrics.CHRF(**arguments).corpus_score(TEXTS[0], [TEXTS[1]]).score
    assert score(ChrF, *TEXTS, **arguments) == pytest.approx(expected)


def test_the_outcomes_of_chrf_are_the_rows_own():
    expected = [sacrebleu.metrics.CHRF().corpus_score([a], [[b]]).score for a, b in zip(*TEXTS, strict=True)]
    module = ChrF()
    assert module.outcomes(module.statistics(*TEXTS)).tolist() == pytest.approx(expected)


def test_chrf_without_sacrebleu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(metrics, "_SACREBLEU", None)
    with pytest.raises(EvaluationError, match=r"pip install 'hf_merge\[chrf\]'"):
        score(ChrF, *TEXTS)


def test_perplexity_is_taken_over_tokens_and_not_over_rows():
    assert score(Perplexity, [8.0, 1.0], [4, 2]) == pytest.approx(math.exp(9 / 6))


def test_token_accuracy_is_taken_over_tokens_and_not_over_rows():
    assert score(TokenAccuracy, [1, 3], [10, 3]) == pytest.approx(4 / 13)


@pytest.mark.parametrize(
    ("metric", "rows", "expected"),
    [
        (Accuracy, ([1, 0, 2], [1, 1, 2]), [1, 0, 1]),
        (F1, ([1, 0, 2], [1, 1, 2]), [1, 0, 1]),
        (Matthews, ([1, 0, 2], [1, 1, 2]), [1, 0, 1]),
        (ExactMatch, (["a", "b"], ["a ", "c"]), [1, 0]),
        (Perplexity, ([8.0, 1.0], [4, 2]), [2, 0.5]),
        (TokenAccuracy, ([1, 3], [10, 3]), [0.1, 1]),
    ],
)
def test_outcomes_are_each_rows_own_result(metric, rows, expected):
    module = metric()
    assert module.outcomes(module.statistics(*rows)).tolist() == pytest.approx(expected)
