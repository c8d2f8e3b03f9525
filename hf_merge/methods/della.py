"""Random drop by the rank of magnitudes, then sign election and disjoint merge."""

from collections.abc import Callable

from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.consensus import disjoint
from hf_merge.tensors.ranks import Pruning, magprune, prune_in_norm
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model


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


def della(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.7,
    epsilon: PerModel = 0.07,
    rescale: bool = True,
    match_l1: bool = False,
    normalize: bool = True,
    rng: Draws,
    measured: Pruning | None,
    shape: tuple[int, ...],
) -> Tensor:
    """DELLA (arXiv:2406.11617, section 3): MagPrune in place of the trim of TIES, then elect and merge (see `disjoint`).

    An element stays with a chance p that rises with the rank of its magnitude in its row (the last axis) from density - ε to
    density + ε, ε being half of the paper's window, and is divided by p if `rescale`. ε shrinks to what fits into [0, 1].

    mergekit instead multiplies what stays so that each tensor keeps its L1 norm (`match_l1`, which replaces the division; not
    where a norm is below 1e-7), and takes `density` 1 and `epsilon` 0.15 unless told otherwise; of a tensor with more than two
    axes it ranks along the second.
    """
    if measured is None:
        pruned = magprune(deltas, density, epsilon, row_length(shape), rng, rescale)
    else:
        pruned = measured.of(deltas, rng.block)
    return disjoint(pruned, per_model(weights, deltas), normalize)


METHOD = Method(
    name="della",
    merge=della,
    measure=measure,
    measures_if=lambda arguments: bool(arguments["match_l1"]),
    title="DELLA",
    paper="arXiv:2406.11617",
    block="rows",
)
