"""A split run part by part: the same rows in the same order for every model, so that models compare after any part."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.loaded_metric import LoadedMetric
from hf_merge.evaluation.metrics.summed import Values
from hf_merge.evaluation.predict import Integers
from hf_merge.evaluation.reader import Part
from hf_merge.pareto import Floats
from hf_merge.scores import Score

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""How much of the rows the rounds before the last one have seen. Each has about as many new rows as all before it."""


def race_order(references: Values, seed: int, priority: Floats | None = None) -> Integers:
    """The rows' numbers `(n,)` as a race takes them: by a hash of (seed, row), every class evenly spread.

    Where the references are classes (whole numbers in an array), each class has its share of every prefix, to within a row.
    With a `priority` `(n,)` that holds for the first of `SHARES`; the other rows follow with the highest first, equal ones
    in the same order as without.
    """
    order = _spread(references, seed)
    if priority is None:
        return order
    first, others = np.split(order, [round(SHARES[0] * len(order))])
    return np.concatenate([first, others[np.argsort(-priority[others], kind="stable")]])


def _spread(references: Values, seed: int) -> Integers:
    n = len(references)
    drawn = _drawn(seed, n)
    order = np.argsort(drawn, kind="stable")
    if not (isinstance(references, np.ndarray) and references.dtype.kind in "iu"):
        return order
    place = np.empty(n)
    for value in np.unique(references):
        own = order[references[order] == value]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.lexsort((drawn, place))


class PartialRun:
    """One model's run over one part, in the race's order: `upto` runs only the rows that are still missing.

    A part whose runner is not divisible is run whole at once.
    """

    def __init__(self, part: Part, metric: LoadedMetric, seed: int, priority: Floats | None = None) -> None:
        self.part, self._metric, self._order = part, metric, race_order(part.references, seed, priority)
        self._found: list[Values] = []
        self._done, self._seconds = 0, 0.0

    def upto(self, model: PreTrainedModel, share: float) -> Score | None:
        """The score on this share of the rows, at least one; None if the metric is undefined on so few.

        Its `rows` are None, and its outcomes in the dataset's order, once all rows have been run. Its `seconds` are those of
        all its rows.
        """
        start = time.perf_counter()
        n = len(self._order)
        target = max(1, round(share * n)) if self.part.runner.divisible else n
        if target > self._done:
            self._found.append(self.part.runner(model, self._order[self._done : target]))
            self._done = target
        rows = self._order[: self._done]
        whole, found = self._done == n, _joined(self._found)
        found = _taken(found, np.argsort(self._order)) if whole else found
        references = self.part.references if whole else _taken(self.part.references, rows)
        try:
            score = self.part.score(self._metric, found, references, replicates=0, seed=())
        except EvaluationError:
            if whole:
                raise
            return None
        finally:
            self._seconds += time.perf_counter() - start
        return replace(score, rows=None if whole else rows, seconds=self._seconds)


@lru_cache(maxsize=64)
def _drawn(seed: int, n: int) -> Integers:
    """A number below 2**56 for each row: a hash of (seed, row)."""
    hashes = (hashlib.blake2b(f"{seed} {row}".encode(), digest_size=7).digest() for row in range(n))
    return np.array([int.from_bytes(each, "little") for each in hashes], dtype=np.int64)


def _joined(parts: Sequence[Values]) -> Values:
    if all(isinstance(part, np.ndarray) for part in parts):
        joined: NDArray[Any] = np.concatenate(parts)
        return joined
    return list(chain.from_iterable(parts))


def _taken(values: Values, rows: Integers) -> Values:
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
