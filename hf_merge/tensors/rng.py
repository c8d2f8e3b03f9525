"""Random numbers that depend on what they are for, never on the order in which they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors import loops

STEPS = 1 << 16
"""Probabilities are rounded to multiples of 1 / STEPS, and rescaling uses the rounded one."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one block of one tensor: one stream for each model, keyed by (seed, model, tensor, block).

    `models` are the models' names in the recipe, so that neither their order nor the place they are read from matters. A
    stream is a counter's: 16 bits an element of SplitMix64 (Steele et al., 2014).
    """

    seed: int
    models: Sequence[str]
    tensor: str
    block: int

    def key(self, model: int) -> np.uint64:
        """Where the stream of the `model`-th model starts, for `hf_merge.tensors.loops`."""
        key = f"{self.seed}\0{self.models[model]}\0{self.tensor}\0{self.block}".encode()
        return np.uint64(int.from_bytes(blake2b(key, digest_size=8).digest(), "little"))

    def uniform(self, model: int, count: int) -> Tensor:
        """`count` integers, uniform in [0, STEPS), int32 on the CPU, of the stream of the `model`-th model."""
        words = np.empty((count + 3) // 4, np.uint64)
        loops.fill_draws(self.key(model), 0, words)
        return torch.from_numpy(words.view(np.uint16)[:count].astype(np.int32))
