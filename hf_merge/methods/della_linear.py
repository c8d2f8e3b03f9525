"""Random drop by the rank of magnitudes, then a weighted sum."""

from torch import Tensor

from hf_merge.methods.della import measure
from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.ranks import Pruning, magprune
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import PerModel
from hf_merge.tensors.weighting import shares


def della_linear(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    rescale: bool = True,
    match_l1: bool = False,
    normalize: bool = False,
    rng: Draws,
    measured: Pruning | None,
    shape: tuple[int, ...],
) -> Tensor:
    """Σ_k w_k m_k ⊙ δ_k / p_k, with MagPrune's masks m_k and their chances p_k (arXiv:2406.11617, section 3.1).

    See `della` for everything but the sum, which `normalize` divides by Σ_k w_k (unless that is next to 0).
    """
    if measured is None:
        pruned = magprune(deltas, density, epsilon, row_length(shape), rng, rescale)
    else:
        pruned = measured.of(deltas, rng.block)
    return weighted_sum(pruned, shares(weights, len(deltas), normalize))


METHOD = Method(
    name="della_linear",
    merge=della_linear,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"]),
    title="DELLA linear",
    paper="arXiv:2406.11617",
    block="rows",
)
