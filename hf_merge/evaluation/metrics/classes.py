"""Metrics of classes by their numbers."""

from typing import Any, ClassVar

import numpy as np

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.metrics.summed import Floats, Share, SummedMetric, Values, counted


class Accuracy(Share):
    """The share of rows whose class is right."""

    key, about = "accuracy", "Share of right classes; predictions and references are class numbers."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return counted(np.asarray(predictions) == np.asarray(references))


class NormalizedAccuracy(Accuracy):
    """The share of right choices where likelihoods are compared after a division by the choices' characters.

    The division is the runner's: this is accuracy by another name.
    """

    key, about = "normalized_accuracy", "Share of right choices by likelihood a character."


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
