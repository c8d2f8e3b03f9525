"""What NSGA-II and NSGA-III are made of, over plain arrays; every objective is minimized.

Selection: Deb et al., 2002 (ranks, crowding) and Deb and Jain, 2014 (reference directions). Variation: BLX-α (Eshelman and
Schaffer, 1993), polynomial mutation (Deb and Goyal, 1996).
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hf_merge.pareto import Floats, non_dominated

Indices = NDArray[np.int64]


def ranks(losses: Floats, violations: Floats | None = None) -> Indices:
    """Rank `(n,)` of each row of `losses` `(n, m)`: 0 for the front, 1 for the front without it, and so on. Rows with
    `violations` `(n,)` above 0 come after all others, the least first."""
    found = np.full(len(losses), -1)
    violations = np.zeros(len(losses)) if violations is None else violations
    rank = 0
    while (left := np.flatnonzero((found < 0) & (violations <= 0))).size:
        found[left[non_dominated(-losses[left])]] = rank
        rank += 1
    for amount in np.unique(violations[violations > 0]):
        found[violations == amount] = rank
        rank += 1
    return found


def crowding(losses: Floats) -> Floats:
    """Crowding distance `(n,)` of rows of one rank: the sides of the box that its neighbors span; infinite at the ends."""
    found = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] or 1.0
        found[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
        found[order[[0, -1]]] = np.inf
    return found


def by_crowding(losses: Floats, size: int, violations: Floats | None = None, *, whole_ranks: bool = False) -> Indices:
    """The `size` best rows, best first: by rank, and within a rank the least crowded. With `whole_ranks` there are so many more
    that the last one's rank is there as a whole."""
    rank = ranks(losses, violations)
    far = np.zeros(len(losses))
    for value in np.unique(rank):
        far[rank == value] = crowding(losses[rank == value])
    order = np.lexsort((-far, rank))
    if whole_ranks and size < len(order):
        size = int((rank <= rank[order[size - 1]]).sum())
    return order[:size]


def directions(objectives: int, at_least: int) -> Floats:
    """Das and Dennis's evenly spread points of the simplex `(k, m)`, `at_least` so many."""
    if objectives == 1:
        return np.ones((1, 1))
    parts = 1
    while True:
        cuts = np.array(list(combinations(range(parts + objectives - 1), objectives - 1))).reshape(-1, objectives - 1)
        if len(cuts) >= at_least:
            ends = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, parts + objectives - 1)))
            return (np.diff(ends, axis=1) - 1) / parts
        parts += 1


def by_direction(losses: Floats, size: int, rng: np.random.Generator, violations: Floats | None = None) -> Indices:
    """The `size` best rows: by rank, and of the rank that does not fit as a whole those near the directions that have the
    fewest. Objectives are scaled to [0, 1] over the front."""
    rank = ranks(losses, violations)
    order = np.argsort(rank, kind="stable")
    if len(losses) <= size:
        return order
    last = rank[order[size - 1]]
    kept, open_ = np.flatnonzero(rank < last).tolist(), np.flatnonzero(rank == last)
    front = losses[rank == 0]
    low = losses.min(0)
    scaled = (losses - low) / np.where(front.max(0) > low, front.max(0) - low, 1.0)
    lines = directions(losses.shape[1], size)
    lines = lines / np.linalg.norm(lines, axis=1, keepdims=True)
    along = scaled @ lines.T
    away = np.sqrt(np.maximum((scaled**2).sum(1, keepdims=True) - along**2, 0.0))
    nearest, distance = away.argmin(1), away.min(1)
    count = np.bincount(nearest[kept], minlength=len(lines)) if kept else np.zeros(len(lines), dtype=int)
    waiting = {line: sorted(open_[nearest[open_] == line], key=lambda i: distance[i]) for line in np.unique(nearest[open_])}
    while len(kept) < size:
        least = min(count[line] for line in waiting)
        line = rng.choice([line for line in waiting if count[line] == least])
        kept.append(waiting[line].pop(0))
        count[line] += 1
        if not waiting[line]:
            del waiting[line]
    return np.array(kept)


def children(
    mothers: Floats, fathers: Floats, choices: Indices, rng: np.random.Generator, *, alpha: float = 0.5, eta: float = 20.0
) -> Floats:
    """A child `(n, d)` in the unit cube of each pair of rows: BLX-`alpha`, then polynomial mutation of one coordinate in d.
    A coordinate with `choices` takes one parent's category, or when mutated any."""
    n, d = mothers.shape
    low, high = np.minimum(mothers, fathers), np.maximum(mothers, fathers)
    span = high - low
    mixed = low - alpha * span + rng.random((n, d)) * (1 + 2 * alpha) * span
    mixed = np.where(choices > 0, np.where(rng.random((n, d)) < 0.5, mothers, fathers), mixed)
    mixed = reflected(mixed)
    u = rng.random((n, d))
    step = np.where(u < 0.5, (2 * u) ** (1 / (eta + 1)) - 1, 1 - (2 * (1 - u)) ** (1 / (eta + 1)))
    drawn = (np.floor(rng.random((n, d)) * choices) + 0.5) / np.maximum(choices, 1)
    mutated = np.where(choices > 0, drawn, np.clip(mixed + step, 0, 1))
    return np.where(rng.random((n, d)) < 1 / d, mutated, mixed)


def reflected(points: Floats) -> Floats:
    """Points brought into the unit cube by mirrors at its faces."""
    folded = np.abs(points) % 2
    return np.where(folded > 1, 2 - folded, folded)
