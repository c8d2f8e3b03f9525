"""Pareto dominance, hypervolume and choice by preference, over plain arrays.

Everywhere `points` is `(n, m)`: n points, m objectives, **every objective maximized** (callers flip the signs of those
that are minimized).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _points(points: ArrayLike) -> Floats:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"Expected points of shape (n, m), got {array.shape}.")
    return array


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether point `a` is at least as good as `b` in every objective and better in one."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return bool((first >= second).all() and (first > second).any())


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Mask `(n,)` of the points that no other point dominates; of equal points all are kept."""
    array = _points(points)
    no_worse = (array[:, None] >= array[None]).all(-1)
    better = (array[:, None] > array[None]).any(-1)
    dominated: NDArray[np.bool_] = np.any(no_worse & better, axis=0)
    return ~dominated


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that `points` dominate above `reference` `(m,)`; points not above the reference in every objective add nothing.

    Exact for any m, by slicing along the last objective (While et al., "A fast way of calculating exact
    hypervolumes", 2012, without its refinements: fronts here have tens of points).
    """
    gains = _points(points) - np.asarray(reference, dtype=np.float64)
    gains = gains[(gains > 0).all(1)]
    return _volume(gains[non_dominated(gains)]) if len(gains) else 0.0


def _volume(gains: Floats) -> float:
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, 0], kind="stable")]
    if gains.shape[1] == 2:
        heights = np.maximum.accumulate(gains[:, 1])
        widths = gains[:, 0] - np.append(gains[1:, 0], 0.0)
        return float((widths * heights).sum())
    depths = gains[:, 0] - np.append(gains[1:, 0], 0.0)
    total = 0.0
    for count, depth in enumerate(depths, start=1):
        if depth > 0:
            slab = gains[:count, 1:]
            total += depth * _volume(slab[non_dominated(slab)])
    return total


def contributions(points: ArrayLike, reference: ArrayLike) -> Floats:
    """Hypervolume `(n,)` that would be lost without each point."""
    array = _points(points)
    whole = hypervolume(array, reference)
    return np.array([whole - hypervolume(np.delete(array, i, axis=0), reference) for i in range(len(array))])


def normalized(points: ArrayLike) -> Floats:
    """Points with every objective scaled to [0, 1] over the points themselves; a constant objective becomes 1."""
    array = _points(points)
    low, high = array.min(0), array.max(0)
    span = np.where(high > low, high - low, 1.0)
    return np.where(high > low, (array - low) / span, 1.0)


def preferred(points: ArrayLike, preference: ArrayLike) -> int:
    """Index of the point for a preference `(m,)`: the smallest augmented weighted Tchebycheff distance to the ideal point.

    Objectives are scaled to [0, 1] over `points` first. The distance is max_k λ_k (1 - f_k) + 0.05 Σ_k λ_k (1 - f_k)
    with the signed gap, so being better never makes it worse; the sum breaks the ties in favor of a point that is
    nowhere weaker (Steuer and Choo, 1983).
    """
    weights = np.asarray(preference, dtype=np.float64)
    gap = weights / weights.sum() * (1.0 - normalized(points))
    return int(np.argmin(gap.max(1) + 0.05 * gap.sum(1)))


def knee(points: ArrayLike) -> int:
    """Index of the knee: equal preference for every objective."""
    return preferred(points, np.ones(_points(points).shape[1]))
