"""Random drop and rescale, then sign election and disjoint merge."""

from collections.abc import Sequence

from torch import Tensor

from hf_merge.methods.dare_linear import measure
from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import disjoint
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import PerModel, drop, per_model


def dare_ties(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.5,
    rescale: bool = True,
    match_l1: bool = False,
    normalize: bool = True,
    rng: Draws,
    measured: Sequence[float] | None,
) -> Tensor:
    """DARE's drop and rescale in place of the trim of TIES (arXiv:2311.03099, section 3; arXiv:2306.01708, section 4).

    See `dare_linear` for `rescale` and `match_l1`, which is mergekit's reading, and `disjoint` for `normalize`, which
    mergekit has off, with `density` 1, unless told otherwise.
    """
    dropped = drop(deltas, density, rng, rescale and measured is None, measured)
    return disjoint(dropped, per_model(weights, deltas), normalize)


METHOD = Method(
    name="dare_ties",
    merge=dare_ties,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"]),
    title="DARE TIES",
    paper="arXiv:2311.03099",
)
