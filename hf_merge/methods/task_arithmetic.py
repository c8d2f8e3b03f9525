"""Weighted sum of deltas."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model


def task_arithmetic(deltas: Tensor, *, weights: PerModel = 1.0) -> Tensor:
    """Σ_k w_k δ_k (arXiv:2212.04089, section 2)."""
    return weighted_sum(deltas, per_model(weights, deltas))


METHOD = Method(name="task_arithmetic", merge=task_arithmetic, title="Task arithmetic", paper="arXiv:2212.04089")
