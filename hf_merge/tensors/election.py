"""Sign election by the deltas alone, whatever the models' weights."""

import numpy as np
import torch
from torch import Tensor


def elect_unweighted(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Disjoint merge of `deltas` `(models, n)` with `weights` `(models, 1)` where every model's vote counts alike.

    The elected sign is that of Σ_k δ_k (+ where it is zero; arXiv:2306.01708, section 4). The weighted deltas
    of the models whose delta has that sign are added up and, if `normalize`, divided by the sum of their |weights|.
    """
    factors = weights[:, 0].tolist()
    merged, margin = _elected(deltas, factors, deltas.sum(0), normalize)
    # Where deltas nearly cancel, rounding in float32 would let the models' order elect the sign.
    close = torch.from_numpy(np.flatnonzero(margin.cpu().numpy() < 0)).to(deltas.device)  # several times faster than torch's
    if len(close):
        few = deltas[:, close]
        merged[close] = _elected(few, factors, few.sum(0, dtype=torch.float64).to(few.dtype), normalize)[0]
    return merged


def _elected(deltas: Tensor, factors: list[float], vote: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The disjoint merge with the signs of `vote` `(n,)`, and what is negative where rounding may have decided those."""
    positive = torch.ones((), dtype=vote.dtype, device=vote.device)
    sign = torch.copysign(positive, vote + 0.0)  # -0.0 + 0.0 is 0.0
    total, divisor, sizes = (torch.zeros_like(vote) for _ in range(3))
    agreeing = torch.empty_like(vote)
    for values, factor in zip(deltas, factors, strict=True):
        torch.mul(values, sign, out=agreeing).relu_()
        sizes.add_(agreeing)
        total.add_(agreeing, alpha=factor)
        if normalize:
            divisor.add_(agreeing.sign_(), alpha=abs(factor))
    # A sum of k numbers is off by at most k 2⁻²⁴ of their magnitudes' sum: where its sign is wrong, twice the `sizes`.
    margin = torch.abs(vote, out=agreeing).sub_(sizes, alpha=len(deltas) * 2.0**-22)
    total.mul_(sign)
    return total.div_(divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)) if normalize else total, margin
