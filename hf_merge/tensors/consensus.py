"""Adding up deltas: weighted sums, and sums over the models that agree on a sign."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors import loops
from hf_merge.tensors.sparsify import Cutoffs, trim


def weighted_sum(stack: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """Σ_k w_k x_k of `stack` `(models, n)` with `weights` `(models, 1)` or one number each, added up in the models' order."""
    factors = [float(weight) for weight in weights]
    if (rows := loops.served(stack)) is not None:
        total = torch.empty(stack.shape[1:])
        loops.weighted_sum(rows, np.array(factors, np.float32), total.numpy())
        return total
    total = stack[0] * factors[0]
    for values, weight in zip(stack[1:], factors[1:], strict=True):
        total.add_(values, alpha=weight)
    return total


def disjoint(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Sign election and disjoint merge of `deltas` `(models, n)` with `weights` `(models, 1)` (arXiv:2306.01708, section 4).

    The elected sign is that of the weighted sum (+ where it is zero); the weighted deltas with that sign are added up
    and, if `normalize`, divided by the sum of their |weights| (the paper's count of agreeing models at equal weights).
    """
    return elected(deltas, weights, weights, normalize)


def elected(
    deltas: Tensor, votes: Tensor, weights: Tensor, normalize: bool, cut: Cutoffs | None = None, start: int = 0
) -> Tensor:
    """As `disjoint`, with a sign elected by `votes` `(models, 1)`, that of Σ_k v_k δ_k; model k agrees if its v_k δ_k has it.
    With `cut`, of what `trim` leaves of `deltas` whose first column is element `start` of their tensor.

    The sum is taken in float64: deltas of bfloat16 weights often cancel exactly, and rounding would let the models' order
    elect the sign.
    """
    ballot, shares = (column.reshape(-1).tolist() for column in (votes, weights))
    if (rows := loops.served(deltas)) is not None:
        merged, none = torch.empty(deltas.shape[1:]), [-1.0] * len(deltas)
        limits = (none, none) if cut is None else cut.limits
        splits = np.zeros(len(deltas), np.int64) if cut is None else np.array(cut.splits(start), np.int64)
        columns = (np.array(column, np.float32) for column in (ballot, shares, *limits))
        loops.elect(rows, *columns, splits, normalize, merged.numpy())
        return merged
    deltas = deltas if cut is None else trim(deltas, cut, start)
    sums = torch.zeros_like(deltas[0], dtype=torch.float64)
    for values, vote in zip(deltas, ballot, strict=True):
        sums.add_(values.double(), alpha=vote)
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    sign = torch.where(sums < 0, -1.0, 1.0).to(deltas.dtype)
    for values, vote, weight in zip(deltas, ballot, shares, strict=True):
        agrees = (values * (-sign if vote < 0 else sign) > 0).to(values.dtype)
        total.add_(agrees * values, alpha=weight)
        divisor.add_(agrees, alpha=abs(weight))
    return total.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)) if normalize else total
