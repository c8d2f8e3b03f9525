"""Weighted sum of deltas without their largest and their smallest changes."""

from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.ranks import Band, bands, middle
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model
from hf_merge.tensors.weighting import l1_gains, shares


def measure(
    blocks: Blocks,
    n: int,
    density: PerModel = 0.15,
    gamma: PerModel = 0.006,
    row_wise: bool = True,
    match_l1: bool = False,
    round_down: bool = False,
    *,
    shape: tuple[int, ...],
) -> tuple[Band | None, Tensor | None]:
    """Where each model's tensor is cut, if not by rows; and what the rest is multiplied with, if anything."""
    band = None if row_wise else bands(blocks, density, gamma, n, round_down)
    row = row_length(shape)

    def left(_: int, start: int, block: Tensor) -> Tensor:
        return middle(block, density, gamma, row) if band is None else band.of(block, start)

    return band, l1_gains(blocks, left) if match_l1 else None


def breadcrumbs(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.15,
    gamma: PerModel = 0.006,
    row_wise: bool = True,
    match_l1: bool = False,
    round_down: bool = False,
    normalize: bool = False,
    measured: tuple[Band | None, Tensor | None] | None,
    start: int = 0,
    shape: tuple[int, ...],
) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795, section 3): Σ_k w_k δ_k, each delta without its largest and smallest magnitudes.

    Of each row (the last axis) the ⌊γ n⌋ largest magnitudes go, and of the others the max(1, round(density n)) largest stay;
    if both do not fit, fewer of the largest go. Without `row_wise` the same in the whole tensor: mergekit's reading, with
    `density` 1 and `gamma` 0.01 unless told otherwise, and ⌊density n⌋ elements (`round_down`). `normalize` divides the sum by
    Σ_k w_k (unless that is next to 0), and `match_l1` multiplies what stays of a delta so that it keeps its L1 norm (mergekit's
    `rescale`); both are off there too.
    """
    band, gains = measured or (None, None)
    stayed = middle(deltas, density, gamma, row_length(shape)) if band is None else band.of(deltas, start)
    if gains is not None:
        stayed *= per_model(gains, deltas)
    return weighted_sum(stayed, shares(weights, len(deltas), normalize))


METHOD = Method(
    name="breadcrumbs",
    merge=breadcrumbs,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"] or not arguments["row_wise"]),
    title="Model Breadcrumbs",
    paper="arXiv:2312.06795",
    block="rows",
)
