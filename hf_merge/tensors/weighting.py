"""Weights of models, and factors that give back what dropping elements took."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors.rng import STEPS, Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model, steps_of

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
        whole = whole + _l1(block)
        left = left + _l1(sparsify(number, start, block))
        start += block.shape[1]
    return torch.where(torch.minimum(whole, left) >= SMALL_NORM, whole / left, 1.0)


def _l1(block: Tensor) -> Tensor:
    """L1 norms `(models,)` of a block, float64; numpy's sums are the same for any number of threads."""
    return torch.from_numpy(block.abs().cpu().numpy().sum(1)).double()


def drop_gains(blocks: Blocks, density: PerModel, draws: Callable[[int], Draws]) -> Tensor:
    """Factors `(models,)` that give what `drop` without rescaling leaves the L1 norms of the whole tensors; 1 if a norm is
    below 1e-7."""
    whole = left = np.zeros(0)
    for number, block in enumerate(blocks()):
        if number == 0:
            whole, left = np.zeros(len(block)), np.zeros(len(block))
            chances = per_model(density, block)[:, 0].tolist()
        rng = draws(number)
        for model, (row, chance) in enumerate(zip(block.cpu(), chances, strict=True)):
            steps, magnitude = steps_of(chance), row.abs()
            # numpy's sums are the same for any number of threads.
            total = float(magnitude.numpy().sum())
            whole[model] += total
            if 0 < steps < STEPS:
                stays = rng.below(model, len(row), steps).to(row.dtype)
                total = float(stays.mul_(magnitude).numpy().sum())
            left[model] += total if steps else 0.0
    small = np.minimum(whole, left) < SMALL_NORM
    return torch.from_numpy(np.where(small, 1.0, whole / np.where(small, 1.0, left)))
