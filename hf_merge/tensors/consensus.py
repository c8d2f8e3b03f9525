"""Adding up deltas: weighted sums, and sums over the models that agree on a sign."""

import torch
from torch import Tensor


def weighted_sum(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k x_k of `stack` `(models, n)` with `weights` `(models, 1)`, added up in the models' order."""
    total = stack[0] * weights[0]
    for values, weight in zip(stack[1:], weights[1:], strict=True):
        total += values * weight
    return total


def disjoint(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Sign election and disjoint merge of `deltas` `(models, n)` with `weights` `(models, 1)` (arXiv:2306.01708, section 4).

    The elected sign is that of the weighted sum (+ where it is zero); the weighted deltas with that sign are added up
    and, if `normalize`, divided by the sum of their |weights| (the paper's count of agreeing models at equal weights).
    """
    # Deltas of bfloat16 weights often cancel exactly; rounding in float32 would let the models' order elect the sign.
    vote = torch.zeros_like(deltas[0], dtype=torch.float64)
    for values, weight in zip(deltas, weights, strict=True):
        vote += values.double() * weight.double()
    positive = vote >= 0
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for values, weight in zip(deltas, weights, strict=True):
        weighted = values * weight
        agree = ((weighted > 0) == positive) & (weighted != 0)
        total += weighted * agree
        divisor += agree * weight.abs()
    return total / torch.where(divisor > 0, divisor, 1) if normalize else total
