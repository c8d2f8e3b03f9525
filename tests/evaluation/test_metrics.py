import math
import pickle
from decimal import Decimal

import evaluate
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, ndcg_score

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.code import PassAtK
from hf_merge.evaluation.metrics import texts
from hf_merge.evaluation.metrics.classes import F1, Accuracy, Matthews, NormalizedAccuracy
from hf_merge.evaluation.metrics.ranking import NDCG, Pearson, Recall, Spearman
from hf_merge.evaluation.metrics.table import METRICS
from hf_merge.evaluation.metrics.texts import ChrF, ExactMatch, NumberMatch, Rouge, last_number
from hf_merge.evaluation.metrics.tokens import EntityF1, Perplexity, TagAccuracy, TokenAccuracy, entities

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
    NormalizedAccuracy: ([1, 0], [1, 1]),
    NumberMatch: (["a 3", "b"], ["3", "4"]),
    Rouge: (["a b c", "d"], ["a c", "e"]),
    TagAccuracy: ([["O", "B-x"], ["O"]], [["B-x", "B-x"], ["O"]]),
    EntityF1: ([["O", "B-x"], ["O"]], [["B-x", "I-x"], ["O"]]),
    Pearson: ([0.1, 0.5, 0.3], [1.0, 2.0, 5.0]),
    Spearman: ([0.1, 0.5, 0.3], [1.0, 2.0, 5.0]),
    Recall: ([["a", "b"], ["c"]], [["b", "d"], ["d"]]),
    NDCG: ([["a", "b"], ["c"]], [["b", "d"], ["d"]]),
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
    assert set(METRICS.values()) - {PassAtK} == set(OURS)  # which has rows of another kind, and tests of its own


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
    monkeypatch.setattr(texts, "_SACREBLEU", None)
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("first 3, then 4", "4"),
        ("it costs $1,234.50.", "1234.5"),
        ("x = -7", "-7"),
        ("10-5", "5"),
        ("about .5", "0.5"),
        ("2.", "2"),
        ("007", "7"),
        ("12,34", "34"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text_is_found(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_number_match_compares_the_last_numbers():
    predictions = ["3 and 4", "4.0", "four", "5"]
    assert score(NumberMatch, predictions, ["x 4", "4", "4", "4"]) == 0.5


def test_a_target_without_a_number_is_refused():
    with pytest.raises(EvaluationError, match="needs a number in every target, and 'four' has none"):
        score(NumberMatch, ["4"], ["four"])


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_is_the_mean_of_rouge_scores_f_measures(kind, use_stemmer):
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=use_stemmer)
    expected = [scorer.score(target=b, prediction=a)[kind].fmeasure for a, b in zip(*TEXTS, strict=True)]
    assert score(Rouge, *TEXTS, kind=kind, use_stemmer=use_stemmer) == pytest.approx(np.mean(expected))


def test_a_kind_of_rouge_that_does_not_exist_is_refused():
    with pytest.raises(EvaluationError, match="Did you mean 'rougeL'"):
        score(Rouge, *TEXTS, kind="rouge-l")


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(texts, "_ROUGE", None)
    with pytest.raises(EvaluationError, match=r"pip install 'hf_merge\[rouge\]'"):
        score(Rouge, *TEXTS)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-x I-x O B-y", [("x", 0, 2), ("y", 3, 4)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("I-x I-x", [("x", 0, 2)]),
        ("O I-x I-y", [("x", 1, 2), ("y", 2, 3)]),
        ("B-x I-y I-y", [("x", 0, 1), ("y", 1, 3)]),
        ("B-x I-x E-x I-x", [("x", 0, 3), ("x", 3, 4)]),
        ("S-x I-x", [("x", 0, 1), ("x", 1, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_entities_are_read_as_the_conll_evaluation_reads_them(tags, expected):
    assert entities(tags.split()) == set(expected)


def test_f1_of_entities_counts_them_over_all_rows():
    predictions = [["B-x", "I-x", "O"], ["B-y"], ["O"], ["B-x", "O"]]
    references = [["B-x", "I-x", "O"], ["B-x"], ["O"], ["B-x", "I-x"]]
    assert score(EntityF1, predictions, references) == pytest.approx(2 * 1 / (3 + 3))
    module = EntityF1()
    assert module.outcomes(module.statistics(predictions, references)).tolist() == [1, 0, 1, 0]


def test_no_entities_anywhere_is_zero_as_it_is_for_seqeval():
    assert score(EntityF1, [["O"]], [["O"]]) == 0


def test_tags_without_entities_are_refused_with_the_metric_to_take():
    with pytest.raises(EvaluationError, match="'NOUN' is none: take the metric tag_accuracy"):
        score(EntityF1, [["NOUN"]], [["O"]])


def test_tag_accuracy_is_taken_over_words_and_not_over_rows():
    assert score(TagAccuracy, [["a", "b", "c"], ["d"]], [["a", "x", "y"], ["d"]]) == 0.5


PAIRS = np.random.default_rng(0).normal(size=50), np.random.default_rng(1).integers(0, 6, 50).astype(float)


@pytest.mark.parametrize(("metric", "reference"), [(Pearson, pearsonr), (Spearman, spearmanr)])
def test_correlations_equal_scipys(metric, reference):
    assert score(metric, *PAIRS) == pytest.approx(reference(*PAIRS).statistic)


@pytest.mark.parametrize("metric", [Pearson, Spearman])
def test_the_outcomes_of_a_correlation_average_to_it(metric):
    module = metric()
    assert module.outcomes(module.statistics(*PAIRS)).mean() == pytest.approx(score(metric, *PAIRS))


@pytest.mark.parametrize("metric", [Pearson, Spearman])
def test_a_correlation_with_a_constant_is_zero(metric):
    assert score(metric, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_equals_scikit_learns(k):
    rng = np.random.default_rng(0)
    documents = [str(i) for i in range(12)]
    ranked = [rng.permutation(documents).tolist() for _ in range(20)]
    relevant = [rng.choice(documents, rng.integers(1, 6), replace=False).tolist() for _ in range(20)]
    truth = [[float(d in wanted) for d in documents] for wanted in relevant]
    scores = [[-found.index(d) for d in documents] for found in ranked]
    assert score(NDCG, ranked, relevant, k=k) == pytest.approx(ndcg_score(truth, scores, k=k))


def test_recall_is_the_share_of_relevant_documents_among_the_first_k():
    assert score(Recall, [["a", "b", "c"], ["d"]], [["a", "c"], ["a"]], k=2) == 0.25


@pytest.mark.parametrize("k", [0, 101, 1.5])
def test_a_depth_that_a_ranking_does_not_have_is_refused(k):
    with pytest.raises(EvaluationError, match="`k` counts documents, from 1 to 100"):
        score(NDCG, [["a"]], [["a"]], k=k)
