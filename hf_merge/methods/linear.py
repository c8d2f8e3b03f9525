"""Weighted average of weights."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model


def linear(stack: Tensor, *, weights: PerModel = 1.0, normalize: bool = True) -> Tensor:
    """Σ_k w_k θ_k, divided by Σ_k w_k if `normalize`: at equal weights the uniform soup (arXiv:2203.05482, section 3)."""
    weights = per_model(weights, stack)
    if normalize:
        weights = (weights.double() / weights.double().sum()).to(stack.dtype)
    return weighted_sum(stack, weights)


METHOD = Method(name="linear", merge=linear, title="Linear", paper="arXiv:2203.05482", space="weight", linear=True)
