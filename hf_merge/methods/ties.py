"""Trim, elect sign, disjoint merge."""

from collections.abc import Callable, Iterable

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import disjoint
from hf_merge.tensors.sparsify import Cutoffs, PerModel, cutoffs, per_model, trim


def measure(blocks: Callable[[], Iterable[Tensor]], n: int, density: PerModel = 0.2) -> Cutoffs:
    """Where each model's tensor is cut to keep the `density` fraction of largest magnitude."""
    first = next(iter(blocks()))
    return cutoffs(blocks, per_model(density, first[:, :0].double())[:, 0].tolist(), n)


def ties(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.2,
    normalize: bool = True,
    measured: Cutoffs,
    start: int = 0,
) -> Tensor:
    """TIES (arXiv:2306.01708, section 4): trim each delta to its `density` largest magnitudes, elect a sign, merge what agrees.

    Per tensor, exactly max(1, round(density n)) elements stay, ties by lowest index. The sign is elected on the weighted
    trimmed deltas (the paper has no weights); see `disjoint` for the sum and for `normalize`.
    """
    return disjoint(trim(deltas, measured, start), per_model(weights, deltas), normalize)


METHOD = Method(name="ties", merge=ties, measure=measure, title="TIES", paper="arXiv:2306.01708")
