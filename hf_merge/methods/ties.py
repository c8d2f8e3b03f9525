"""Trim, elect sign, disjoint merge."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import elected
from hf_merge.tensors.sparsify import Blocks, Cutoffs, PerModel, cutoffs, per_model, rounded_down, trim
from hf_merge.tensors.weighting import l1_gains


@dataclass(frozen=True)
class Measured:
    """Where each model's tensor is cut, and what the rest of it is multiplied with, if anything."""

    cut: Cutoffs
    gains: Tensor | None


def measure(blocks: Blocks, n: int, density: PerModel = 0.2, match_l1: bool = False, round_down: bool = False) -> Measured:
    """Where each model's tensor is cut to keep the `density` fraction of largest magnitude."""
    first = next(iter(blocks()))
    densities = per_model(density, first[:, :0].double())[:, 0].tolist()
    cut = cutoffs(blocks, [rounded_down(d, n, least=1) if round_down else d for d in densities], n)
    return Measured(cut, l1_gains(blocks, lambda _, start, block: trim(block, cut, start)) if match_l1 else None)


def ties(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    density: PerModel = 0.2,
    normalize: bool = True,
    weighted_election: bool = True,
    whole_model: bool = False,
    match_l1: bool = False,
    round_down: bool = False,
    measured: Measured,
    start: int = 0,
) -> Tensor:
    """TIES (arXiv:2306.01708, section 4): trim each delta to its `density` largest magnitudes, elect a sign, merge what agrees.

    Exactly max(1, round(density n)) elements stay, ties by lowest index: of each tensor, as in mergekit and PEFT, or with
    `whole_model` of all tensors together, as in the paper. The sign is elected on the weighted trimmed deltas, as in
    mergekit; without `weighted_election` on the trimmed deltas, as in the paper, which has no weights. See `disjoint` for
    the sum and for `normalize`.

    `match_l1` multiplies what stays of a delta so that it keeps its L1 norm (mergekit's `rescale`, off there too; not
    where a norm is below 1e-7). mergekit's `density` is 1 unless told otherwise, and it keeps max(1, ⌊density n⌋) elements
    (`round_down`).
    """
    column = per_model(weights, deltas)
    votes = column if weighted_election else torch.ones_like(column)
    if measured.gains is None:
        return elected(deltas, votes, column, normalize, measured.cut, start)
    return elected(trim(deltas, measured.cut, start) * per_model(measured.gains, deltas), votes, column, normalize)


METHOD = Method(name="ties", merge=ties, measure=measure, title="TIES", paper="arXiv:2306.01708")
