"""Dropping elements of deltas: by magnitude (exact count) or at random (exact expectation).

Deltas are `(models, n)` float32: one flattened tensor, or one block of it, for each model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.tensors.rng import STEPS, Draws

PerModel = float | Tensor
"""A hyperparameter that is one number, or one number for each model `(models,)`."""

Blocks = Callable[[], Iterable[Tensor]]
"""Gives the blocks `(models, b)` of a tensor in order, anew at each call."""

_MAGNITUDE = 0x7FFFFFFF
_HIGH_BINS, _LOW_BINS = 1 << 15, 1 << 16


def per_model(value: PerModel, deltas: Tensor) -> Tensor:
    """`value` as a column `(models, 1)` that broadcasts over `deltas`."""
    column = torch.as_tensor(value, dtype=deltas.dtype, device=deltas.device).reshape(-1, 1)
    return column.expand(deltas.shape[0], 1)


def kept(density: float, n: int) -> int:
    """How many of `n` elements a density keeps: max(1, round(density n)), and none at density 0."""
    return max(1, round(density * n)) if density > 0 and n > 0 else 0


@dataclass(frozen=True)
class Cutoffs:
    """Where each model's tensor is cut: elements above `bits` stay, of those equal to it the ones up to index `last`.

    `bits` `(models, 1)` is the magnitude's float32 bit pattern (which orders as the magnitude does), `last` `(models, 1)`
    a flat index, so the count that stays is exact and ties go to the lowest index.
    """

    bits: Tensor
    last: Tensor


def cutoffs(blocks: Blocks, density: Sequence[float], n: int) -> Cutoffs:
    """The cutoffs that keep `kept(density, n)` largest magnitudes of each model's `n` elements.

    A radix selection on the bits, 15 and then 16 of them: linear in n, exact, and with a fixed amount of memory.
    """
    counts = [kept(d, n) for d in density]
    high = _histogram(blocks, len(counts), lambda bits: bits >> 16, _HIGH_BINS)
    tops = [_bin_from_top(h, c) for h, c in zip(high, counts, strict=True)]
    prefix = torch.tensor([top for top, _ in tops]).reshape(-1, 1)
    low = _histogram(blocks, len(counts), lambda bits: bits & 0xFFFF, _LOW_BINS, prefix)
    lows = [_bin_from_top(h, c - above) for h, c, (_, above) in zip(low, counts, tops, strict=True)]
    bits = [(top << 16) | bottom for (top, _), (bottom, _) in zip(tops, lows, strict=True)]
    need = [c - above - over for c, (_, above), (_, over) in zip(counts, tops, lows, strict=True)]
    equal = [int(h[bottom]) for h, (bottom, _) in zip(low, lows, strict=True)]
    last = _last_equal(blocks, bits, need, equal, n)
    return Cutoffs(torch.tensor(bits, dtype=torch.int32).reshape(-1, 1), torch.tensor(last).reshape(-1, 1))


def trim(deltas: Tensor, cut: Cutoffs, start: int = 0) -> Tensor:
    """`deltas` `(models, b)`, whose first column is element `start` of the tensor, with what is cut set to zero."""
    trimmed = torch.empty_like(deltas)
    thresholds = cut.bits.view(torch.float32)[:, 0].tolist()
    for row, threshold, last, out in zip(deltas, thresholds, cut.last[:, 0].tolist(), trimmed, strict=True):
        magnitude = row.abs()
        keep = magnitude > threshold
        early = slice(0, max(0, last + 1 - start))
        keep[early] |= magnitude[early] == threshold
        torch.mul(row, keep, out=out)
    return trimmed


def drop(deltas: Tensor, density: PerModel, rng: Draws) -> Tensor:
    """DARE's drop and rescale: each element stays with probability `density` and is divided by it (arXiv:2311.03099, eq. 3)."""
    kept_deltas = torch.zeros_like(deltas)
    for model, chance in enumerate(per_model(density, deltas)[:, 0].tolist()):
        steps = min(STEPS, max(1, round(chance * STEPS))) if chance > 0 else 0
        if steps:
            mask = rng.uniform(model, deltas.shape[1]).to(deltas.device) < steps
            torch.mul(deltas[model], mask, out=kept_deltas[model]).mul_(STEPS / steps)
    return kept_deltas


def _histogram(
    blocks: Blocks, models: int, digit: Callable[[Tensor], Tensor], bins: int, prefix: Tensor | None = None
) -> list[Tensor]:
    totals = [torch.zeros(bins, dtype=torch.int64) for _ in range(models)]
    for block in blocks():
        bits = block.view(torch.int32) & _MAGNITUDE
        for model, row in enumerate(bits):
            if prefix is not None:
                row = row[(row >> 16) == int(prefix[model])]
            totals[model] += torch.bincount(digit(row), minlength=bins).cpu()
    return totals


def _bin_from_top(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th element from the top, and how many elements are in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, max(count, 1)))
    place = min(place, len(histogram) - 1)
    return len(histogram) - 1 - place, int(from_top[place] - histogram[len(histogram) - 1 - place])


def _last_equal(blocks: Blocks, bits: list[int], need: list[int], equal: list[int], n: int) -> list[int]:
    """Flat index of the `need`-th element with magnitude `bits`, for each model: -1 for none, n for all of them."""
    last = [-1 if want <= 0 else n for want in need]
    open_models = {m for m in range(len(bits)) if 0 < need[m] < equal[m]}
    seen, start = [0] * len(bits), 0
    for block in blocks() if open_models else ():
        for model in sorted(open_models):
            places = ((block[model].view(torch.int32) & _MAGNITUDE) == bits[model]).nonzero()[:, 0]
            if seen[model] + len(places) >= need[model]:
                last[model] = start + int(places[need[model] - seen[model] - 1])
                open_models.discard(model)
            seen[model] += len(places)
        if not open_models:
            break
        start += block.shape[1]
    return last
