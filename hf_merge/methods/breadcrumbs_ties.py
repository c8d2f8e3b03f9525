"""Deltas without their largest and their smallest changes, then sign election and disjoint merge."""

from torch import Tensor

from hf_merge.methods.breadcrumbs import measure
from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import disjoint
from hf_merge.tensors.ranks import Band, middle
from hf_merge.tensors.sparsify import PerModel, per_model


def breadcrumbs_ties(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.15,
    gamma: PerModel = 0.006,
    row_wise: bool = True,
    match_l1: bool = False,
    round_down: bool = False,
    normalize: bool = True,
    measured: tuple[Band | None, Tensor | None] | None,
    start: int = 0,
    shape: tuple[int, ...],
) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795, section 3) in place of the trim of TIES, then elect and merge.

    See `breadcrumbs` for what stays of a delta and for mergekit's reading, and `disjoint` for `normalize`, which mergekit
    has off unless told otherwise.
    """
    band, gains = measured or (None, None)
    stayed = middle(deltas, density, gamma, row_length(shape)) if band is None else band.of(deltas, start)
    if gains is not None:
        stayed *= per_model(gains, deltas)
    return disjoint(stayed, per_model(weights, deltas), normalize)


METHOD = Method(
    name="breadcrumbs_ties",
    merge=breadcrumbs_ties,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"] or not arguments["row_wise"]),
    title="Model Breadcrumbs TIES",
    paper="arXiv:2312.06795",
    block="rows",
)
