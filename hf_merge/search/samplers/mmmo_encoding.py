"""Points of a search space as rows for Gaussian processes and for crossover."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution
from torch import Tensor

from hf_merge.search.samplers.numbered import Cube


class Encoding:
    """The features of a `Cube` as float64 tensors: one column in [0, 1] for a number, one for each value of a choice (one-hot).
    Parameters stand in the order of their names.

    `owner` `(columns,)` says to which parameter, by its place, a column belongs.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.cube = Cube(dict(sorted(space.items())))
        widths = torch.from_numpy(np.maximum(self.cube.choices, 1))
        self.owner = torch.repeat_interleave(torch.arange(len(widths)), widths)

    @property
    def space(self) -> Mapping[str, BaseDistribution]:
        """The distributions by name."""
        return self.cube.space

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.owner)

    def encode(self, points: Sequence[Mapping[str, Any]]) -> Tensor:
        """Rows `(points, columns)` of parameters' values."""
        rows = np.array([self.cube.encode(point) for point in points]).reshape(len(points), len(self.space))
        return torch.from_numpy(self.cube.features(rows))

    def decode(self, row: Tensor) -> dict[str, Any]:
        """The nearest point of the space: a choice's value with the largest column, a stepped number's nearest step."""
        return self.cube.decode(self.cube.from_features(row.numpy()))

    def snap(self, rows: Tensor) -> Tensor:
        """The rows `(..., columns)` of the points that `rows` decode to."""
        points = [self.decode(row) for row in rows.reshape(-1, self.width)]
        return self.encode(points).reshape(rows.shape)
