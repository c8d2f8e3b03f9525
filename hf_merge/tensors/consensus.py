"""Adding up deltas: weighted sums, and sums over the models that agree on a sign."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors import loops


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


def elected(deltas: Tensor, votes: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """As `disjoint`, with a sign elected by `votes` `(models, 1)`, that of Σ_k v_k δ_k; model k agrees if its v_k δ_k has it.

    Deltas of bfloat16 weights often cancel exactly; where rounding could let the models' order elect the sign, the sum is
    taken in float64.
    """
    ballot, shares = (column.reshape(-1).tolist() for column in (votes, weights))
    if (rows := loops.served(deltas)) is not None:
        merged = torch.empty(deltas.shape[1:])
        loops.elect(rows, np.array(ballot, np.float32), np.array(shares, np.float32), normalize, merged.numpy())
        return merged
    sums, sizes = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for values, vote in zip(deltas, ballot, strict=True):
        sums.add_(values, alpha=vote)
        sizes.add_(values.abs(), alpha=abs(vote))
    # A sum of k products is off by at most k 2⁻²⁴ of their magnitudes' sum.
    close = (sums.abs() <= sizes * (len(deltas) * 2.0**-22)).nonzero()[:, 0]
    sums[close] = (deltas[:, close].double() * votes.reshape(-1, 1).to(deltas.device).double()).sum(0).sign().to(sums.dtype)
    total, divisor = torch.zeros_like(sums), torch.zeros_like(sums)
    sign = torch.where(sums < 0, -1.0, 1.0).to(sums.dtype)
    for values, vote, weight in zip(deltas, ballot, shares, strict=True):
        agrees = (values * (-sign if vote < 0 else sign) > 0).to(values.dtype)
        total.add_(agrees * values, alpha=weight)
        divisor.add_(agrees, alpha=abs(weight))
    return total.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)) if normalize else total
