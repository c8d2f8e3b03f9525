"""Dropping elements by the rank of their magnitude within a row.

Deltas are `(models, b)` float32 with whole rows of `row` elements. Of equal magnitudes the first counts as the largest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_merge.tensors import loops
from hf_merge.tensors.masks import Bits, only, pack
from hf_merge.tensors.rng import STEPS, Draws
from hf_merge.tensors.sparsify import Blocks, Cutoffs, PerModel, cutoffs, kept, per_model, rounded_down, trim
from hf_merge.tensors.weighting import gains

_MAGNITUDE = 0x7FFFFFFF

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
    for model, (chance, width) in enumerate(_windows(deltas, density, epsilon)):
        chances = _chances(chance, width, row)
        steps = _by_rank(deltas[model].reshape(-1, row), chances).reshape(-1)
        draws = rng.uniform(model, deltas.shape[1]).to(deltas.device)
        torch.lt(draws, steps, out=pruned[model]).mul_(deltas[model]).mul_(STEPS / steps.clamp_min(1).to(deltas.dtype))
    return pruned


def stays(deltas: Tensor, density: PerModel, epsilon: PerModel, row: int, rng: Draws) -> Tensor:
    """Which elements `magprune` keeps, 1 or 0, uint8 as `deltas`; either of both where a delta is 0."""
    found = torch.empty(deltas.shape, dtype=torch.uint8, device=deltas.device)
    for model, (chance, width) in enumerate(_windows(deltas, density, epsilon)):
        rows, kept_rows = deltas[model].reshape(-1, row), found[model].reshape(-1, row)
        if (values := loops.served(rows)) is not None:
            low, enough = _enough(chance, width, row)
            loops.stays(values, enough, low, rng.key(model), kept_rows.numpy())
        else:
            chances = _chances(chance, width, row)
            draws = rng.uniform(model, deltas.shape[1]).to(deltas.device).reshape(-1, row)
            torch.lt(draws, _by_rank(rows, chances), out=kept_rows)
    return found


@lru_cache(maxsize=64)
def _enough(chance: float, width: float, row: int) -> tuple[int, Integers]:
    """The least chance, and how many ranks have a chance above a draw: for draws below it, each from it on, and the rest."""
    chances = _chances(chance, width, row).numpy()
    low = int(chances[-1])
    ranks = len(chances) - np.cumsum(np.bincount(chances - low))
    return low, np.concatenate([[len(chances)], ranks[:-1], [0]]).astype(np.int16 if row < 1 << 15 else np.int32)


@dataclass(frozen=True)
class Pruning:
    """What `magprune` keeps of each block of a tensor, and the models' factors that give back the L1 norms."""

    masks: Sequence[Bits]
    gains: Sequence[float]

    def of(self, deltas: Tensor, number: int) -> Tensor:
        """What stays of `deltas` `(models, b)`, the `number`-th block, with its norm given back."""
        return only(deltas, self.masks[number], self.gains)


def prune_in_norm(blocks: Blocks, density: PerModel, epsilon: PerModel, row: int, draws: Callable[[int], Draws]) -> Pruning:
    """As `magprune` of the whole tensor without its division; `draws` gives the random numbers of a block by its number."""
    masks: list[Bits] = []
    norms = torch.zeros(2, 1, dtype=torch.float64)
    for number, block in enumerate(blocks()):
        stayed = stays(block, density, epsilon, row, draws(number)).cpu()
        masks.append(pack(stayed))
        pairs = zip(block.float().cpu().contiguous().numpy(), stayed.numpy(), strict=True)
        norms = norms + torch.tensor([loops.flagged_sizes(values, flags) for values, flags in pairs], dtype=torch.float64).T
    return Pruning(masks, gains(norms).tolist())


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


def _windows(deltas: Tensor, density: PerModel, epsilon: PerModel) -> Iterator[tuple[float, float]]:
    """Each model's density, and the ε that fits beside it."""
    densities, widths = (per_model(v, deltas[:, :0].double())[:, 0].tolist() for v in (density, epsilon))
    for chance, width in zip(densities, widths, strict=True):
        yield chance, max(0.0, min(width, chance, 1 - chance))


@lru_cache(maxsize=64)
def _chances(chance: float, width: float, row: int) -> Tensor:
    """The steps of 1 / STEPS that each rank stays with, the largest magnitude's first, int32."""
    width = width if row > 1 else 0.0
    chances = chance + width - 2 * width * torch.arange(row, dtype=torch.float64) / max(1, row - 1)
    return (chances * STEPS).round().clamp(1 if chance > 0 else 0, STEPS).int()


def _by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """`values` `(row,)`, the largest magnitude's first, at the places of the magnitudes in `rows`."""
    values = values.to(rows.device)
    if values[0] == values[-1]:
        return values.expand(rows.shape)
    return torch.empty(rows.shape, dtype=values.dtype, device=rows.device).scatter_(1, _places(rows), values.expand(rows.shape))


def _places(rows: Tensor) -> Tensor:
    """The places of each row's elements, int64, the largest magnitude's first."""
    if (values := loops.served(rows)) is not None:
        order = np.empty(rows.shape, np.int32)
        loops.rank(values, order)
        return torch.from_numpy(order).long()
    return rows.abs().sort(dim=1, descending=True, stable=True).indices


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
