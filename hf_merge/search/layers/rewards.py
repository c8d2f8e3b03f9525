"""From an evaluation to one number: normalization, scalarization, and the preferences it is done for."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_merge.errors import RecipeError

Floats = NDArray[np.float64]
Scalarization = Literal["linear", "tchebycheff"]


def normalizer(base: ArrayLike, models: ArrayLike, floor: float = -1.0) -> Callable[[ArrayLike], Floats]:
    """Maps objectives `(K,)`, all maximized, to (f - base) / (best model - base), but not below `floor`.

    `base` `(K,)` are the base's values and `models` `(M, K)` the specialists'. An objective in which no specialist beats the
    base is measured from the worst specialist (in units of 1 if all are equal). What is not finite becomes `floor`.
    """
    all_models, low = np.atleast_2d(np.asarray(models, dtype=np.float64)), np.asarray(base, dtype=np.float64)
    best = all_models.max(0)
    low = np.where(best > low, low, all_models.min(0))
    span = np.where(best > low, best - low, 1.0)

    def normalized(values: ArrayLike) -> Floats:
        scaled = (np.asarray(values, dtype=np.float64) - low) / span
        return np.where(np.isfinite(scaled), np.maximum(scaled, floor), floor)

    return normalized


def scalarize(values: ArrayLike, preferences: ArrayLike, how: Scalarization = "linear") -> Floats:
    """One number per (value, preference), to be maximized: `values` `(..., K)`, `preferences` `(..., K)`, broadcast.

    "linear" is Σ_k λ_k f_k (HM3, eq. 9). "tchebycheff" is minus the augmented Tchebycheff distance to the ideal point 1 with
    the signed gap, so that being better than the best specialist is never punished.
    """
    f, weights = np.asarray(values, dtype=np.float64), np.asarray(preferences, dtype=np.float64)
    if how == "linear":
        return np.asarray((weights * f).sum(-1))
    gap = weights * (1.0 - f)
    return np.asarray(-gap.max(-1) - 0.05 * gap.sum(-1))


def checked(preferences: ArrayLike) -> Floats:
    """Preferences `(N, K)` that each add up to 1. Raises RecipeError for negative ones or zeros alone."""
    rows = np.atleast_2d(np.asarray(preferences, dtype=np.float64))
    if rows.ndim != 2 or not np.isfinite(rows).all() or (rows < 0).any() or (rows.sum(1) <= 0).any():
        raise RecipeError(
            f"A preference is one weight >= 0 for each objective, not all 0; got {np.asarray(preferences).tolist()}."
        )
    return np.asarray(rows / rows.sum(1, keepdims=True))


def drawn(objectives: int, count: int, rng: np.random.Generator) -> Floats:
    """`(count, K)` preferences: the vertices, the centroid, then draws from Dirichlet(1, …, 1)."""
    fixed = np.concatenate([np.eye(objectives), np.full((1, objectives), 1 / objectives)])
    return np.concatenate([fixed, rng.dirichlet(np.ones(objectives), max(0, count - len(fixed)))])[:count]


def lattice(objectives: int, divisions: int) -> Floats:
    """All preferences whose weights are multiples of 1/divisions (the simplex lattice of Scheffé, 1958)."""
    bars = combinations(range(divisions + objectives - 1), objectives - 1)
    edges = np.array([(-1, *bar, divisions + objectives - 1) for bar in bars], dtype=np.float64)
    return np.asarray((np.diff(edges, axis=1) - 1) / divisions)


def spread(total: float, steps: int) -> Sequence[float]:
    """A path's reward R in equal parts R/T over its steps (HM3, eq. 9)."""
    return [total / steps] * steps
