"""Weighted sum of deltas."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model
from hf_merge.tensors.weighting import shares


def task_arithmetic(deltas: Tensor, *, weights: PerModel = 1.0, normalize: bool = False) -> Tensor:
    """Σ_k w_k δ_k (arXiv:2212.04089, section 2), divided by Σ_k w_k if `normalize` (unless that is next to 0)."""
    return weighted_sum(deltas, shares(per_model(weights, deltas), normalize))


METHOD = Method(name="task_arithmetic", merge=task_arithmetic, title="Task arithmetic", paper="arXiv:2212.04089", linear=True)
