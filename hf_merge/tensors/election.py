"""Sign election by the deltas alone, whatever the models' weights."""

import torch
from torch import Tensor


def elect_unweighted(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Disjoint merge of `deltas` `(models, n)` with `weights` `(models, 1)` where every model's vote counts alike.

    The elected sign is that of Σ_k δ_k (+ where it is zero; arXiv:2306.01708, section 4). The weighted deltas
    of the models whose delta has that sign are added up and, if `normalize`, divided by the sum of their |weights|.
    """
    # In float64, or rounding would let the models' order elect the sign where deltas cancel.
    vote = torch.zeros_like(deltas[0], dtype=torch.float64)
    for values in deltas:
        vote += values
    positive = vote >= 0
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for values, weight in zip(deltas, weights, strict=True):
        agree = ((values > 0) == positive) & (values != 0)
        total += values * weight * agree
        divisor += agree * weight.abs()
    return total / torch.where(divisor > 0, divisor, 1) if normalize else total
