"""What hf_merge's own metrics share: a metric is a function of sums over the rows."""

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_merge.errors import EvaluationError, unknown

Floats = NDArray[np.float64]
Values = Sequence[Any] | NDArray[Any]  # one entry a row


class SummedMetric(evaluate.Metric):
    """A metric that is a function of sums over the rows, so that it can be bootstrapped without looking at the rows again.

    A subclass gives `statistics` and `value`; `compute(predictions=, references=)` then works as with every `evaluate` metric.
    """

    key: ClassVar[str]
    about: ClassVar[str]
    feature: ClassVar[Any] = datasets.Value("int64")
    parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        features = dict.fromkeys(("predictions", "references"), self.feature)
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


class Share(SummedMetric):
    """sum of the first statistic / sum of the second."""

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        return sums[:, 0] / sums[:, 1]


class Mean(Share):
    """The mean of what the rows score each."""

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        pairs = zip(predictions, references, strict=True)
        return counted([self.row(given, wanted, **arguments) for given, wanted in pairs])

    def row(self, given: Any, wanted: Any, **arguments: Any) -> float:
        """What one row scores."""
        raise NotImplementedError


def counted(scored: ArrayLike) -> Floats:
    """Each row's score, and the 1 by which it counts, `(n, 2)`."""
    each = np.asarray(scored, dtype=np.float64)
    return np.stack((each, np.ones_like(each)), axis=1)
