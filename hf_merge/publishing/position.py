"""Where a model stands: its rank, what it wins and gives up, and how sure that is. Numbers only, no text.

All differences are turned so that positive is better, whatever the objective's direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_merge import pareto
from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Split, Trial, hypervolume, to_corner, to_points

LIMITS = (0.025, 0.975)
"""Quantiles of a 95 % percentile interval."""

MOST_REPLICATES = 400
"""Replicates behind an interval of a hypervolume: each costs a whole hypervolume."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A difference and its paired 95 % bootstrap interval, if there is one; positive is better."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def reversed(self) -> "Gap":
        """The same difference seen from the other side."""
        low, high = (None, None) if self.interval is None else (-self.interval[1], -self.interval[0])
        return Gap(value=-self.value, low=low, high=high)


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """A hypervolume and its bootstrap replicates `(B,)`, paired with those of other volumes on the same rows."""

    value: float
    replicates: pareto.Floats | None = field(default=None, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % percentile interval, if there are replicates."""
        if self.replicates is None:
            return None
        low, high = np.quantile(self.replicates, LIMITS)
        return float(low), float(high)

    def minus(self, other: "Volume") -> Gap:
        """How much more this volume is than the other."""
        return _gap(self.value - other.value, self.replicates, other.replicates)


@dataclass(frozen=True, kw_only=True, eq=False)
class Position:
    """Where one trial stands.

    `on_front` and `is_knee` are of search data, where choices are made. The rest is of held-out data and empty without it:
    `rank` among the front (1: nothing there dominates it), who dominates it (`dominated_by`) and whom it dominates among front,
    parents and others, the objectives it is `best_in` on the front, and by objective the front's nearest trial that is better.
    """

    on_front: bool
    is_knee: bool
    rank: int | None = None
    dominated_by: tuple[Trial, ...] = ()
    dominates: tuple[Trial, ...] = ()
    best_in: tuple[str, ...] = ()
    neighbors: Mapping[str, Trial] = field(default_factory=dict)


def same(a: Trial, b: Trial) -> bool:
    """Whether two trials are of the same merge."""
    return a.recipe.digest == b.recipe.digest


def complete(trials: Sequence[Trial], directions: Mapping[str, str], split: Split = "held_out") -> tuple[Trial, ...]:
    """The trials that have every objective's score on the split."""
    return tuple(t for t in trials if all(name in t.on(split) for name in directions))


def gap(trial: Trial, other: Trial, objective: str, direction: str, split: Split = "held_out") -> Gap:
    """How much better `trial` is than `other` in one objective, in its own unit."""
    a, b = trial.on(split)[objective], other.on(split)[objective]
    sign = 1.0 if direction == MAXIMIZE else -1.0
    paired = _paired(a.replicates, b.replicates)
    if paired is None:
        return Gap(value=sign * (a.value - b.value))
    return _gap(sign * (a.value - b.value), sign * paired[0], sign * paired[1])


def _paired(a: pareto.Floats | None, b: pareto.Floats | None) -> tuple[pareto.Floats, pareto.Floats] | None:
    # Replicates of different lengths come from different resamplings, and then nothing is paired.
    return None if a is None or b is None or len(a) != len(b) or len(a) == 0 else (a, b)


def _gap(value: float, a: pareto.Floats | None, b: pareto.Floats | None) -> Gap:
    paired = _paired(a, b)
    if paired is None:
        return Gap(value=value)
    low, high = np.quantile(paired[0] - paired[1], LIMITS)
    return Gap(value=value, low=float(low), high=float(high))


def volume(
    trials: Sequence[Trial], directions: Mapping[str, str], reference: Mapping[str, float], split: Split = "held_out"
) -> Volume:
    """Hypervolume of `trials` above `reference` (own units), with one replicate for each bootstrap resample of the rows."""
    value = hypervolume(trials, directions, reference, split)
    columns = [[t.on(split)[name].replicates for name in directions] for t in trials]
    lengths = {len(r) if r is not None else 0 for row in columns for r in row}
    if len(lengths) != 1 or 0 in lengths:
        return Volume(value=value)
    signs = np.array([1.0 if d == MAXIMIZE else -1.0 for d in directions.values()])
    corner = to_corner(reference, directions)
    points = np.array(columns, dtype=np.float64)[:, :, :MOST_REPLICATES] * signs[:, None]
    return Volume(value=value, replicates=np.array([pareto.hypervolume(p, corner) for p in np.moveaxis(points, 2, 0)]))


def hypervolume_gain(
    trials: Sequence[Trial],
    others: Sequence[Trial],
    directions: Mapping[str, str],
    reference: Mapping[str, float],
    split: Split = "held_out",
) -> Gap:
    """How much more hypervolume `trials` have than `others`, with a paired interval."""
    return volume(trials, directions, reference, split).minus(volume(others, directions, reference, split))


def ranks(points: pareto.Floats) -> list[int]:
    """Each point's rank `(n,)`: 1 for those that nothing dominates, 2 for those that only these dominate, and so on."""
    found = np.zeros(len(points), dtype=int)
    rank = 0
    while (left := np.flatnonzero(found == 0)).size:
        rank += 1
        found[left[pareto.non_dominated(points[left])]] = rank
    return found.tolist()


def position(trial: Trial, front: Front, rivals: Sequence[Trial] = ()) -> Position:
    """Where `trial` stands on `front`, and among `rivals` (parents, the base, the uniform average)."""
    on_front = any(same(trial, t) for t in front)
    is_knee = on_front and same(trial, front.choose("knee"))
    peers = complete([t for t in front if not same(t, trial)], front.directions)
    if not complete([trial], front.directions):
        return Position(on_front=on_front, is_knee=is_knee)
    points = to_points([trial, *peers], front.directions, "held_out")
    everyone = [*peers, *(r for r in complete(rivals, front.directions) if not any(same(r, t) for t in (trial, *peers)))]
    mine, theirs = points[0], to_points(everyone, front.directions, "held_out")
    return Position(
        on_front=on_front,
        is_knee=is_knee,
        rank=ranks(points)[0],
        dominated_by=tuple(t for t, p in zip(everyone, theirs, strict=True) if pareto.dominates(p, mine)),
        dominates=tuple(t for t, p in zip(everyone, theirs, strict=True) if pareto.dominates(mine, p)),
        best_in=tuple(name for k, name in enumerate(front.objectives) if mine[k] == points[:, k].max()),
        neighbors=_neighbors(mine, points[1:], peers, front.objectives),
    )


def _neighbors(
    mine: pareto.Floats, points: pareto.Floats, peers: Sequence[Trial], objectives: Sequence[str]
) -> dict[str, Trial]:
    found = {}
    for k, name in enumerate(objectives):
        better = np.flatnonzero(points[:, k] > mine[k])
        if better.size:
            loss = np.maximum(mine - points[better], 0).sum(1)
            found[name] = peers[int(better[np.lexsort((loss, points[better, k]))[0]])]
    return found
