"""Random drop by the rank of magnitudes, then a weighted sum."""

from collections.abc import Callable

from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.ranks import magprune
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model
from hf_merge.tensors.weighting import l1_gains, shares


def measure(
    blocks: Blocks,
    n: int,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    match_l1: bool = False,
    *,
    shape: tuple[int, ...],
    draws: Callable[[int], Draws],
) -> Tensor | None:
    """What each model's pruned tensor is multiplied with to have the L1 norm of its delta."""
    if not match_l1:
        return None
    row = row_length(shape)
    return l1_gains(blocks, lambda number, _, block: magprune(block, density, epsilon, row, draws(number), rescale=False))


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
    measured: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """Σ_k w_k m_k ⊙ δ_k / p_k, with MagPrune's masks m_k and their chances p_k (arXiv:2406.11617, section 3.1).

    See `della` for everything but the sum, which `normalize` divides by Σ_k w_k (unless that is next to 0).
    """
    pruned = magprune(deltas, density, epsilon, row_length(shape), rng, rescale and not match_l1)
    if measured is not None:
        pruned *= per_model(measured, deltas)
    return weighted_sum(pruned, shares(per_model(weights, deltas), normalize))


METHOD = Method(
    name="della_linear", merge=della_linear, measure=measure, title="DELLA linear", paper="arXiv:2406.11617", block="rows"
)
