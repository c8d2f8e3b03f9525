"""A tensor whose rows are those of other tensors in another order: how models are read in another vocabulary."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hf_merge.checkpoints.source import Source

GAP = 16 * 1024
"""Bytes between two wanted rows that are read along rather than skipped: about what a second read costs on a local disk."""
FAR_GAP = 256 * 1024
"""The same on a network."""
PIECE = 4 * 1024 * 1024
"""Elements that are read at once where more is read than is kept."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """For each row of a result, the rows that it is the mean of: none (zeros), one (that row) or several.

    Row r is the mean of rows `row[i]` of sources `source[i]`, i from `start[r]` to `start[r + 1]`. All are int64 vectors:
    `start` of one element more than there are rows, `source` and `row` of equal length.
    """

    start: Tensor
    source: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.start) - 1

    @cached_property
    def counts(self) -> Tensor:
        """How many rows each row is the mean of."""
        return self.start.diff()

    @cached_property
    def used(self) -> tuple[int, ...]:
        """The sources that are read, by position."""
        return tuple(self.source.unique().tolist())

    @cached_property
    def averages(self) -> bool:
        """Whether any row is a mean of several."""
        return bool((self.counts > 1).any())

    @cached_property
    def runs(self) -> int:
        """Number of pieces, each of consecutive rows of one source: about as many reads as the whole takes."""
        return int(((self.row.diff() != 1) | (self.source.diff() != 0)).sum()) + 1 if len(self.row) else 0

    def is_identity(self, source: int, rows: int) -> bool:
        """Whether this is `source` as it is, all of its `rows`."""
        plain = len(self) == rows == len(self.row) and not self.averages
        return plain and bool((self.row == torch.arange(rows)).all()) and bool((self.source == source).all())

    def of(self, source: int) -> "RowMap":
        """The same with rows of `source` alone; all others are zeros."""
        kept = self.source == source
        total = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return RowMap(total[self.start], self.source[kept], self.row[kept])


@dataclass(frozen=True, eq=False)
class Rows:
    """A source whose rows are those of other sources, as `rows` says; `own` is the position of the one that it stands for.

    All sources have the same shape but for the number of rows. Values are float32 (or wider) where rows are averaged, else of
    the dtype of the sources that are used, promoted. A read touches only the rows that it needs, and what lies close between.
    """

    sources: tuple[Source, ...]
    rows: RowMap
    own: int = 0

    @property
    def label(self) -> str:
        """That of the source that it stands for."""
        return self.sources[self.own].label

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the values that `read` returns."""
        dtype = self.sources[self.rows.used[0] if self.rows.used else self.own].dtype
        for k in self.rows.used:
            dtype = torch.promote_types(dtype, self.sources[k].dtype)
        return torch.promote_types(dtype, torch.float32) if self.rows.averages else dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the map has."""
        return (len(self.rows), *self.sources[self.own].shape[1:])

    @property
    def near(self) -> bool:
        """Whether all sources that are used are near."""
        return all(self.sources[k].near for k in self.rows.used)

    @property
    def delta(self) -> bool:
        """Of the source that it stands for."""
        return self.sources[self.own].delta

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the rows that are used, each once."""
        used = {k: int(self.rows.row[self.rows.source == k].unique().numel()) for k in self.rows.used}
        return sum(self.sources[k].nbytes * rows // max(self.sources[k].shape[0], 1) for k, rows in used.items())

    @cached_property
    def _width(self) -> int:
        return math.prod(self.sources[self.own].shape[1:])

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat. Raises `CheckpointError` if they cannot be had."""
        width = self._width
        if stop <= start:
            return torch.zeros(0, dtype=self.dtype)
        first, last = start // width, (stop - 1) // width + 1
        # Of a single row only the columns are read that are asked for; of several, the outer two are read whole.
        left, right = (start - first * width, stop - first * width) if last - first == 1 else (0, width)
        found = self._read(first, last, left, right).flatten()
        offset = first * width + left
        return found[start - offset : stop - offset]

    def _read(self, first: int, last: int, left: int, right: int) -> Tensor:
        """Rows [first, last), their columns [left, right)."""
        begin, end = int(self.rows.start[first]), int(self.rows.start[last])
        counts, origin, rows = self.rows.counts[first:last], self.rows.source[begin:end], self.rows.row[begin:end]
        averages = bool((counts > 1).any())
        used = origin.unique().tolist()
        if len(used) == 1 and len(rows) == last - first and not averages and bool((rows.diff() == 1).all()):
            # The common case: one run of one model, as it is.
            return self._block(self.sources[used[0]], int(rows[0]), int(rows[-1]), left, right).to(self.dtype)
        found = torch.zeros(last - first, right - left, dtype=self.dtype)
        targets = torch.arange(last - first).repeat_interleave(counts)
        for k in used:
            mine, order = rows[origin == k].sort(stable=True)
            into = targets[origin == k][order]
            for a, b, values in self._values(self.sources[k], mine, left, right):
                if averages:
                    found.index_add_(0, into[a:b], values)
                else:
                    found[into[a:b]] = values
        return found.div_(counts.clamp(min=1)[:, None]) if averages else found

    def _values(self, source: Source, rows: Tensor, left: int, right: int) -> Iterator[tuple[int, int, Tensor]]:
        """The columns of a source's `rows` (sorted), in few reads and a piece at a time: which of them, and their values."""
        edges = self._edges(source, rows, whole=right - left == self._width)
        low, high = rows[edges[:-1]], rows[edges[1:] - 1]
        length, wanted = high - low + 1, edges.diff()
        group = (length.cumsum(0) - length) * self._width // PIECE
        position = rows - (low - (length.cumsum(0) - length)).repeat_interleave(wanted)
        reads = list(zip(low.tolist(), high.tolist(), strict=True))
        for i, j in pairwise([0, *(group.diff().nonzero().flatten() + 1).tolist(), len(reads)]):
            a, b = int(edges[i]), int(edges[j])
            blocks = [self._block(source, first, last, left, right) for first, last in reads[i:j]]
            values = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
            if len(values) > b - a or bool((rows[a:b].diff() == 0).any()):
                values = values[position[a:b] - position[a]]
            yield a, b, values.to(self.dtype)

    def _edges(self, source: Source, rows: Tensor, whole: bool) -> Tensor:
        """Where in the wanted `rows` (sorted) a new read begins, and at the end their number."""
        width = max(self._width, 1)
        gap = (GAP if source.near else FAR_GAP) // (width * source.dtype.itemsize)
        step = rows.diff()
        apart = step > (1 + gap if whole else 0)
        # Rows with gaps between them are read at most PIECE elements at once, so that gaps cannot fill the memory.
        apart |= (step > 1) & ((rows // max(PIECE // width, 1)).diff() > 0)
        return torch.cat([torch.zeros(1, dtype=torch.int64), apart.nonzero().flatten() + 1, torch.tensor([len(rows)])])

    def _block(self, source: Source, low: int, high: int, left: int, right: int) -> Tensor:
        """Rows from `low` to `high`, both included; of a single one the columns [left, right)."""
        return source.read(low * self._width + left, high * self._width + right).view(high - low + 1, -1)


@dataclass(frozen=True, eq=False)
class MeanRow:
    """The mean of all rows of a source, as a tensor of one row; the source is read once, in pieces, when it is asked for."""

    source: Source

    @property
    def label(self) -> str:
        """The source's."""
        return self.source.label

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 of a source in it."""
        return torch.promote_types(self.source.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """One row of the source's."""
        return (1, *self.source.shape[1:])

    @property
    def near(self) -> bool:
        """The source's."""
        return self.source.near

    @property
    def delta(self) -> bool:
        """The source's."""
        return self.source.delta

    @property
    def nbytes(self) -> int:
        """The whole source is read."""
        return self.source.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the mean."""
        return self._mean[start:stop]

    @cached_property
    def _mean(self) -> Tensor:
        rows, width = self.source.shape[0], math.prod(self.source.shape[1:])
        step = max(PIECE // max(width, 1), 1)
        total = torch.zeros(width, dtype=torch.float64)
        for row in range(0, rows, step):
            piece = self.source.read(row * width, min(row + step, rows) * width)
            total += piece.view(-1, width).sum(0, dtype=torch.float64)
        return (total / max(rows, 1)).to(self.dtype)
