"""A tensor that is read by ranges of its elements, wherever it comes from: the seam between checkpoints and merging."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint


class Source(Protocol):
    """One tensor of one model. What is read twice is the same twice; several threads may read at once."""

    @property
    def label(self) -> str:
        """Model and tensor, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that `read` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def near(self) -> bool:
        """Whether reading a small range again costs next to nothing: memory or a local disk, not a network."""

    @property
    def delta(self) -> bool:
        """Whether the values are a difference from the base already."""

    @property
    def nbytes(self) -> int:
        """Bytes that are read from a disk or a network for the whole tensor."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat. Raises `CheckpointError` if they cannot be had."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it stands in a checkpoint."""

    checkpoint: Checkpoint
    name: str
    delta: bool = False

    @property
    def label(self) -> str:
        """Model and tensor, for messages."""
        return f"{self.checkpoint.label}: tensor {self.name!r}"

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self.checkpoint.index.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.checkpoint.index.tensors[self.name].shape

    @property
    def near(self) -> bool:
        """Whether the checkpoint is local or in memory."""
        return self.checkpoint.is_near(self.name)

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.checkpoint.index.tensors[self.name].nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat."""
        return self.checkpoint.read(self.name, start, stop)


@dataclass(frozen=True)
class Held:
    """Elements of a source that were brought into memory: `values` are those from `start` on."""

    source: Source
    values: Tensor
    start: int

    @property
    def label(self) -> str:
        """The source's."""
        return self.source.label

    @property
    def dtype(self) -> torch.dtype:
        """The source's."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.shape

    @property
    def near(self) -> bool:
        """It is in memory."""
        return True

    @property
    def delta(self) -> bool:
        """The source's."""
        return self.source.delta

    @property
    def nbytes(self) -> int:
        """The source's."""
        return self.source.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat; they must be among those that are held."""
        return self.values[start - self.start : stop - self.start]


@dataclass(frozen=True)
class Zeros:
    """A tensor that a model did not change: a delta of nothing."""

    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    near: bool = True
    delta: bool = True
    nbytes: int = 0

    def read(self, start: int, stop: int) -> Tensor:
        """Zeros."""
        return torch.zeros(stop - start, dtype=self.dtype)


def elements(source: Source) -> int:
    """Number of elements of a source."""
    return math.prod(source.shape)
