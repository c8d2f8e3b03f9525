"""Weighted sum of deltas."""

from collections.abc import Sequence

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import PerModel
from hf_merge.tensors.weighting import shares


def task_arithmetic(models: int, *, weights: PerModel = 1.0, normalize: bool = False) -> Sequence[float]:
    """Σ_k w_k δ_k (arXiv:2212.04089, section 2), divided by Σ_k w_k if `normalize` (unless that is next to 0)."""
    return shares(weights, models, normalize)


METHOD = Method(name="task_arithmetic", coefficients=task_arithmetic, title="Task arithmetic", paper="arXiv:2212.04089")
