"""Random drop and rescale, then a weighted sum."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import PerModel, drop, per_model


def dare_linear(deltas: Tensor, *, weights: PerModel = 1.0, density: PerModel = 0.5, rng: Draws) -> Tensor:
    """Σ_k w_k (m_k ⊙ δ_k) / density, m_k ~ Bernoulli(density) (arXiv:2311.03099, section 3)."""
    return weighted_sum(drop(deltas, density, rng), per_model(weights, deltas))


METHOD = Method(name="dare_linear", merge=dare_linear, title="DARE linear", paper="arXiv:2311.03099")
