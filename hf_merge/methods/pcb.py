"""Models compete for each element, by its size in the model and by its agreement with the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import Blocks, PerModel, cutoffs, per_model

OUTLIERS = 1e-4
"""Fraction of a tensor's elements at either end of its magnitudes that is clamped."""


@dataclass(frozen=True)
class Scales:
    """For each model, as columns `(models, 1)`: what magnitudes are clamped to, and the scores that become 0 and 1."""

    least: Tensor
    greatest: Tensor
    cut: Tensor
    best: Tensor


def measure(blocks: Callable[[], Iterable[Tensor]], n: int, ratio: float = 0.1) -> Scales:
    """The scales of one tensor, or of a whole model: order statistics of its magnitudes, then of its scores."""
    outliers = int(OUTLIERS * n)
    greatest, least = _ranked(lambda: (block.abs() for block in blocks()), [1 + outliers, n - outliers], n)

    def scores() -> Iterable[Tensor]:
        return (_scores(block, least, greatest) for block in blocks())

    # The lower part of a score's two can only hold what the upper one, cut off at 0, does not.
    places = [max(1, n - int(n * (1 - ratio))), 1]
    above = _ranked(lambda: (found.clamp_min(0) for found in scores()), places, n)
    below = _ranked(lambda: (-found.clamp_max(0) for found in scores()), [n + 1 - place for place in places], n)
    cut, best = (torch.where(high > 0, high, -low) for high, low in zip(above, below, strict=True))
    return Scales(least, greatest, cut, best)


def pcb(deltas: Tensor, *, weights: PerModel = 1.0, ratio: float = 0.1, whole_model: bool = False, measured: Scales) -> Tensor:
    """Σ_k w_k s_k τ_k / Σ_k s_k, τ_k the deltas with their magnitudes clamped at the quantiles `OUTLIERS` and 1 - `OUTLIERS`
    (PCB-Merging, arXiv:2410.02396, section 3; the form of its published code).

    s_k is the score exp(K u_k²) tanh(δ_k Σ_j δ_j), with u_k = |τ_k| put on [0, 1]: competition within model k times agreement
    with all K. Scores are put on [0, 1] from their 1 - `ratio` quantile up, so that about the fraction `ratio` is kept;
    where a tensor is too small to have a score above it, the best one counts 1 if it is positive.

    Quantiles are of each tensor; the paper's are of the whole model (`whole_model`). The paper takes `ratio` 0.1 or
    0.05 and `scaling` 1.2, or searches the weights. tanh is not homogeneous: the result depends on the deltas' units.
    """
    column = per_model(weights, deltas).double()
    total, divisor = (torch.zeros_like(deltas[0], dtype=torch.float64) for _ in range(2))
    clamped = _clamped(deltas, measured.least, measured.greatest) * deltas.sign()
    shares = _shares(_scores(deltas, measured.least, measured.greatest), measured).double()
    for values, share, weight in zip(clamped, shares, column, strict=True):
        total += values * share * weight
        divisor += share
    return (total / divisor.clamp_min(1e-12)).to(deltas.dtype)


def _clamped(deltas: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    return deltas.abs().clamp(least.to(deltas.device), greatest.to(deltas.device))


def _scores(deltas: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """The scores divided by exp(K), their greatest factor, which many models would take out of float32's range."""
    span = (greatest - least).to(deltas.device)
    size = (_clamped(deltas, least, greatest) - least.to(deltas.device)) / torch.where(span > 0, span, 1.0)
    # In float64, or rounding would let the models' order decide where deltas cancel.
    together = sum((values.double() for values in deltas[1:]), deltas[0].double()).to(deltas.dtype)
    return (len(deltas) * (size.square() - 1)).exp() * (deltas * together).tanh()


def _shares(scores: Tensor, scales: Scales) -> Tensor:
    cut, best = scales.cut.to(scores.device), scales.best.to(scores.device)
    span = best - cut
    alone = (scores >= best) & (scores > 0)
    return torch.where(span > 0, ((scores - cut) / torch.where(span > 0, span, 1.0)).clamp_min(0), alone)


def _ranked(blocks: Blocks, places: Sequence[int], n: int) -> list[Tensor]:
    """For each of `places` (1 for the greatest), the value there of each model's `n` non-negative ones, `(models, 1)`."""
    models = len(next(iter(blocks())))
    densities = [place / max(n, 1) for place in places for _ in range(models)]
    found = cutoffs(lambda: (torch.cat([block] * len(places)) for block in blocks()), densities, n)
    return list(found.bits.view(torch.float32).split(models))


METHOD = Method(name="pcb", merge=pcb, measure=measure, title="PCB-Merging", paper="arXiv:2410.02396")
