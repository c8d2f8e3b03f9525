"""Random drop by the rank of magnitudes, then a weighted sum."""

from collections.abc import Callable

from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.ranks import Pruning, magprune, prune_in_norm
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model
from hf_merge.tensors.weighting import shares


def measure(
    blocks: Blocks,
    n: int,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    match_l1: bool = False,
    *,
    shape: tuple[int, ...],
    draws: Callable[[int], Draws],
) -> Pruning | None:
    """What stays of each block, and what each model's is multiplied with to have the L1 norm of its delta."""
    return prune_in_norm(blocks, density, epsilon, row_length(shape), draws) if match_l1 else None


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
    return weighted_sum(pruned, shares(per_model(weights, deltas), normalize))


METHOD = Method(
    name="della_linear",
    merge=della_linear,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"]),
    title="DELLA linear",
    paper="arXiv:2406.11617",
    block="rows",
)
