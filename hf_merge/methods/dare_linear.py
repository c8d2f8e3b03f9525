"""Random drop and rescale, then a weighted sum."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, drop_sum
from hf_merge.tensors.weighting import drop_gains, shares


def measure(
    blocks: Blocks, n: int, density: PerModel = 0.5, match_l1: bool = False, *, draws: Callable[[int], Draws]
) -> Sequence[float] | None:
    """What each model's dropped tensor is multiplied with to have the L1 norm of its delta."""
    return drop_gains(blocks, density, draws).tolist() if match_l1 else None


def dare_linear(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.5,
    rescale: bool = True,
    match_l1: bool = False,
    normalize: bool = False,
    rng: Draws,
    measured: Sequence[float] | None,
) -> Tensor:
    """Σ_k w_k (m_k ⊙ δ_k) / density, m_k ~ Bernoulli(density) (arXiv:2311.03099, section 3).

    Without `rescale` nothing is divided by the density; `normalize` divides the sum by Σ_k w_k (unless that is next to 0).
    mergekit instead multiplies what stays so that each tensor keeps its L1 norm (`match_l1`; not where a norm is below 1e-7),
    and keeps everything (`density` 1) unless told otherwise.
    """
    factors = shares(weights, len(deltas), normalize)
    if measured is not None:
        factors = [factor * gain for factor, gain in zip(factors, measured, strict=True)]
    return drop_sum(deltas, density, rng, rescale and measured is None, factors)


METHOD = Method(
    name="dare_linear",
    merge=dare_linear,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"]),
    title="DARE linear",
    paper="arXiv:2311.03099",
)
