"""Dropping elements by the rank of their magnitude within a row.

Deltas are `(models, b)` float32 with whole rows of `row` elements. Of equal magnitudes the first counts as the largest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_merge.tensors.masks import Bits, only, pack
from hf_merge.tensors.rng import STEPS, Draws
from hf_merge.tensors.sparsify import Blocks, Cutoffs, PerModel, cutoffs, kept, per_model, rounded_down, trim
from hf_merge.tensors.weighting import l1_gains

_MAGNITUDE = 0x7FFFFFFF
_RANGE = 27
"""Bits that tell magnitudes apart at first: 23 within a power of two, and 4 for the powers, down to 2⁻¹⁶ of the largest."""
_BINS = 1 << 10
_COMPARISONS = 4
"""How many comparisons with its row an element may cost on average where bins do not decide its draw."""
_ROUNDS = 16
"""How often neighbors are swapped before a sort of 64 bits is the faster way to the last digits."""

Integers = npt.NDArray[np.int32]


def magprune(deltas: Tensor, density: PerModel, epsilon: PerModel, row: int, rng: Draws, rescale: bool = True) -> Tensor:
    """Random drop whose chance to keep rises with the rank of the magnitude within the row (arXiv:2406.11617, section 3.1).

    Rank r of n, ascending from 0, stays with p = density - ε + 2ε r / (n-1), and is divided by p if `rescale`. A window
    that does not fit into [0, 1] shrinks: ε is at most min(density, 1 - density), so that the mean of p stays the density.
    A row of one element has p = density. p is rounded to multiples of 1 / STEPS and is not 0 unless the density is.
    """
    if not rescale:
        return stays(deltas, density, epsilon, row, rng).to(deltas.dtype).mul_(deltas)
    pruned = torch.empty_like(deltas)
    for model, chances in enumerate(_chances(deltas, density, epsilon, row)):
        steps = _by_rank(deltas[model].reshape(-1, row), chances).reshape(-1)
        draws = rng.uniform(model, deltas.shape[1]).to(deltas.device)
        torch.lt(draws, steps, out=pruned[model]).mul_(deltas[model]).mul_(STEPS / steps.clamp_min(1).to(deltas.dtype))
    return pruned


def stays(deltas: Tensor, density: PerModel, epsilon: PerModel, row: int, rng: Draws) -> Tensor:
    """Which elements `magprune` keeps, 1 or 0, uint8 as `deltas`; either of both where a delta is 0."""
    found = torch.empty(deltas.shape, dtype=torch.uint8, device=deltas.device)
    for model, chances in enumerate(_chances(deltas, density, epsilon, row)):
        rows, draws = deltas[model].reshape(-1, row), rng.uniform(model, deltas.shape[1])
        decided: npt.NDArray[np.uint8] | None = None
        if rows.is_cpu:
            few = len(rows) // 32  # tell whether it would take a sort after all
            if not few or _by_bins(rows[:few].numpy(), chances.numpy(), draws[: few * row].numpy()) is not None:
                decided = _by_bins(rows.numpy(), chances.numpy(), draws.numpy())
        if decided is None:
            torch.lt(draws.to(deltas.device), _by_rank(rows, chances).reshape(-1), out=found[model])
        else:
            found[model] = torch.from_numpy(decided)
    return found


@dataclass(frozen=True)
class Pruning:
    """What `magprune` keeps of each block of a tensor, and factors `(models, 1)` that give back the L1 norms."""

    masks: Sequence[Bits]
    gains: Tensor

    def of(self, deltas: Tensor, number: int) -> Tensor:
        """What stays of `deltas` `(models, b)`, the `number`-th block, with its norm given back."""
        return only(deltas, self.masks[number]).mul_(self.gains.to(deltas))


def prune_in_norm(blocks: Blocks, density: PerModel, epsilon: PerModel, row: int, draws: Callable[[int], Draws]) -> Pruning:
    """As `magprune` of the whole tensor without its division; `draws` gives the random numbers of a block by its number."""
    masks: list[Bits] = []

    def left(number: int, _: int, block: Tensor) -> Tensor:
        masks.append(pack(stays(block, density, epsilon, row, draws(number))))
        return only(block, masks[-1])

    gains = l1_gains(blocks, left)
    return Pruning(masks, gains[:, None])


def middle(deltas: Tensor, density: PerModel, gamma: PerModel, row: int) -> Tensor:
    """Each row without its ⌊γn⌋ largest magnitudes, and of the others only the `kept(density, n)` largest ones.

    If both do not fit into the row, fewer of the largest go. (arXiv:2312.06795, section 3.)
    """
    stayed = torch.zeros_like(deltas)
    densities, tops = (per_model(v, deltas[:, :0].double())[:, 0].tolist() for v in (density, gamma))
    for model, (fraction, top) in enumerate(zip(densities, tops, strict=True)):
        count, skip = band(fraction, top, row)
        if count:
            rows = deltas[model].reshape(-1, row)
            inner, outer = _largest(rows, [skip + count, skip])
            torch.mul(rows, inner ^ outer, out=stayed[model].view(rows.shape))
    return stayed


@dataclass(frozen=True)
class Band:
    """Between which cutoffs the elements of each model's tensor stay."""

    inner: Cutoffs
    outer: Cutoffs

    def of(self, deltas: Tensor, start: int) -> Tensor:
        """What stays of `deltas` `(models, b)`, whose first column is element `start` of the tensor."""
        return trim(deltas, self.inner, start).sub_(trim(deltas, self.outer, start))


def bands(blocks: Blocks, density: PerModel, gamma: PerModel, n: int, round_down: bool = False) -> Band:
    """As `middle`, with the whole tensor of `n` elements for a row; with `round_down` ⌊density n⌋ of them stay."""
    none = next(iter(blocks()))[:, :0].double()
    pairs = zip(*(per_model(v, none)[:, 0].tolist() for v in (density, gamma)), strict=True)
    counts = [band(rounded_down(fraction, n) if round_down else fraction, top, n) for fraction, top in pairs]
    inner = cutoffs(blocks, [(count + skip) / max(n, 1) for count, skip in counts], n)
    return Band(inner, cutoffs(blocks, [skip / max(n, 1) for _, skip in counts], n))


def band(density: float, gamma: float, n: int) -> tuple[int, int]:
    """How many of `n` magnitudes stay, and how many larger ones go: `kept(density, n)`, and ⌊γn⌋ or as many as are left."""
    count = kept(density, n)
    return count, max(0, min(int(gamma * n), n - count))


def _chances(deltas: Tensor, density: PerModel, epsilon: PerModel, row: int) -> Iterator[Tensor]:
    """For each model the steps of 1 / STEPS that each rank stays with, the largest magnitude's first, int32."""
    densities, widths = (per_model(v, deltas[:, :0].double())[:, 0].tolist() for v in (density, epsilon))
    for chance, width in zip(densities, widths, strict=True):
        width = max(0.0, min(width, chance, 1 - chance)) if row > 1 else 0.0
        chances = chance + width - 2 * width * torch.arange(row, dtype=torch.float64) / max(1, row - 1)
        yield (chances * STEPS).round().clamp(1 if chance > 0 else 0, STEPS).int()


def _by_bins(rows: npt.NDArray[np.float32], chances: Integers, draws: Integers) -> npt.NDArray[np.uint8] | None:
    """Where `draws` `(b,)` are below the `chances` `(row,)` of the magnitudes' ranks in `rows`; None if that takes a sort.

    Only draws between the least and the greatest chance ask for a rank, and hardly one of them for more than that of its bin,
    the high digits of its magnitude.
    """
    (count, row), low, high = rows.shape, int(chances[-1]), int(chances[0])
    below = (draws < low).view(np.uint8)
    if low == high or not rows.size:
        return below
    asking = np.flatnonzero(((draws - low).view(np.uint32) < high - low) & (rows.reshape(-1) != 0))
    bits = rows.view(np.int32) & _MAGNITUDE
    bins = min(_BINS, 1 << max(1, row.bit_length() - 1))
    digits = bits >> (_RANGE - bins.bit_length() + 1)
    np.minimum(np.subtract(digits.max(), digits, out=digits), bins - 1, out=digits)
    digits += np.arange(count, dtype=np.int32)[:, None] * bins
    larger = np.zeros(count * bins + 1, np.int32)  # how many elements are in the bins and rows before
    np.cumsum(np.bincount(digits.reshape(-1), minlength=count * bins), dtype=np.int32, out=larger[1:])
    ranks = (row - np.cumsum(np.bincount(chances - low))).astype(np.int32)  # whose chances are above a draw
    found = digits.reshape(-1).take(asking)
    enough = ranks.take(draws.take(asking) - low) + (found >> bins.bit_length() - 1) * row
    stays = larger.take(found + 1) <= enough
    unsure = np.flatnonzero((larger.take(found) < enough) > stays)
    if len(unsure) * row > _COMPARISONS * rows.size:
        return None
    for part in np.array_split(unsure, 1 + len(unsure) * row * 4 // rows.size):
        line, place = np.divmod(asking[part], row)
        before = np.arange(row, dtype=np.int32) < place.astype(np.int32)[:, None]
        # Of equal magnitudes those before count as larger. The bits of packed masks are counted fast.
        above = np.packbits(bits[line] > bits[line, place][:, None] - before, axis=1)
        stays[part] = np.bitwise_count(above).sum(1, dtype=np.int64) < enough[part] - line * row
    below[asking] = stays
    return below


def _by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """`values` `(row,)`, the largest magnitude's first, at the places of the magnitudes in `rows`."""
    values = values.to(rows.device)
    if values[0] == values[-1]:
        return values.expand(rows.shape)
    return torch.empty(rows.shape, dtype=values.dtype, device=rows.device).scatter_(1, _places(rows), values.expand(rows.shape))


def _places(rows: Tensor) -> Tensor:
    """The places of each row's elements, int64, the largest magnitude's first."""
    # One sort of keys that hold the magnitude, the largest first, above the place.
    width = (rows.shape[1] - 1).bit_length()
    place = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    bits = rows.view(torch.int32) & _MAGNITUDE
    if rows.is_cpu and rows.numel():
        # 32 bits sort in half of the time of 64. They have no room for the last digits of the magnitudes, which differences of
        # 16-bit floats hardly have, and others seldom need.
        cut = max(0, _RANGE + width - 32)
        keys = (bits >> cut).neg_()
        keys.sub_(keys.min()).clamp_(max=(1 << (_RANGE - cut)) - 1).bitwise_left_shift_(width).bitwise_or_(place)
        keys.numpy().view(np.uint32).sort(axis=1)
        places = keys.bitwise_and_((1 << width) - 1).long()
        if _settled(bits.gather(1, places).numpy(), places.numpy()):
            return places
    keys = (bits ^ _MAGNITUDE).long().bitwise_left_shift_(width).bitwise_or_(place)
    if rows.is_cpu:
        keys.numpy().sort(axis=1)  # in place; half of the time that torch needs
    else:
        keys = keys.sort(dim=1).values
    return keys.bitwise_and_((1 << width) - 1)


def _settled(bits: Integers, places: npt.NDArray[np.int64]) -> bool:
    """Swap neighbors in the rows of `bits`, and their `places`, until they descend; False if that is not soon."""
    row, bits, places = bits.shape[1], bits.reshape(-1), places.reshape(-1)
    wrong = np.flatnonzero(bits[1:] > bits[:-1])
    for _ in range(_ROUNDS):
        wrong = wrong[(wrong + 1) % row != 0]
        if not len(wrong) or len(wrong) > len(bits) // 8:
            break
        first = wrong[np.diff(wrong, prepend=-2) > 1]
        for values in (bits, places):
            values[first], values[first + 1] = values[first + 1], values[first]
        near = np.unique(np.concatenate([wrong, first - 1, first + 1]))
        near = near[(near >= 0) & (near < len(bits) - 1)]
        wrong = near[bits[near + 1] > bits[near]]
    return not len(wrong)


def _largest(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """For each of `counts`, where each row has so many of its largest magnitudes, the first of equal ones: 1 or 0, uint8."""
    n, bits = rows.shape[1], rows.view(torch.int32) & _MAGNITUDE
    cuts = _ascending(bits, [n - count for count in counts if 0 < count < n])
    found = []
    for count in counts:
        keep = torch.full(rows.shape, int(count > 0), dtype=torch.uint8, device=rows.device)
        if 0 < count < n:
            cut = cuts[n - count]
            torch.ge(bits, cut, out=keep)
            several = (keep.sum(1, dtype=torch.int32) > count).nonzero()[:, 0]  # rows where not all that stand at the cut stay
            if len(several):
                above, equal = bits[several] > cut[several], bits[several] == cut[several]
                keep[several] = (
                    above | (equal & (equal.cumsum(1, dtype=torch.int32) <= count - above.sum(1, keepdim=True)))
                ).to(keep.dtype)
        found.append(keep)
    return found


def _ascending(bits: Tensor, places: list[int]) -> dict[int, Tensor]:
    """The elements of each row `(rows, 1)` that stand at `places` in ascending order."""
    if bits.is_cuda:
        return {place: bits.kthvalue(place + 1, dim=1, keepdim=True).values for place in places}
    ordered = torch.from_numpy(np.partition(bits.numpy(), places, axis=1)) if places else bits
    return {place: ordered[:, place : place + 1].clone() for place in places}
