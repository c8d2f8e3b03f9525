"""Tensors that an adapter changes, as sources: low-rank deltas, and full tensors computed from them."""

import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_merge.checkpoints.source import Source

TILE = 2**16
"""Elements of a product that are computed at once. Tiles start at fixed rows: a range has the same bits however it is cut."""
KEPT = 16
"""Pairs of factors of one adapter in memory at once: more than threads that merge."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Norm from which on DoRA divides: rows of zeros (padding) stay zeros."""
PIECE = 2**22
"""Elements of the original that are read at once to measure its columns."""


class Factors(NamedTuple):
    """A delta is `left @ right`, float32: (rows, rank) and (rank, columns), the scale included."""

    left: Tensor
    right: Tensor


class Recent:
    """The values of the last `KEPT` keys, each computed by one of the threads that ask for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: OrderedDict[Any, Future[Any]] = OrderedDict()

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value for `key`. What `compute` raises is raised, and tried again next time."""
        with self._lock:
            ours = key not in self._values
            value = self._values.setdefault(key, Future())
            self._values.move_to_end(key)
            if len(self._values) > KEPT:
                self._values.popitem(last=False)
        if ours:
            try:
                value.set_result(compute())
            except BaseException as error:
                with self._lock:
                    self._values.pop(key, None)
                value.set_exception(error)
        return value.result()


@dataclass(frozen=True)
class LowRank:
    """The delta of a low-rank change to one tensor; a tensor of more than two dimensions is a matrix of its first one."""

    label: str
    shape: tuple[int, ...]
    nbytes: int
    factors: Callable[[], Factors]
    dtype: torch.dtype = torch.float32
    near: bool = True
    delta: bool = True

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat: only the rows that hold them are computed."""
        first, last = self.tiles(start, stop)
        return self.rows(first, last).reshape(-1)[start - first * self.columns : stop - first * self.columns]

    def tiles(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the whole tiles that hold the elements [start, stop)."""
        if stop <= start:
            return 0, 0
        first, last = start // self.columns, (stop - 1) // self.columns
        return first // self.step * self.step, min((last // self.step + 1) * self.step, self.shape[0])

    @property
    def step(self) -> int:
        """Rows of a tile."""
        return max(1, TILE // self.columns)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the delta, where `first` begins a tile."""
        left, right = self.factors()
        rows = torch.empty(last - first, self.columns)
        for tile, out in zip(left[first:last].split(self.step), rows.split(self.step), strict=True):
            torch.mm(tile, right, out=out)
        return rows


@dataclass(frozen=True)
class Adapted:
    """A full tensor: `original` plus a low-rank change and, with a `magnitude`, scaled to it as DoRA does.

    With `transposed` (Conv1D, embeddings) the magnitudes are those of columns; their norms take one more pass over it all.
    DoRA: arXiv:2402.09353, equation 5.
    """

    original: Source
    change: LowRank
    magnitude: Callable[[], Tensor] | None
    transposed: bool
    recent: Recent
    dtype: torch.dtype = torch.float32
    delta: bool = False

    @property
    def label(self) -> str:
        """The change's."""
        return self.change.label

    @property
    def shape(self) -> tuple[int, ...]:
        """The change's."""
        return self.change.shape

    @property
    def near(self) -> bool:
        """The original's."""
        return self.original.near

    @property
    def nbytes(self) -> int:
        """Of the original (as often as it is read) and of the change."""
        passes = 2 if self.magnitude is not None and self.transposed and not self.near else 1
        return passes * self.original.nbytes + self.change.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat."""
        columns = self.change.columns
        first, last = self.change.tiles(start, stop)
        values = self._sum(first, last)
        if self.magnitude is not None and self.transposed:
            values *= self.recent.get((self.label, "columns"), self._column_scales)
        elif self.magnitude is not None:
            norms = torch.cat([torch.linalg.vector_norm(tile, dim=1) for tile in values.split(self.change.step)])
            values *= (self.magnitude()[first:last] / norms.clamp_(min=SMALLEST))[:, None]
        return values.reshape(-1)[start - first * columns : stop - first * columns]

    def _sum(self, first: int, last: int) -> Tensor:
        columns = self.change.columns
        original = self.original.read(first * columns, last * columns).to(torch.float32)
        return self.change.rows(first, last).add_(original.reshape(-1, columns))

    def _column_scales(self) -> Tensor:
        assert self.magnitude is not None
        squares = torch.zeros(self.change.columns, dtype=torch.float64)
        step = max(1, PIECE // TILE) * self.change.step
        for first in range(0, self.shape[0], step):
            squares += self._sum(first, min(first + step, self.shape[0])).double().square_().sum(0)
        return self.magnitude() / squares.sqrt_().to(torch.float32).clamp_(min=SMALLEST)
