"""Weights of models, and factors that give back what dropping elements took."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_merge.tensors import loops
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, drop

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
    whole, left, start = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for number, block in enumerate(blocks()):
        whole = whole + _l1(block)
        left = left + _l1(sparsify(number, start, block))
        start += block.shape[1]
    return torch.where(torch.minimum(whole, left) >= SMALL_NORM, whole / left, 1.0)


def drop_gains(blocks: Blocks, density: PerModel, draws: Callable[[int], Draws]) -> Tensor:
    """Factors `(models,)` that give what `drop` without rescaling leaves the L1 norms of the whole tensors; 1 if a norm is
    below 1e-7."""
    return l1_gains(blocks, lambda number, _, block: drop(block, density, draws(number), rescale=False))


def _l1(block: Tensor) -> Tensor:
    """L1 norms `(models,)` of a block, float64, the same for any number of threads."""
    return torch.tensor([loops.sizes(row) for row in block.float().cpu().contiguous().numpy()], dtype=torch.float64)
