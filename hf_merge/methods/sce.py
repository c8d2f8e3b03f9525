"""Select, calculate, erase: deltas weighted by their size in each tensor, where models differ most."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.election import elect_unweighted
from hf_merge.tensors.sparsify import Blocks, Cutoffs, cutoffs, kept, per_model, trim

SMALL = 1e-6
"""Sum of the models' mean squares below which `uniform_fallback` weighs the models alike."""


@dataclass(frozen=True)
class Measured:
    """Where the spread over the models is cut, if it is, and the models' coefficients."""

    cut: Cutoffs | None
    coefficients: Tensor


def measure(blocks: Blocks, n: int, select_topk: float = 1.0, uniform_fallback: bool = False) -> Measured:
    """The cut of the selection, and from the mean squares of what it leaves the coefficients of one tensor."""

    def spreads() -> Iterable[Tensor]:
        return (_spread(block) for block in blocks())

    cut = None
    if select_topk < 1:
        differing = sum(int((block[1:] != block[0]).any(0).sum()) for block in blocks())
        cut = cutoffs(spreads, [kept(select_topk, differing) / max(n, 1)], n)
    squares, start = torch.zeros((), dtype=torch.float64), 0
    for block in blocks():
        selected = _selected(block, cut, start)
        squares = squares + torch.stack([row.double().square_().sum() for row in selected]).cpu()
        start += block.shape[1]
    total = float(squares.sum())
    if total == 0 or (uniform_fallback and total / max(n, 1) < SMALL):
        return Measured(cut, torch.full_like(squares, 1 / len(squares)))
    return Measured(cut, squares / total)


def sce(
    deltas: Tensor, *, select_topk: float = 1.0, uniform_fallback: bool = False, measured: Measured, start: int = 0
) -> Tensor:
    """SCE (arXiv:2408.07990, section 3.3), per tensor.

    Select: of the elements where models differ, the `select_topk` fraction in which their variance is largest stays,
    max(1, round(…)) of them; 1 keeps everything. Calculate: model k's coefficient is Σ δ_k² / Σ_j Σ δ_j² of what stays.
    Erase: elect a sign on the sum of the deltas, and average those that have it, weighted by their coefficients.

    mergekit gives all models the same coefficient where the sum of their mean δ² is below 1e-6 (`uniform_fallback`), which is
    common for real fine-tunes, and selects ⌊…⌋ elements, perhaps none.
    """
    return elect_unweighted(_selected(deltas, measured.cut, start), per_model(measured.coefficients, deltas), normalize=True)


def _spread(block: Tensor) -> Tensor:
    """Root of the sum of squared differences from the models' mean `(1, b)`: orders as the variance, and does not underflow."""
    mean, total = torch.zeros(2, block.shape[1], dtype=torch.float64, device=block.device)
    for row in block:
        mean += row
    mean /= len(block)
    for row in block:
        difference = mean - row
        total.addcmul_(difference, difference)
    return total.sqrt_().to(block.dtype)[None]


def _selected(block: Tensor, cut: Cutoffs | None, start: int) -> Tensor:
    return block if cut is None else block * (trim(_spread(block), cut, start) != 0)


METHOD = Method(name="sce", merge=sce, measure=measure, title="SCE", paper="arXiv:2408.07990")
