"""Weights of models, and factors that give back what dropping elements took."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors import loops
from hf_merge.tensors.rng import STEPS, Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, drop, per_model, steps_of

SMALL_SUM = 1e-8
SMALL_NORM = 1e-7


def shares(weights: PerModel, models: int, normalize: bool) -> Sequence[float]:
    """`weights`, one for each model, divided by their sum if `normalize` and the sum is not next to 0 (below 1e-8)."""
    each = torch.as_tensor(weights, dtype=torch.float64).reshape(-1).expand(models)
    total = float(each.sum())
    return (each / total if normalize and abs(total) >= SMALL_SUM else each).tolist()


def proportions(weights: PerModel, models: int) -> Sequence[float]:
    """`weights`, one for each model, divided by their sum."""
    each = torch.as_tensor(weights, dtype=torch.float64).reshape(-1).expand(models)
    return (each / each.sum()).tolist()


def l1_gains(blocks: Blocks, sparsify: Callable[[int, int, Tensor], Tensor]) -> Tensor:
    """Factors `(models,)` that give the sparsified tensors the L1 norms of the whole ones; 1 if a norm is below 1e-7.

    `sparsify(number, start, block)` is what stays of a block `(models, b)`, its `number`-th, from element `start` on.
    """
    norms, start = torch.zeros(2, 1, dtype=torch.float64), 0
    for number, block in enumerate(blocks()):
        norms = norms + torch.stack([_l1(block), _l1(sparsify(number, start, block))])
        start += block.shape[1]
    return gains(norms)


def drop_gains(blocks: Blocks, density: PerModel, draws: Callable[[int], Draws]) -> Tensor:
    """Factors `(models,)` that give what `drop` without rescaling leaves the L1 norms of the whole tensors; 1 if a norm is
    below 1e-7."""
    norms = torch.zeros(2, 1, dtype=torch.float64)
    for number, block in enumerate(blocks()):
        rng, rows = draws(number), loops.served(block)
        steps = [steps_of(chance) for chance in per_model(density, block)[:, 0].tolist()]
        if rows is None or not all(0 < step < STEPS for step in steps):
            norms = norms + torch.stack([_l1(block), _l1(drop(block, density, rng, rescale=False))])
        else:
            pairs = [loops.drop_sizes(row, rng.key(k), np.uint16(steps[k])) for k, row in enumerate(rows)]
            norms = norms + torch.tensor(pairs, dtype=torch.float64).T
    return gains(norms)


def gains(norms: Tensor) -> Tensor:
    """Factors `(models,)` that undo the loss of norm, from the norms `(2, models)` before and after; 1 if one is below 1e-7."""
    return torch.where(norms.amin(0) >= SMALL_NORM, norms[0] / norms[1], 1.0)


def _l1(block: Tensor) -> Tensor:
    """L1 norms `(models,)` of a block, float64, the same for any number of threads."""
    return torch.tensor([loops.sizes(row) for row in block.float().cpu().contiguous().numpy()], dtype=torch.float64)
