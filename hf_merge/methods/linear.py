"""Weighted average of weights."""

from collections.abc import Sequence

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import PerModel
from hf_merge.tensors.weighting import proportions, shares


def linear(models: int, *, weights: PerModel = 1.0, normalize: bool = True) -> Sequence[float]:
    """Σ_k w_k θ_k, divided by Σ_k w_k if `normalize`: at equal weights the uniform soup (arXiv:2203.05482, section 3)."""
    return proportions(weights, models) if normalize else shares(weights, models, normalize=False)


METHOD = Method(name="linear", coefficients=linear, title="Linear", paper="arXiv:2203.05482", space="weight")
