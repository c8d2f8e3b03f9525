"""What an evaluation returns: one value for each objective, with what is needed to say how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAXIMIZE, MINIMIZE = "maximize", "minimize"


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One objective's value on one split.

    `value` is in the metric's own unit; `examples` counts the rows behind it; `seconds` is what it cost.
    `outcomes` `(examples,)` holds each row's own result (1/0 for right/wrong, or a row's share of the metric), NaN-free.
    `replicates` `(B,)` are bootstrap values of the metric: replicate b of any model on the same rows uses the same
    resampled rows, so differences of replicates are paired comparisons.
    """

    value: float
    examples: int
    seconds: float = 0.0
    outcomes: NDArray[np.float32] | None = field(default=None, repr=False)
    replicates: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % percentile bootstrap interval, if the score was bootstrapped."""
        if self.replicates is None:
            return None
        low, high = np.quantile(self.replicates, (0.025, 0.975))
        return float(low), float(high)


Scores = Mapping[str, Score]
