"""Random drop and rescale, then sign election and disjoint merge."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import disjoint
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import PerModel, drop, per_model


def dare_ties(
    deltas: Tensor, *, weights: PerModel = 1.0, density: PerModel = 0.5, normalize: bool = True, rng: Draws
) -> Tensor:
    """DARE's drop and rescale in place of the trim of TIES (arXiv:2311.03099, section 3; arXiv:2306.01708, section 4)."""
    return disjoint(drop(deltas, density, rng), per_model(weights, deltas), normalize)


METHOD = Method(name="dare_ties", merge=dare_ties, title="DARE TIES", paper="arXiv:2311.03099")
