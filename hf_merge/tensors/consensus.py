"""Adding up deltas: weighted sums, and sums over the models that agree on a sign."""

import numpy as np
import torch
from torch import Tensor


def weighted_sum(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k x_k of `stack` `(models, n)` with `weights` `(models, 1)`, added up in the models' order."""
    first, *rest = weights[:, 0].tolist()
    total = stack[0] * first
    for values, weight in zip(stack[1:], rest, strict=True):
        total.add_(values, alpha=weight)
    return total


def disjoint(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Sign election and disjoint merge of `deltas` `(models, n)` with `weights` `(models, 1)` (arXiv:2306.01708, section 4).

    The elected sign is that of the weighted sum (+ where it is zero); the weighted deltas with that sign are added up
    and, if `normalize`, divided by the sum of their |weights| (the paper's count of agreeing models at equal weights).
    """
    merged, close = _elected(deltas, weights, weighted_sum(deltas, weights), normalize)
    # Deltas of bfloat16 weights often cancel exactly; rounding in float32 would let the models' order elect the sign.
    if len(close):
        few = deltas[:, close]
        vote = weighted_sum(few.double(), weights.double())
        merged[close] = _elected(few, weights, torch.where(vote < 0, -1.0, 1.0).to(few.dtype), normalize)[0]
    return merged


def _elected(deltas: Tensor, weights: Tensor, vote: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The disjoint merge with the signs of `vote` `(n,)`, and the elements at which rounding may have decided those."""
    sign = torch.copysign(torch.ones((), dtype=vote.dtype, device=vote.device), vote)
    total, divisor = torch.zeros_like(vote), torch.zeros_like(vote)
    agreeing = torch.empty_like(vote)
    for values, weight in zip(deltas, weights[:, 0].tolist(), strict=True):
        torch.mul(values, sign if weight > 0 else -sign, out=agreeing).relu_()
        total.add_(agreeing, alpha=abs(weight))
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=abs(weight))
    # A sum of k products is off by at most k 2⁻²⁴ of their magnitudes' sum: where its sign is wrong, twice the `total`.
    margin = torch.abs(vote, out=agreeing).sub_(total, alpha=len(deltas) * 2.0**-22)
    close = _negative(margin)
    merged = total.mul_(sign)
    return merged.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)) if normalize else merged, close


def _negative(values: Tensor) -> Tensor:
    """Where `values` `(n,)` are negative."""
    if values.is_cpu:
        return torch.from_numpy(np.flatnonzero(values.numpy() < 0))  # several times faster than torch's
    return (values < 0).nonzero()[:, 0]
