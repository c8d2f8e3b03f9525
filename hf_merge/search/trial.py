"""Trials, and the front of those that no other trial dominates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hf_merge import pareto
from hf_merge.errors import RecipeError, unknown
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import MAXIMIZE, Scores
from hf_merge.shown import as_printed

Split = Literal["search", "held_out"]

MARGIN = 0.1
"""How far beyond the worst parent the reference point lies, as a part of the parents' range."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One recipe and what it scored.

    `scores` come from search data and are empty if the trial failed with `error`; `held_out` comes from data that the search
    never saw and is there for parents and front points only. `label` names a trial that is not the sampler's (a parent, the
    uniform average). `seconds` is the whole cost: merging and measuring. `violations` says by how much it breaks each of the
    search's constraints that it breaks, in the objective's unit. One that a race `stopped` was seen on some rows only: its
    scores are estimates, and it is on no front.
    """

    number: int
    recipe: Recipe
    scores: Scores = field(default_factory=dict)
    held_out: Scores = field(default_factory=dict)
    error: str | None = None
    label: str = ""
    seconds: float = 0.0
    violations: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False

    def on(self, split: Split) -> Scores:
        """The scores on one split; the two are never mixed."""
        return self.scores if split == "search" else self.held_out

    @property
    def name(self) -> str:
        """The label, or `trial N`."""
        return self.label or f"trial {self.number}"

    _repr_pretty_ = as_printed

    def __str__(self) -> str:
        rows = [f"{self.name}: {self.recipe}"]
        for split, what in (("search", "on search rows"), ("held_out", "held out")):
            if scores := self.on(split):  # type: ignore[arg-type]
                kind = f"{what}, estimated" if self.stopped else what
                rows.append(f"  {kind}: " + ", ".join(f"{name} {score.value:.4f}" for name, score in scores.items()))
        rows += [f"  misses {name} by {violation:.4g}" for name, violation in self.violations.items()]
        return "\n".join(rows + ([f"  failed: {self.error}"] if self.error else []))


@dataclass(frozen=True, kw_only=True, eq=False)
class Front(Sequence[Trial]):
    """The trials that no trial dominates on search data, best in the first objective first.

    `directions` maps each objective to "maximize" or "minimize"; `reference` is the hypervolume's fixed reference point in the
    objectives' own units. Equal points are all kept, in the order of their numbers. Where a search has constraints, only
    trials that keep them count; if none does the front is empty, and `nearest` is the trial whose violations sum to least.
    """

    trials: tuple[Trial, ...]
    directions: Mapping[str, str]
    reference: Mapping[str, float]
    nearest: Trial | None = None

    @classmethod
    def of(cls, trials: Sequence[Trial], directions: Mapping[str, str], reference: Mapping[str, float]) -> "Front":
        """The front of `trials`; those that failed, were stopped or break a constraint are left out, and of the same recipe
        tried twice the first is kept."""
        scored = {t.recipe.digest: t for t in reversed(trials) if t.scores and not t.stopped}
        candidates = sorted((t for t in scored.values() if not t.violations), key=lambda t: t.number)
        if not candidates:
            nearest = min(scored.values(), key=lambda t: (sum(t.violations.values()), t.number), default=None)
            return cls(trials=(), directions=directions, reference=reference, nearest=nearest)
        points = to_points(candidates, directions)
        kept = [(p, t) for p, t, keep in zip(points.tolist(), candidates, pareto.non_dominated(points), strict=True) if keep]
        kept.sort(key=lambda pair: ([-v for v in pair[0]], pair[1].number))
        return cls(trials=tuple(t for _, t in kept), directions=directions, reference=reference)

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.trials[index]

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' names in order."""
        return tuple(self.directions)

    def hypervolume(self, split: Split = "search") -> float:
        """Hypervolume above the reference point, in the product of the objectives' units."""
        return hypervolume(self.trials, self.directions, self.reference, split)

    def choose(self, preference: Mapping[str, float] | Literal["knee"] = "knee", *, objective: str | None = None) -> Trial:
        """A point of the front by its **search** scores: best in one `objective`, nearest to a `preference` (non-negative
        weights by objective, missing ones 0), or the knee (equal preference). Raises `RecipeError` for unknown names."""
        if not self.trials:
            raise RecipeError(f"The front is empty: {self._why_empty()}")
        points = to_points(self.trials, self.directions)
        if objective is not None:
            self._known([objective])
            return self.trials[int(np.argmax(points[:, self.objectives.index(objective)]))]
        if preference == "knee":
            return self.trials[pareto.knee(points)]
        if not isinstance(preference, Mapping):
            raise RecipeError(f"A preference is a mapping from objectives to weights, or 'knee'; got {preference!r}.")
        self._known(preference)
        weights = np.array([preference.get(name, 0.0) for name in self.objectives], dtype=float)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise RecipeError(f"A preference has non-negative weights, one of them positive; got {dict(preference)!r}.")
        return self.trials[pareto.preferred(points, weights)]

    def _why_empty(self) -> str:
        if self.nearest is None:
            return "every trial failed. Look at `trials` for the errors."
        missed = ", ".join(f"{name} by {violation:.4g}" for name, violation in self.nearest.violations.items())
        return f"no trial keeps the constraints. {self.nearest.name} comes nearest; it misses {missed}."

    def _known(self, names: Sequence[str] | Mapping[str, float]) -> None:
        for name in names:
            if name not in self.directions:
                raise RecipeError(unknown("objective", name, self.directions))

    def __repr__(self) -> str:
        rows = [f"Front of {len(self)} ({', '.join(f'{d} {n}' for n, d in self.directions.items())})"]
        for trial in self.trials:
            values = "  ".join(f"{name} {trial.scores[name].value:.4f}" for name in self.objectives)
            rows.append(f"  {trial.name:<18} {values}  {trial.recipe}")
        if self.nearest is not None:
            rows.append(f"  {self._why_empty()}")
        return "\n".join(rows)


def to_points(trials: Sequence[Trial], directions: Mapping[str, str], split: Split = "search") -> pareto.Floats:
    """The trials' values `(n, m)` with minimized objectives negated, as `hf_merge.pareto` wants them."""
    signs = [1.0 if direction == MAXIMIZE else -1.0 for direction in directions.values()]
    rows = [[s * t.on(split)[name].value for name, s in zip(directions, signs, strict=True)] for t in trials]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(signs))


def hypervolume(
    trials: Sequence[Trial], directions: Mapping[str, str], reference: Mapping[str, float], split: Split = "search"
) -> float:
    """Hypervolume of any set of trials above `reference` (own units)."""
    return pareto.hypervolume(to_points(trials, directions, split), to_corner(reference, directions))


def to_corner(reference: Mapping[str, float], directions: Mapping[str, str]) -> pareto.Floats:
    """A reference point in own units as `(m,)` with minimized objectives negated: the corner for what `to_points` gives."""
    return np.array(
        [reference[name] if d == MAXIMIZE else -reference[name] for name, d in directions.items()], dtype=np.float64
    )


def reference_point(parents: Sequence[Scores], directions: Mapping[str, str]) -> dict[str, float]:
    """In each objective the worst of these scores, less a tenth (`MARGIN`) of their range; 0 if there are none."""
    found = dict.fromkeys(directions, 0.0)
    for name, direction in directions.items() if parents else ():
        sign = 1 if direction == MAXIMIZE else -1
        values = [sign * scores[name].value for scores in parents]
        span = max(values) - min(values) or abs(min(values)) or 1.0
        found[name] = sign * (min(values) - MARGIN * span)
    return found
