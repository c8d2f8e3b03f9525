"""Random numbers that depend on what they are for, never on the order in which they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

STEPS = 1 << 16
"""Probabilities are rounded to multiples of 1 / STEPS, and rescaling uses the rounded one."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one block of one tensor: one stream for each model, keyed by (seed, model, tensor, block).

    `models` are the models' names in the recipe, so that neither their order nor the place they are read from matters.
    """

    seed: int
    models: Sequence[str]
    tensor: str
    block: int

    def uniform(self, model: int, count: int) -> Tensor:
        """`count` integers, uniform in [0, STEPS), int32 on the CPU, of the stream of the `model`-th model."""
        return torch.from_numpy(self._raw(model, count).astype(np.int32))

    def below(self, model: int, count: int, steps: int) -> Tensor:
        """Which of these `count` integers are below `steps`, which is in [0, STEPS]: 1 or 0, uint8 on the CPU."""
        return torch.from_numpy((self._raw(model, count) < steps).view(np.uint8))

    def _raw(self, model: int, count: int) -> npt.NDArray[np.uint16]:
        key = f"{self.seed}\0{self.models[model]}\0{self.tensor}\0{self.block}".encode()
        bits = np.random.SFC64(int.from_bytes(blake2b(key, digest_size=16).digest(), "little"))
        return bits.random_raw((count + 3) // 4).astype("<u8", copy=False).view("<u2")[:count]
