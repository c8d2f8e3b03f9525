"""What several models need, found by TALL masks."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import PerModel, per_model


def consensus(deltas: Tensor, *, weights: PerModel = 1.0, threshold: float = 0.4, agreement: int = 2) -> Tensor:
    """Σ_k w_k δ_k where at least `agreement` models need it (all of them, if there are fewer); 0 elsewhere
    (arXiv:2405.07813, section 5).

    Model k needs an element if |δ_k| > `threshold` |Σ_j w_j δ_j - δ_k|: its own change outweighs what the others make of it
    (its TALL mask, eq. 3). `agreement` 0 is task arithmetic.
    """
    column = per_model(weights, deltas).double()
    # In float64, or rounding would let the models' order decide at the threshold.
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for values, weight in zip(deltas, column, strict=True):
        total += values.double() * weight
    needed = torch.zeros_like(deltas[0], dtype=torch.int32)
    for values in deltas.double():
        needed += values.abs() > threshold * (total - values).abs()
    return (total * (needed >= min(agreement, len(deltas)))).to(deltas.dtype)


METHOD = Method(name="consensus", merge=consensus, title="Consensus (TALL masks)", paper="arXiv:2405.07813")
