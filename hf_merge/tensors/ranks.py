"""Dropping elements by the rank of their magnitude within a row.

Deltas are `(models, b)` float32 with whole rows of `row` elements. Of equal magnitudes the first counts as the largest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors.rng import STEPS, Draws
from hf_merge.tensors.sparsify import Blocks, Cutoffs, PerModel, cutoffs, kept, per_model, trim

_MAGNITUDE = 0x7FFFFFFF


def magprune(deltas: Tensor, density: PerModel, epsilon: PerModel, row: int, rng: Draws, rescale: bool = True) -> Tensor:
    """Random drop whose chance to keep rises with the rank of the magnitude within the row (arXiv:2406.11617, section 3.1).

    Rank r of n, ascending from 0, stays with p = density - ε + 2ε r / (n-1), and is divided by p if `rescale`. A window
    that does not fit into [0, 1] shrinks: ε is at most min(density, 1 - density), so that the mean of p stays the density.
    A row of one element has p = density. p is rounded to multiples of 1 / STEPS and is not 0 unless the density is.
    """
    pruned = torch.zeros_like(deltas)
    densities, widths = (per_model(v, deltas[:, :0].double())[:, 0].tolist() for v in (density, epsilon))
    for model, (chance, width) in enumerate(zip(densities, widths, strict=True)):
        if chance <= 0:
            continue
        steps = _by_rank(deltas[model].reshape(-1, row), _chances(chance, width, row).to(deltas.device)).reshape(-1)
        draws = rng.uniform(model, deltas.shape[1]).to(deltas.device)
        torch.mul(deltas[model], draws < steps, out=pruned[model])
        if rescale:
            pruned[model].mul_(STEPS / steps.to(deltas.dtype))
    return pruned


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
            keep = _largest(rows, skip + count)
            if skip:
                keep &= ~_largest(rows, skip)
            torch.mul(deltas[model], keep.reshape(-1), out=stayed[model])
    return stayed


@dataclass(frozen=True)
class Band:
    """Between which cutoffs the elements of each model's tensor stay."""

    inner: Cutoffs
    outer: Cutoffs

    def of(self, deltas: Tensor, start: int) -> Tensor:
        """What stays of `deltas` `(models, b)`, whose first column is element `start` of the tensor."""
        return trim(deltas, self.inner, start).sub_(trim(deltas, self.outer, start))


def bands(blocks: Blocks, density: PerModel, gamma: PerModel, n: int) -> Band:
    """As `middle`, with the whole tensor of `n` elements for a row."""
    none = next(iter(blocks()))[:, :0].double()
    pairs = zip(*(per_model(v, none)[:, 0].tolist() for v in (density, gamma)), strict=True)
    counts = [band(fraction, top, n) for fraction, top in pairs]
    inner = cutoffs(blocks, [(count + skip) / max(n, 1) for count, skip in counts], n)
    return Band(inner, cutoffs(blocks, [skip / max(n, 1) for _, skip in counts], n))


def band(density: float, gamma: float, n: int) -> tuple[int, int]:
    """How many of `n` magnitudes stay, and how many larger ones go: `kept(density, n)`, and ⌊γn⌋ or as many as are left."""
    count = kept(density, n)
    return count, max(0, min(int(gamma * n), n - count))


def _chances(density: float, epsilon: float, row: int) -> Tensor:
    """The steps of 1 / STEPS that each rank stays with, the largest magnitude's first, int32."""
    width = max(0.0, min(epsilon, density, 1 - density)) if row > 1 else 0.0
    chances = density + width - 2 * width * torch.arange(row, dtype=torch.float64) / max(1, row - 1)
    return (chances * STEPS).round().clamp(1, STEPS).int()


def _by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """`values` `(row,)`, the largest magnitude's first, at the places of the magnitudes in `rows`."""
    if values[0] == values[-1]:
        return values.expand(rows.shape)
    # One sort of keys that hold the magnitude, the largest first, above the place. Differences of 16-bit floats have so few
    # digits that both fit into 32 bits, which sort in half of the time.
    width = (rows.shape[1] - 1).bit_length()
    place = (1 << width) - 1
    keys = rows.view(torch.int32).bitwise_not() & _MAGNITUDE
    keys = keys & ~place if bool(((keys & place) == place).all()) else keys.long().bitwise_left_shift_(width)
    keys |= torch.arange(rows.shape[1], dtype=keys.dtype, device=rows.device)
    if keys.is_cuda:
        keys = keys.sort(dim=1).values
    else:
        keys.numpy().sort(axis=1)  # in place; half of the time that torch needs
    places = keys.bitwise_and_(place).long()
    return torch.empty(rows.shape, dtype=values.dtype, device=rows.device).scatter_(1, places, values.expand(rows.shape))


def _largest(rows: Tensor, count: int) -> Tensor:
    """Where each row has its `count` largest magnitudes, exactly so many of them, the first of equal ones."""
    n = rows.shape[1]
    if count >= n:
        return torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
    bits = rows.view(torch.int32) & _MAGNITUDE
    cut = _ascending(bits, n - count)
    keep = bits >= cut
    several = (keep.sum(1) > count).nonzero()[:, 0]  # rows where not all that stand at the cut stay
    if len(several):
        above, equal = bits[several] > cut[several], bits[several] == cut[several]
        keep[several] = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return keep


def _ascending(bits: Tensor, place: int) -> Tensor:
    """The element of each row `(rows, 1)` that stands at `place` in ascending order."""
    if bits.is_cuda:
        return bits.kthvalue(place + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(bits.numpy(), place, axis=1)[:, place : place + 1].copy())
