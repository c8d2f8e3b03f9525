"""Changes that several models share averaged, changes of one model kept whole."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method


def ram(deltas: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """RAM (arXiv:2601.13572): the mean of δ_k over the models that change the element, |δ_k| > `epsilon`; 0 if none does."""
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for values in deltas:
        changed = values.abs() > epsilon
        total += values * changed
        count += changed
    return total / count.clamp_min_(1)


METHOD = Method(name="ram", merge=ram, title="RAM", paper="arXiv:2601.13572")
