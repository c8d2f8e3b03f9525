"""What a front has to say about itself: how it grew, how much the search flatters it, which of its points carry it, and which
the data cannot tell apart. Numbers only, no text."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from hf_merge import pareto
from hf_merge.publishing.position import LIMITS, Gap, complete, gap
from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Split, Trial, to_corner, to_points


def history(trials: Sequence[Trial], directions: Mapping[str, str], reference: Mapping[str, float]) -> list[float]:
    """The front's hypervolume on search data after each of `trials` (in the product of the objectives' units)."""
    corner = to_corner(reference, directions)
    points, volume, found = np.empty((0, len(directions))), 0.0, []
    for trial in trials:
        if trial.scores and not trial.stopped and not trial.violations:
            new = to_points([trial], directions)
            if not (points >= new).all(1).any():
                points = np.concatenate([points, new])
                points = points[pareto.non_dominated(points)]
                volume = pareto.hypervolume(points, corner)
        found.append(volume)
    return found


def optimism(front: Front) -> dict[str, Gap]:
    """By objective: how much better the front's points look on search data than on held-out data, on average.

    Positive is flattering, whatever the direction. The interval is of the held-out rows; the search rows were chosen from.
    """
    found = {}
    trials = complete(complete(front.trials, front.directions), front.directions, "search")
    for name, direction in front.directions.items() if trials else ():
        sign = 1.0 if direction == MAXIMIZE else -1.0
        searched = sign * float(np.mean([t.scores[name].value for t in trials]))
        value = searched - sign * float(np.mean([t.held_out[name].value for t in trials]))
        replicates = [r for t in trials if (r := t.held_out[name].replicates) is not None]
        if len(replicates) < len(trials) or len({len(r) for r in replicates}) > 1:
            found[name] = Gap(value=value)
        else:
            low, high = np.quantile(searched - sign * np.mean(replicates, axis=0), LIMITS)
            found[name] = Gap(value=value, low=float(low), high=float(high))
    return found


def contributions(front: Front, split: Split = "held_out") -> dict[int, float]:
    """By trial number: the hypervolume that the front would lose without that point; 0 for one that others dominate there."""
    trials = complete(front.trials, front.directions, split)
    corner = to_corner(front.reference, front.directions)
    lost = pareto.contributions(to_points(trials, front.directions, split), corner).tolist() if trials else []
    return {trial.number: max(0.0, float(value)) for trial, value in zip(trials, lost, strict=True)}


def alike(front: Front) -> list[tuple[Trial, Trial]]:
    """Pairs of the front's points that held-out data do not tell apart in any objective: every paired interval holds 0."""
    trials = complete(front.trials, front.directions)

    def same(a: Trial, b: Trial) -> bool:
        gaps = [gap(a, b, name, direction) for name, direction in front.directions.items()]
        return all(g.interval is not None and not g.clear for g in gaps)

    return [(a, b) for a, b in combinations(trials, 2) if same(a, b)]
