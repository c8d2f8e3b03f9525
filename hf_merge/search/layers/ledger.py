"""What a search has scored, and how many evaluations that took."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from hf_merge.errors import RecipeError
from hf_merge.recipes.path import Path
from hf_merge.search.layers.rewards import Floats, Scalarization, scalarize

Score = Callable[[Path], ArrayLike]
"""A path's objectives `(K,)`: normalized (`rewards.normalizer`), all maximized. Called once for each distinct path."""

FAILED = -1.0
"""Stands for an objective that came back as NaN or infinite."""


class BudgetSpentError(Exception):
    """Every evaluation that was allowed is used; raised inside a search and caught by it."""


class Ledger:
    """Scores each distinct path once and keeps what came out, in order.

    `limit` is the most evaluations; the one after it raises BudgetSpentError. A path that was scored before, or that is `known`
    already, costs nothing. `length_cost` is β: what each block takes from a path's reward. `on_path(path, values)` is called
    after each evaluation.
    """

    def __init__(
        self,
        score: Score,
        *,
        limit: int | None = None,
        length_cost: float = 0.0,
        scalarization: Scalarization = "linear",
        known: Mapping[Path, Floats] | None = None,
        on_path: Callable[[Path, Floats], None] | None = None,
    ) -> None:
        self.score, self.limit, self.on_path = score, limit, on_path
        self.length_cost, self.scalarization = length_cost, scalarization
        self.values: dict[Path, Floats] = dict(known or {})
        self.given = len(self.values)

    def __call__(self, path: Path) -> Floats:
        """The path's objectives `(K,)`. Raises RecipeError if the score changes its shape."""
        if path not in self.values:
            if self.limit is not None and self.evaluations >= self.limit:
                raise BudgetSpentError
            given = np.atleast_1d(np.asarray(self.score(path), dtype=np.float64))
            expected = next(iter(self.values.values())).shape if self.values else (given.size,)
            if given.shape != expected:
                raise RecipeError(f"A score gives one value for each objective: expected {expected}, got {given.shape}.")
            self.values[path] = np.where(np.isfinite(given), given, FAILED)
            if self.on_path is not None:
                self.on_path(path, self.values[path])
        return self.values[path]

    @property
    def evaluations(self) -> int:
        """How many distinct paths were scored."""
        return len(self.values) - self.given

    def reward(self, path: Path, preference: ArrayLike) -> float:
        """Σ_k λ_k f_k - β T, or its Tchebycheff form."""
        return float(scalarize(self(path), preference, self.scalarization)) - self.length_cost * len(path)

    def rewards(self, preference: ArrayLike) -> Floats:
        """The reward of each known path `(n,)`, in order: those that were given first, then as they were scored."""
        if not self.values:
            return np.zeros(0)
        lengths = np.array([len(path) for path in self.values])
        return scalarize(np.array(list(self.values.values())), preference, self.scalarization) - self.length_cost * lengths

    def best(self, preference: ArrayLike) -> Path:
        """The known path with the highest reward; the first of equals. Raises RecipeError if there is none."""
        if not self.values:
            raise RecipeError("No path was scored yet: a search needs a budget of at least one evaluation.")
        return list(self.values)[int(self.rewards(preference).argmax())]
