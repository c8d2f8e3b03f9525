"""Select, calculate, erase: deltas weighted by their size in each tensor, where models differ most."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors import loops
from hf_merge.tensors.consensus import elected
from hf_merge.tensors.masks import Bits, only, pack
from hf_merge.tensors.sparsify import Blocks, cutoffs, kept, per_model, rounded_down, trim

KEPT = 1 << 25
"""Elements of a tensor up to which variances are kept between passes."""
SMALL = 1e-6
"""Sum of the models' mean squares below which `uniform_fallback` weighs the models alike."""


@dataclass(frozen=True)
class Measured:
    """What stays of each block, by its first element and in packed bits, if not everything; and the models' coefficients."""

    selected: dict[int, Bits]
    coefficients: Tensor


def measure(
    blocks: Blocks, n: int, select_topk: float = 1.0, uniform_fallback: bool = False, round_down: bool = False
) -> Measured:
    """The elements of one tensor that are selected, and from their mean squares the coefficients."""
    selected = _select(blocks, n, select_topk, round_down) if select_topk < 1 else {}
    squares, start = torch.zeros((), dtype=torch.float64), 0
    for block in blocks():
        stays = only(block, selected[start]) if selected else block
        rows = stays.float().cpu().contiguous().numpy()
        squares = squares + torch.tensor([loops.energy(row) for row in rows], dtype=torch.float64)
        start += block.shape[1]
    total = float(squares.sum())
    if total == 0 or (uniform_fallback and total / max(n, 1) < SMALL):
        return Measured(selected, torch.full_like(squares, 1 / len(squares)))
    return Measured(selected, squares / total)


def sce(
    deltas: Tensor,
    *,
    select_topk: float = 1.0,
    uniform_fallback: bool = False,
    round_down: bool = False,
    measured: Measured,
    start: int = 0,
) -> Tensor:
    """SCE (arXiv:2408.07990, section 3.3), per tensor.

    Select: of the elements where models differ, the `select_topk` fraction in which their variance is largest stays,
    max(1, round(…)) of them; 1 keeps everything. Calculate: model k's coefficient is Σ δ_k² / Σ_j Σ δ_j² of what stays.
    Erase: elect a sign on the sum of the deltas, and average those that have it, weighted by their coefficients.

    mergekit gives all models the same coefficient where the sum of their mean δ² is below 1e-6 (`uniform_fallback`), which is
    common for real fine-tunes, and selects ⌊…⌋ elements, perhaps none (`round_down`).
    """
    stays = only(deltas, measured.selected[start]) if measured.selected else deltas
    column = per_model(measured.coefficients, deltas)
    return elected(stays, torch.ones_like(column), column, normalize=True)


def _select(blocks: Blocks, n: int, fraction: float, round_down: bool) -> dict[int, Bits]:
    """Of the elements where models differ, the `fraction` that vary most: packed bits by the first element of each block."""
    largest = max((abs(float(end)) for block in blocks() if block.numel() for end in block.aminmax()), default=0.0)
    # The largest square comes near the end of float32, so that the smallest one does not underflow.
    scale = 2.0 ** (100 - 2 * math.frexp(largest)[1])
    seen: list[tuple[Tensor, int]] = []

    def found() -> Iterator[tuple[Tensor, int]]:
        if seen:
            yield from seen
            return
        for block in blocks():
            pair = _variance(block, scale)
            if n <= KEPT:
                seen.append(pair)
            yield pair

    differing = sum(count for _, count in found())
    fraction = rounded_down(fraction, differing) if round_down else fraction
    cut = cutoffs(lambda: (values for values, _ in found()), [kept(fraction, differing) / max(n, 1)], n)
    selected, start = {}, 0
    for values, _ in found():
        selected[start] = pack(trim(values, cut, start) != 0)
        start += values.shape[1]
    return selected


def _variance(block: Tensor, scale: float) -> tuple[Tensor, int]:
    """The models' variance `(1, b)` but for a factor: k Σ d² - (Σ d)² of the differences d from the first, times `scale`; and
    in how many elements it is not 0.

    Not from their mean: these sums are exact for deltas of 16-bit weights, so that neither order nor rounding breaks ties.
    """
    if (rows := loops.served(block)) is not None:
        variance = torch.empty(1, block.shape[1])
        return variance, int(loops.variance(rows, scale, variance[0].numpy()))
    first = block[0].double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for row in block[1:]:
        difference = row.double().sub_(first)
        total.add_(difference)
        squares.addcmul_(difference, difference)
    variance = squares.mul_(len(block) * scale).addcmul_(total, total, value=-scale).to(block.dtype)[None]
    return variance, int(variance.count_nonzero())


METHOD = Method(name="sce", merge=sce, measure=measure, title="SCE", paper="arXiv:2408.07990")
