"""Weights of models, and factors that give back what dropping elements took."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_merge.tensors.rng import STEPS
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model

SMALL_SUM = 1e-8
SMALL_NORM = 1e-7


def shares(weights: Tensor, normalize: bool) -> Tensor:
    """`weights` `(models, 1)`, divided by their sum if `normalize` and the sum is not next to 0 (below 1e-8)."""
    total = float(weights.double().sum())
    return (weights.double() / total).to(weights.dtype) if normalize and abs(total) >= SMALL_SUM else weights


def l1_gains(blocks: Blocks, sparsify: Callable[[int, int, Tensor], Tensor]) -> Tensor:
    """Factors `(models,)` that give the sparsified tensors the L1 norms of the whole ones; 1 if a norm is below 1e-7.

    `sparsify(number, start, block)` is what stays of a block `(models, b)`, its `number`-th, from element `start` on.
    """
    whole, left, start = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for number, block in enumerate(blocks()):
        whole = whole + block.abs().sum(1, dtype=torch.float64).cpu()
        left = left + sparsify(number, start, block).abs().sum(1, dtype=torch.float64).cpu()
        start += block.shape[1]
    return torch.where(torch.minimum(whole, left) >= SMALL_NORM, whole / left, 1.0)


def drop_chances(density: PerModel, deltas: Tensor) -> Tensor:
    """The chances `(models, 1)` that `drop` keeps elements with and divides by: `density` as a multiple of 1 / STEPS."""
    return (per_model(density, deltas) * STEPS).round().clamp(1, STEPS) / STEPS
