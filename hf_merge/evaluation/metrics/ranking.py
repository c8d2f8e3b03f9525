"""Metrics of embeddings: correlations of similarities, and what a ranking of documents finds."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.metrics.summed import Floats, Mean, SummedMetric, Values


class Pearson(SummedMetric):
    """Pearson's correlation; 0 where one side is constant. An outcome is the product of a row's two standardized values, so
    that their mean is the correlation."""

    key, feature, about = "pearson", datasets.Value("float64"), "Pearson's correlation of numbers."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        x, y = (_standardized(np.asarray(values, dtype=np.float64)) for values in (predictions, references))
        return np.stack((np.ones_like(x), x, y, x * x, y * y, x * y), axis=1)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        x, y, xx, yy, xy = (sums[:, 1:] / sums[:, :1]).T
        spread = (xx - x * x) * (yy - y * y)
        return np.where(spread > 1e-24, (xy - x * y) / np.sqrt(np.where(spread > 1e-24, spread, 1)), 0.0)

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        return statistics[:, 5]


class Spearman(Pearson):
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank.

    The bootstrap draws rows with the ranks that they have among all rows.
    """

    key, about = "spearman", "Spearman's rank correlation of numbers."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return super().statistics(_ranks(predictions), _ranks(references))


class Recall(Mean):
    """The mean share of a query's relevant documents that stand among its first `k` (10).

    predictions are lists of documents, nearest first; references lists of the relevant ones.
    """

    key, feature, parameters = "recall", datasets.List(datasets.Value("string")), ("k",)
    about = "Mean share of relevant documents among the first k (10)."

    def row(self, given: Sequence[str], wanted: Sequence[str], **arguments: Any) -> float:
        relevant = set(wanted)
        return len(relevant & set(given[: _depth(arguments)])) / len(relevant)


class NDCG(Recall):
    """The mean normalized discounted cumulative gain of the first `k` (10) documents, all relevant ones counting the same.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002, with 1/log2(1 + place).
    """

    key, about = "ndcg", "Mean nDCG of the first k (10) documents."

    def row(self, given: Sequence[str], wanted: Sequence[str], **arguments: Any) -> float:
        k, relevant = _depth(arguments), set(wanted)
        gains = 1 / np.log2(np.arange(2, k + 2))
        found = sum(gain for gain, document in zip(gains, given, strict=False) if document in relevant)
        return float(found / gains[: len(relevant)].sum())


def _depth(arguments: dict[str, Any]) -> int:
    k: int = arguments.get("k", 10)
    if not isinstance(k, int) or not 1 <= k <= 100:
        raise EvaluationError(f"`k` counts documents, from 1 to 100; got {k!r}.")
    return k


def _standardized(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1)


def _ranks(values: Values) -> Floats:
    _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    ranks: Floats = (ends - (count - 1) / 2)[place]
    return ranks
