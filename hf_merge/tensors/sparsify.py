"""Dropping elements of deltas: by magnitude (exact count) or at random (exact expectation).

Deltas are `(models, n)` float32: one flattened tensor, or one block of it, for each model.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_merge.tensors import loops
from hf_merge.tensors.rng import STEPS, Draws

PerModel = float | Tensor
"""A hyperparameter that is one number, or one number for each model `(models,)`."""

Blocks = Callable[[], Iterable[Tensor]]
"""Gives the blocks `(models, b)` of a tensor in order, anew at each call."""

Bits = npt.NDArray[np.uint32]
"""float32 bit patterns without the sign: as integers they order as the magnitudes do."""

MARGIN = 0.01
"""How far off a cut guessed on the first block may be, as a fraction of the elements."""
GATHERED = 1 << 20
"""Magnitudes around the guess that may be gathered for each model, 8 bytes each."""
FEW = 1 << 15
"""Magnitudes up to which they are put in order rather than counted by their digits."""

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
_HIGH_BINS, _LOW_BINS = 1 << 15, 1 << 16


def per_model(value: PerModel, deltas: Tensor) -> Tensor:
    """`value` as a column `(models, 1)` that broadcasts over `deltas`."""
    column = torch.as_tensor(value, dtype=deltas.dtype, device=deltas.device).reshape(-1, 1)
    return column.expand(deltas.shape[0], 1)


def kept(density: float, n: int) -> int:
    """How many of `n` elements a density keeps: max(1, round(density n)), and none at density 0."""
    return max(1, round(density * n)) if density > 0 and n > 0 else 0


def rounded_down(density: float, n: int, least: int = 0) -> float:
    """The density that keeps ⌊density n⌋ of `n` elements, but no fewer than `least` unless it is 0."""
    return max(least, math.floor(density * n)) / n if density > 0 and n > 0 else 0.0


@dataclass(frozen=True)
class Cutoffs:
    """Where each model's tensor is cut: elements above `bits` stay, of those equal to it the ones up to index `last`.

    `bits` `(models, 1)` is the magnitude's float32 bit pattern (which orders as the magnitude does), `last` `(models, 1)`
    a flat index, so the count that stays is exact and ties go to the lowest index.
    """

    bits: Tensor
    last: Tensor

    @cached_property
    def limits(self) -> tuple[list[float], list[float]]:
        """For each model the magnitudes up to which elements go: those with indices up to `last`, and those behind it."""
        thresholds = torch.cat([self.bits - 1, self.bits], dim=1)
        below = torch.where(thresholds < 0, -1.0, thresholds.view(torch.float32))
        return below[:, 0].tolist(), below[:, 1].tolist()

    def splits(self, start: int) -> list[int]:
        """For each model how many elements of a block that begins with element `start` are not behind `last`, if it is long."""
        return [max(0, last + 1 - start) for last in self.last[:, 0].tolist()]


def cutoffs(blocks: Blocks, density: Sequence[float], n: int) -> Cutoffs:
    """The cutoffs that keep `kept(density, n)` largest magnitudes of each model's `n` elements.

    Exact, linear in n and in a fixed amount of memory: in one pass over the blocks where a guess on the first of them was near
    and few magnitudes are close to it, else by radix selection in two or three more.
    """
    counts = {model: kept(d, n) for model, d in enumerate(density) if kept(d, n)}
    found = _near_a_guess(blocks, counts, n)
    found |= _by_radix(blocks, {model: count for model, count in counts.items() if model not in found}, n)
    bits, last = zip(*(found.get(model, (_INFINITY, -1)) for model in range(len(density))), strict=True)
    return Cutoffs(torch.tensor(bits, dtype=torch.int32).reshape(-1, 1), torch.tensor(last).reshape(-1, 1))


def trim(deltas: Tensor, cut: Cutoffs, start: int = 0) -> Tensor:
    """`deltas` `(models, b)`, whose first column is element `start` of the tensor, with what is cut set to zero."""
    trimmed = torch.empty_like(deltas)
    for row, under, at, split, out in zip(deltas, *cut.limits, cut.splits(start), trimmed, strict=True):
        # Zeroes what is not above its second argument: the cut itself, or the float before it.
        torch.hardshrink(row[:split], under, out=out[:split])
        torch.hardshrink(row[split:], at, out=out[split:])
    return trimmed


def steps_of(chance: float) -> int:
    """A chance in multiples of 1 / STEPS: none only if it is 0."""
    return min(STEPS, max(1, round(chance * STEPS))) if chance > 0 else 0


def drop(deltas: Tensor, density: PerModel, rng: Draws, rescale: bool = True, gains: Sequence[float] | None = None) -> Tensor:
    """DARE's drop and rescale: each element stays with probability `density` and is divided by it, if `rescale`
    (arXiv:2311.03099, eq. 3). `gains` are further factors of the models."""
    kept_deltas = torch.empty_like(deltas, memory_format=torch.contiguous_format)
    chances = per_model(density, deltas)[:, 0].tolist()
    for model, (chance, row, out) in enumerate(zip(chances, deltas, kept_deltas, strict=True)):
        steps = steps_of(chance)
        scale = (STEPS / steps if rescale and steps else 1.0) * (gains[model] if gains is not None else 1.0)
        if not 0 < steps < STEPS:
            torch.mul(row, scale if steps else 0.0, out=out)
        elif (values := loops.served(row)) is not None:
            loops.drop(values, rng.key(model), np.uint16(steps), np.float32(scale), out.numpy())
        else:
            stays = rng.uniform(model, deltas.shape[1]).to(deltas.device) < steps
            torch.mul(row, stays.to(row.dtype).mul_(scale), out=out)
    return kept_deltas


def drop_sum(deltas: Tensor, density: PerModel, rng: Draws, rescale: bool, factors: Sequence[float]) -> Tensor:
    """Σ_k f_k times what `drop` makes of δ_k, with a factor for each model: `(n,)`."""
    rows = loops.served(deltas)
    if rows is None:
        return drop(deltas, density, rng, rescale, factors).sum(0)
    total = torch.zeros(deltas.shape[1:])
    for model, (chance, row) in enumerate(zip(per_model(density, deltas)[:, 0].tolist(), rows, strict=True)):
        steps = steps_of(chance)
        if steps:
            scale = factors[model] * (STEPS / steps if rescale else 1.0)
            bound = np.uint16(steps) if steps < STEPS else np.uint32(STEPS)
            loops.drop_add(row, rng.key(model), bound, np.float32(scale), total.numpy())
    return total


@dataclass
class _Window:
    """The magnitudes of one model from `low` to `high`, as they are gathered, and how many lie above."""

    low: int
    high: int
    above: int = 0
    size: int = 0
    gathered: list[tuple[int, npt.NDArray[np.int32], Bits]] = field(default_factory=list)

    def add(self, row: Tensor, start: int) -> None:
        """Gather from a block that begins at element `start`."""
        places, values = np.empty(len(row) + 8, np.int32), np.empty(len(row) + 8, np.uint32)
        inside, above = loops.between(row.cpu().numpy(), np.uint32(self.low), np.uint32(self.high), places, values)
        self.above += above
        self.size += inside
        self.gathered.append((start, places[:inside].copy(), values[:inside].copy()))

    def cut(self, count: int, n: int) -> tuple[int, int] | None:
        """Bits and last index of the cut that keeps `count`; None if it lies outside of the window."""
        need = count - self.above
        if need < 1:
            return None
        if need > self.size:
            return (0, n) if self.low <= 1 else None
        values = np.concatenate([values for _, _, values in self.gathered])
        if self.size <= FEW:
            bits = int(np.partition(values, self.size - need)[self.size - need])
            return self._last(bits, need - int(np.count_nonzero(values > bits)))
        values -= np.uint32(self.low)
        shift = max(0, (self.high - self.low).bit_length() - 16)
        top, above = _bin_from_top(np.bincount(values >> shift), need)
        rest = values[np.flatnonzero(values >> shift == top)] & np.uint32((1 << shift) - 1)
        bottom, over = _bin_from_top(np.bincount(rest), need - above)
        return self._last(self.low + (top << shift) + bottom, need - above - over)

    def _last(self, bits: int, need: int) -> tuple[int, int]:
        """The cut at these `bits`, `need` elements of which stay."""
        for start, places, values in self.gathered:
            equal = np.flatnonzero(values == bits)
            if need <= len(equal):
                return bits, start + int(places[equal[need - 1]])
            need -= len(equal)
        raise AssertionError("a magnitude of the window is in none of its parts")


def _near_a_guess(blocks: Blocks, counts: dict[int, int], n: int) -> dict[int, tuple[int, int]]:
    """Bits and last index of the cuts of models with `counts` to keep, as far as they are found in one pass."""
    windows: dict[int, _Window] = {}
    start = 0
    for block in blocks() if counts else ():
        if start == 0:
            guesses = {model: _guess(block[model], count / n, n) for model, count in counts.items()}
            windows = {model: guess for model, guess in guesses.items() if guess}
        windows = {model: window for model, window in windows.items() if window.size <= GATHERED}
        if not windows:
            break
        for model, window in windows.items():
            window.add(block[model], start)
        start += block.shape[1]
    found = {model: window.cut(counts[model], n) for model, window in windows.items()}
    return {model: cut for model, cut in found.items() if cut is not None}


def _guess(row: Tensor, share: float, n: int) -> _Window | None:
    """A window around the magnitude that a `share` of the first block is not below; None if it would hold too many."""
    sample = _bits(row[:: max(1, len(row) >> 14)])
    top, bottom = int((share - MARGIN) * len(sample)), int((share + MARGIN) * len(sample)) + 1
    ends = [len(sample) - place for place in (bottom, top) if 0 < place <= len(sample)]
    sample = np.partition(sample, ends) if ends else sample
    # No zeros: where the cut is 0, which of them stay does not show.
    low = max(1, int(sample[-bottom])) if bottom <= len(sample) else 1
    high = max(low, int(sample[-top])) if top > 0 else _MAGNITUDE
    inside = np.count_nonzero((sample >= low) & (sample <= high)) / max(1, len(sample))
    return _Window(low, high) if inside * n <= GATHERED else None


def _bits(row: Tensor) -> Bits:
    return row.cpu().numpy().view(np.uint32) & np.uint32(_MAGNITUDE)


def _by_radix(blocks: Blocks, counts: dict[int, int], n: int) -> dict[int, tuple[int, int]]:
    """Bits and last index of the cuts of models with `counts` to keep, from histograms of 15 and then 16 of their bits."""
    high = {model: np.zeros(_HIGH_BINS, np.int64) for model in counts}
    for block in blocks() if counts else ():
        for model, histogram in high.items():
            digits = block[model].view(torch.int32).bitwise_right_shift(16).bitwise_and_(_HIGH_BINS - 1)
            histogram += torch.bincount(digits, minlength=_HIGH_BINS).cpu().numpy()
    tops = {model: _bin_from_top(high[model], count) for model, count in counts.items()}
    low = {model: np.zeros(_LOW_BINS, np.int64) for model in counts}
    for block in blocks() if counts else ():
        for model, (top, _) in tops.items():
            row = _bits(block[model])
            inside = row[np.flatnonzero((row >= top << 16) & (row <= (top << 16) + _LOW_BINS - 1))]
            low[model] += np.bincount(inside & np.uint32(_LOW_BINS - 1), minlength=_LOW_BINS)
    cuts: dict[int, tuple[int, int]] = {}
    partial: dict[int, tuple[int, int]] = {}
    for model, (top, above) in tops.items():
        bottom, over = _bin_from_top(low[model], counts[model] - above)
        cuts[model] = ((top << 16) | bottom, n)
        if counts[model] - above - over < low[model][bottom]:
            partial[model] = (cuts[model][0], counts[model] - above - over)
    return cuts | _last_equal(blocks, partial)


def _bin_from_top(histogram: npt.NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th element from the top, and how many elements are in the bins above it."""
    from_top = histogram[::-1].cumsum()
    place = int(np.searchsorted(from_top, count))
    return len(histogram) - 1 - place, int(from_top[place] - histogram[::-1][place])


def _last_equal(blocks: Blocks, need: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """For models with (bits, how many of the elements with these bits stay): the bits and the index of the last one."""
    found: dict[int, tuple[int, int]] = {}
    start = 0
    for block in blocks() if need else ():
        for model, (bits, count) in list(need.items()):
            places = np.flatnonzero(_bits(block[model]) == bits)
            if count <= len(places):
                found[model] = (bits, start + int(places[count - 1]))
                del need[model]
            else:
                need[model] = (bits, count - len(places))
        if not need:
            break
        start += block.shape[1]
    return found
