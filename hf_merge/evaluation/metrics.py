"""The metrics shipped with hf_merge: each a true `evaluate.Metric` that needs no download."""

import re
import string
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_merge.errors import EvaluationError, unknown

Floats = NDArray[np.float64]
Values = Sequence[Any] | NDArray[Any]  # one entry a row
# An extra: everything else here works without it.
_SACREBLEU: Any = import_module("sacrebleu.metrics") if find_spec("sacrebleu") else None


class SummedMetric(evaluate.Metric):
    """A metric that is a function of sums over the rows, so that it can be bootstrapped without looking at the rows again.

    A subclass gives `statistics` and `value`; `compute(predictions=, references=)` then works as with every `evaluate` metric.
    """

    key: ClassVar[str]
    about: ClassVar[str]
    feature: ClassVar[str] = "int64"
    parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value(self.feature) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.about, citation="", inputs_description=self.about, features=datasets.Features(features)
        )

    def _compute(self, predictions: Values, references: Values, **arguments: Any) -> dict[str, float]:
        for name in arguments:
            if name not in self.parameters:
                raise EvaluationError(unknown(f"metric argument of {self.key}", name, self.parameters))
        rows = self.statistics(predictions, references, **arguments)
        return {self.key: float(self.value(rows.sum(0, keepdims=True), **arguments)[0])}

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        """What each row adds to the sums, `(n, k)`."""
        raise NotImplementedError

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        """The metric `(B,)` of sums `(B, k)`."""
        raise NotImplementedError

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        """Each row's own result `(n,)`."""
        return self.value(statistics, **arguments)


class _Share(SummedMetric):
    """sum of the first statistic / sum of the second."""

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        return sums[:, 0] / sums[:, 1]


class Accuracy(_Share):
    """The share of rows whose class is right."""

    key, about = "accuracy", "Share of right classes; predictions and references are class numbers."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return _counted(np.asarray(predictions) == np.asarray(references))


class _Confusion(SummedMetric):
    """Functions of three counts for each class: right, predicted, true. A row's outcome is 1 if it is right, else 0."""

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        predicted, true = np.asarray(predictions, dtype=np.int64), np.asarray(references, dtype=np.int64)
        each = np.eye(int(max(predicted.max(initial=0), true.max(initial=0))) + 1)
        return np.concatenate((each[predicted] * each[true], each[predicted], each[true]), axis=1)

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        right: Floats = np.split(statistics, 3, axis=1)[0].sum(1)
        return right


class F1(_Confusion):
    """F1 = 2 right / (predicted + true) of each class, averaged as scikit-learn's `f1_score` does.

    `average` is "macro" (over the classes that occur), "weighted", "micro", or "binary" (the class `pos_label`). A class
    that is neither predicted nor true has an F1 of 0.
    """

    key, about = "f1", "F1 of class numbers; average: macro (default), weighted, micro, or binary with pos_label."
    parameters = ("average", "pos_label")
    _averages: ClassVar = ("macro", "weighted", "micro", "binary")

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        average, pos_label = arguments.get("average", "macro"), arguments.get("pos_label", 1)
        right, predicted, true = np.split(sums, 3, axis=1)
        both = predicted + true
        each = 2 * right / np.where(both > 0, both, 1)
        if average == "macro":
            return each.sum(1) / (both > 0).sum(1)
        if average == "weighted":
            return (each * true).sum(1) / true.sum(1)
        if average == "micro":
            return 2 * right.sum(1) / both.sum(1)
        if average == "binary":
            return each[:, pos_label] if 0 <= pos_label < each.shape[1] else np.zeros(len(each))
        raise EvaluationError(unknown("average of f1", average, self._averages))


class Matthews(_Confusion):
    """Matthews' correlation of predicted and true classes, for any number of classes; 0 where it is undefined.

    The R_K statistic: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """

    key, about = "matthews_correlation", "Matthews' correlation coefficient of class numbers."

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        right, predicted, true = np.split(sums, 3, axis=1)
        rows = true.sum(1)
        covariance = right.sum(1) * rows - (predicted * true).sum(1)
        spread = (rows**2 - (predicted**2).sum(1)) * (rows**2 - (true**2).sum(1))
        return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


class ExactMatch(_Share):
    """The share of texts that equal the expected ones, whitespace at both ends aside.

    `ignore_case` and `ignore_punctuation` (ASCII) loosen the comparison.
    """

    key, feature, parameters = "exact_match", "string", ("ignore_case", "ignore_punctuation")
    about = "Share of texts that equal the reference once stripped; ignore_case, ignore_punctuation."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        pairs = zip(predictions, references, strict=True)
        return _counted([plain(given, **arguments) == plain(wanted, **arguments) for given, wanted in pairs])


class ChrF(SummedMetric):
    """Character n-gram F-score of a corpus, 0 to 100, by sacrebleu (Popović, "chrF", 2015); an outcome is a row's own chrF.

    Arguments are those of `sacrebleu.metrics.CHRF`: `char_order` 6, `word_order` 0 (2 for chrF++), `beta` 2, `lowercase`.
    """

    key, feature = "chrf", "string"
    parameters = ("char_order", "word_order", "beta", "lowercase", "whitespace", "eps_smoothing")
    about = "chrF of sacrebleu; char_order, word_order, beta, lowercase."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        counts = _sacrebleu_chrf(arguments)._extract_corpus_statistics(list(predictions), [list(references)])
        return np.asarray(counts, dtype=np.float64)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        score = _sacrebleu_chrf(arguments)._compute_f_score
        return np.array([score(row) for row in sums.tolist()])


class Perplexity(SummedMetric):
    """exp(total negative log-likelihood / total tokens), of tokens and not of rows; an outcome is a row's mean in nats.

    predictions are each row's summed negative log-likelihood in nats, references its number of predicted tokens.
    """

    key, feature = "perplexity", "float64"
    about = "exp(sum of predictions / sum of references): negative log-likelihoods of rows, and their numbers of tokens."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return _paired(predictions, references)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        with np.errstate(over="ignore"):
            return np.exp(sums[:, 0] / sums[:, 1])

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        return statistics[:, 0] / statistics[:, 1]


class TokenAccuracy(_Share):
    """The share of tokens that a causal model ranks first, of tokens and not of rows; an outcome is a row's own share.

    predictions are each row's number of right tokens, references its number of predicted tokens.
    """

    key, feature = "token_accuracy", "float64"
    about = "sum of predictions / sum of references: right tokens of rows, and their numbers of tokens."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return _paired(predictions, references)


METRICS: Mapping[str, type[SummedMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews": Matthews,
    "exact_match": ExactMatch,
    "chrf": ChrF,
    "perplexity": Perplexity,
    "token_accuracy": TokenAccuracy,
}


def _counted(right: ArrayLike) -> Floats:
    hits = np.asarray(right, dtype=np.float64)
    return np.stack((hits, np.ones_like(hits)), axis=1)


def _paired(predictions: Values, references: Values) -> Floats:
    return np.stack((np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)), axis=1)


def plain(value: Any, ignore_case: bool = False, ignore_punctuation: bool = False) -> Any:
    """A text as it is compared: without whitespace at its ends; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.casefold() if ignore_case else value
    return (re.sub(f"[{re.escape(string.punctuation)}]", "", text) if ignore_punctuation else text).strip()


def _sacrebleu_chrf(arguments: Mapping[str, Any]) -> Any:
    if _SACREBLEU is None:
        raise EvaluationError("The metric chrf needs sacrebleu: pip install 'hf_merge[chrf]'.")
    return _SACREBLEU.CHRF(**arguments)
