"""Part of the way from the base to the mean of the models."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum


def paint(deltas: Tensor, *, t: float = 0.5) -> Tensor:
    """t mean_k δ_k, which makes the model (1-t) base + t mean_k θ_k (PAINT, arXiv:2208.05592; for one model
    WiSE-FT, arXiv:2109.01903, eq. 1).

    `t` in [0, 1] is the whole trade-off, from the base's abilities (0) to the new ones (1). Both papers try t = 0, 0.1, …, 1 on
    validation data; without any, WiSE-FT takes 0.5.
    """
    return weighted_sum(deltas, torch.full((len(deltas), 1), t / len(deltas), dtype=deltas.dtype, device=deltas.device))


METHOD = Method(name="paint", merge=paint, title="PAINT", paper="arXiv:2208.05592")
