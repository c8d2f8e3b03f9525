"""What an evaluation returns: one value for each objective, with what is needed to say how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

MAXIMIZE, MINIMIZE = "maximize", "minimize"


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One objective's value on one split.

    `value` is in the metric's own unit; `examples` counts the rows behind it; `seconds` is what it cost.
    `outcomes` `(examples,)` holds each row's own result (1/0 for right/wrong, or a row's share of the metric), NaN-free.
    `replicates` `(B,)` are bootstrap values of the metric: replicate b of any model on the same rows uses the same
    resampled rows, so differences of replicates are paired comparisons.
    `margins` `(examples,)` say, where a row's answer is one of several, by how much the right one leads (its logit or
    log-likelihood less the largest other one): positive where it is chosen.
    `rows` `(examples,)` is there for a partial score only: the positions in the dataset that `outcomes` belong to. A score
    without it stands for the whole split. `expected` are then the margins of all rows, as far as they can be told; they are
    not written to files.
    """

    value: float
    examples: int
    seconds: float = 0.0
    outcomes: NDArray[np.float32] | None = field(default=None, repr=False)
    margins: NDArray[np.float32] | None = field(default=None, repr=False)
    replicates: NDArray[np.float64] | None = field(default=None, repr=False)
    rows: NDArray[np.int64] | None = field(default=None, repr=False)
    expected: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % percentile bootstrap interval, if the score was bootstrapped."""
        if self.replicates is None:
            return None
        low, high = np.quantile(self.replicates, (0.025, 0.975))
        return float(low), float(high)


BAND = 0.8
"""Of the root mean square margin: how far from 0 a margin still counts in part."""


def smoothed(margins: NDArray[Any], variances: NDArray[Any] | float = 0.0) -> NDArray[np.float64]:
    """How right rows with these margins `(…, rows)` are, from 0 to 1: Φ(margin / b), where b is `BAND` times the root mean
    square margin of the same model. Margins that are only expected are normals with these `variances`.

    The mean is the normal-smoothed estimate of an accuracy (Glick 1978; Snapinn and Knoke, doi:10.1080/00401706.1985.10488023):
    which rows come out just right or just wrong is chance, and counting them in part leaves most of that out. It is nearer to
    1/2 than the accuracy itself. On the demo trio the smoothed accuracy on 64 rows tells held-out accuracies of merges (those
    of the better half) with a standard deviation of 0.011 about a straight line, on 192 with 0.008; the accuracy itself
    needs 256 and 512 rows for that (`benchmarks/smoothing.py`).
    """
    exact = np.asarray(margins, dtype=np.float64)
    scale = BAND**2 * (exact**2 + variances).mean(-1, keepdims=True)
    found: NDArray[np.float64] = ndtr(exact / np.sqrt(np.maximum(scale + variances, 1e-24)))
    return found


Scores = Mapping[str, Score]


def partial(scores: Scores) -> bool:
    """Whether some of them stand for a part of the rows."""
    return any(score.rows is not None for score in scores.values())


_ARRAYS = ("outcomes", "margins", "replicates", "rows")


def save_scores(path: Path, scores: Scores) -> None:
    """Write scores with their arrays to an .npz file; a reader never sees half of one."""
    arrays: dict[str, NDArray[Any]] = {"names": np.array(list(scores))}
    for i, score in enumerate(scores.values()):
        arrays[f"{i}.numbers"] = np.array([score.value, score.examples, score.seconds])
        for part in _ARRAYS:
            if (values := getattr(score, part)) is not None:
                arrays[f"{i}.{part}"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    unfinished.replace(path)


def load_scores(path: Path) -> dict[str, Score]:
    """Scores as `save_scores` wrote them; empty if there is no such file."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        found = {}
        for i, name in enumerate(arrays["names"].tolist()):
            value, examples, seconds = arrays[f"{i}.numbers"].tolist()
            parts = {part: arrays[f"{i}.{part}"] for part in _ARRAYS if f"{i}.{part}" in arrays}
            found[name] = Score(value=value, examples=int(examples), seconds=seconds, **parts)
        return found
