"""Racing: a candidate is measured on growing parts of the rows, and stops once it promises less than a new one would.

What a candidate will score on all rows is predicted by a paired comparison with everything that was measured on all of them:
its outcomes on the rows so far are regressed on the rivals' outcomes on the same rows, and the rivals' outcomes on the other
rows are known. Where an answer is one of several, it is the margins that are regressed: by how much the right one leads says
more than that it does. On the demo trio (some 800 rows a task, one search) a sixteenth of the rows leaves an error in accuracy
of 0.044 by their plain mean, 0.030 by right and wrong, and 0.012 by margins, for which right and wrong need a quarter of the
rows and the mean more than half. `benchmarks/racing.py` measures it.

The prediction is a distribution, and so is the hypervolume that the candidate would gain. It stops when what it gains on
average is too little for the rows that are left: for the same rows a new candidate could be tried, and what that gains can be
told from the front. Had a point of it come last, it would have gained what it alone dominates; the last of n candidates, any
of which it could be, gains an n-th of the sum of these on average. So a young search drops what an old one follows.

Rows about which rivals disagree are measured first, after a share of all: what the others will say is known nearly as well
without measuring them.

Looking several times does not need a correction, as it would for a significance test: each look asks for the mean given
all that has been seen, and that means the same however often one looks. It holds if the predictions are calibrated, which
is measured, not proven: their errors have a standard deviation of 0.8 to 1.1 predicted ones on the trio.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from hf_merge import pareto
from hf_merge.pareto import Floats
from hf_merge.scores import BAND, MAXIMIZE, Score, Scores, smoothed

WORTH = 1.0
"""A candidate goes on as long as an average new one would gain no more for the same rows."""

LEAST_RIVALS = 3
"""Fewer rivals with outcomes on all rows say too little of how outcomes go together."""

PRIOR_ROWS = 32
"""The regression's prior, the rivals' plain mean, counts as so many rows. Between 3 and 30 ridge units (15 to 150 rows)
the error hardly moves."""

PRIOR_MARGINS, MISSES = 0.3, 0.02
"""The same for margins, which go together far more closely; and by how many rows the noise might be wrong."""

_DRAWS, _POINTS = 128, 8192  # of a candidate's scores; to measure volumes by


class Racing:
    """Decides which candidates need not be measured to the end.

    Args:
        directions: "maximize" or "minimize" by objective.
        reference: the hypervolume's reference point in the objectives' own units.
        worth: a candidate goes on while it promises so many times what an average new one gains for the same rows. 0 stops
            only what cannot gain anything.
        smoothed: the objectives whose outcomes are smoothed margins.

    A metric need not be the mean of its rows' outcomes (F1, perplexity, chrF): the rivals show how values follow mean outcomes,
    by a straight line whose scatter counts as doubt. Where they do not follow, the doubt is large and nothing stops.
    """

    def __init__(
        self,
        directions: Mapping[str, str],
        reference: Mapping[str, float],
        *,
        worth: float = WORTH,
        smoothed: Collection[str] = (),
    ) -> None:
        if not worth >= 0:
            raise ValueError(f"Expected worth >= 0, got {worth}.")
        self.worth, self.smoothed = worth, smoothed
        self._signs = {name: 1.0 if direction == MAXIMIZE else -1.0 for name, direction in directions.items()}
        self._reference = np.array([sign * reference[name] for name, sign in self._signs.items()])
        self._normal = np.vectorize(NormalDist().inv_cdf)(_spread(_DRAWS, len(self._signs)))
        self._places = _spread(_POINTS, len(self._signs))

    def priorities(self, rivals: Sequence[Scores]) -> dict[str, Floats]:
        """How much the rivals disagree about each row `(n,)`, by objective: the variance of right and wrong, or of outcomes
        that are smoothed. Only for those that are predicted by margins, which do not need rows drawn at random."""
        known = {name: _whole(name, rivals) for name in self._signs}
        margins = {name: _margins(scores) for name, scores in known.items() if len(scores) >= LEAST_RIVALS}
        right = {n: smoothed(m) if n in self.smoothed else m > 0 for n, m in margins.items() if m is not None}
        return {name: found.var(0) for name, found in right.items()}

    def stops(self, candidate: Scores, rivals: Sequence[Scores], tried: int = 0) -> bool:
        """Whether a candidate with these partial scores (`Score.rows`) need not be measured further.

        `rivals` are what has been measured on all rows, dominated ones too: they need not be on the front to predict. `tried`
        counts what stopped as well. Never stops while an objective is missing or cannot be predicted, or if no rival is above
        the reference point.
        """
        if not rivals or all(name in candidate and candidate[name].rows is None for name in self._signs):
            return False
        beliefs = [self._belief(name, candidate, rivals) for name in self._signs]
        if any(belief is None for belief in beliefs):
            return False
        signs = np.array(list(self._signs.values()))
        mean, deviation = np.array([belief for belief in beliefs if belief is not None]).T
        points = signs * np.array([[rival[name].value for name in self._signs] for rival in rivals])
        front = points[pareto.non_dominated(points) & (points > self._reference).all(1)]
        if not len(front):
            return False
        gain, alone = self._volumes(signs * mean + deviation * self._normal, front)
        left = 1 - sum(candidate[name].examples for name in self._signs) / sum(rivals[0][name].examples for name in self._signs)
        return gain <= self.worth * left * alone / max(tried, len(rivals))

    def estimate(self, candidate: Scores, rivals: Sequence[Scores]) -> dict[str, Score]:
        """A stopped candidate's scores with the values and the margins that it would have on all rows, as far as its rivals
        tell.

        They are for a sampler to learn from, never for a front: `rows` still says what was seen.
        """
        found = {}
        for name, score in candidate.items():
            belief = self._belief(name, candidate, rivals) if name in self._signs else None
            if belief is not None:
                margins = _margins(_whole(name, rivals))
                score = replace(score, value=belief[0], expected=None if margins is None else _expected(score, margins))
            found[name] = score
        return found

    def _belief(self, name: str, candidate: Scores, rivals: Sequence[Scores]) -> tuple[float, float] | None:
        """What the candidate will score on all rows: mean and standard deviation; None if that cannot be told."""
        score = candidate.get(name)
        if score is None:
            return None
        if score.rows is None:
            return score.value, 0.0
        known = _whole(name, rivals)
        if score.outcomes is None or len(known) < LEAST_RIVALS:
            return None
        outcomes = np.array([rival.outcomes for rival in known], dtype=np.float64)
        if score.margins is not None and (margins := _margins(known)) is not None:
            seen = score.outcomes.astype(np.float64), score.margins.astype(np.float64)
            mean, variance = predicted_share(*seen, score.rows, margins, smooth=name in self.smoothed)
        else:
            mean, variance = predicted_mean(score.outcomes.astype(np.float64), score.rows, outcomes)
        return _valued(mean, variance, outcomes.mean(1), np.array([rival.value for rival in known]))

    def _volumes(self, draws: Floats, front: Floats) -> tuple[float, float]:
        """What draws `(B, m)` of a candidate add to the front's hypervolume on average, and the sum of what its points dominate
        alone, by counting points of a box that holds them all."""
        top = np.maximum(draws.max(0), front.max(0))
        places = self._reference + self._places * (top - self._reference)
        times = _reach(front, places).sum(0)
        return float(_reach(draws, places[times == 0]).sum(1).mean()), float((times == 1).sum())


def _whole(name: str, rivals: Sequence[Scores]) -> list[Score]:
    """An objective's scores that hold outcomes of all rows."""
    return [rival[name] for rival in rivals if rival[name].rows is None and rival[name].outcomes is not None]


def _margins(scores: Sequence[Score]) -> Floats | None:
    """All margins `(m, n)`, if every score has them."""
    if any(score.margins is None for score in scores):
        return None
    return np.array([score.margins for score in scores], dtype=np.float64)


def _expected(score: Score, rivals: Floats) -> Floats | None:
    """The margins of all rows `(n,)`: those seen, and for the others what the regression of `predicted_share` says."""
    if score.margins is None or score.rows is None:
        return None
    margins, seen = score.margins.astype(np.float64), rivals[:, score.rows]
    slopes, _, _ = _regression(margins, seen, prior=PRIOR_MARGINS, misses=MISSES)
    found: Floats = margins.mean() + slopes @ (rivals - seen.mean(1, keepdims=True))
    found[score.rows] = margins
    return found


def _reach(points: Floats, places: Floats) -> NDArray[np.bool_]:
    """Which `points` `(n, m)` are nowhere below which `places` `(k, m)`: `(n, k)`. One objective at a time: an order of
    magnitude faster than all of them along the last axis."""
    found = np.ones((len(points), len(places)), dtype=bool)
    for values, limits in zip(points.T, np.ascontiguousarray(places.T), strict=True):
        found &= np.greater_equal.outer(values, limits)
    return found


def race(rounds: Iterable[Scores], racing: Racing, rivals: Sequence[Scores], tried: int = 0) -> tuple[Scores, bool]:
    """Measures round after round until the last one, or until the candidate stops: its scores, and whether it stopped.

    The scores of one that stopped are estimates. `rounds` is left where it is, so nothing more is computed.
    """
    scores: Scores = {}
    for scores in rounds:
        if racing.stops(scores, rivals, tried):
            return racing.estimate(scores, rivals), True
    return scores, False


def predicted_mean(outcomes: Floats, rows: np.ndarray, rivals: Floats) -> tuple[float, float]:
    """The mean outcome over all rows of a candidate seen on `rows` alone, and the variance of that prediction.

    Bayesian linear regression of its outcomes `(n,)` on those of the rivals `(m, all rows)`, with a free intercept and a
    Gaussian prior on the slopes whose mean is 1/m each. Rows not seen are predicted; rows seen are known. With one rival and
    a slope of 1 this is the rival's mean plus the mean paired difference.
    """
    n, whole = len(outcomes), rivals.shape[1]
    if n == whole:
        return float(outcomes.mean()), 0.0
    unseen = np.delete(rivals, rows, axis=1).mean(1)
    # Outcomes that agree on every row so far are not certain to go on agreeing: as if two more rows did not.
    slopes, inverse, noise = _regression(outcomes, rivals[:, rows], prior=PRIOR_ROWS, misses=2)
    shift, share = unseen - rivals[:, rows].mean(1), 1 - n / whole
    mean = float(outcomes.mean() + share * (slopes @ shift))
    return mean, float(noise * share**2 * (1 / n + 1 / (whole - n) + shift @ inverse @ shift))


def predicted_share(
    outcomes: Floats, margins: Floats, rows: np.ndarray, rivals: Floats, smooth: bool = False
) -> tuple[float, float]:
    """The share of right answers over all rows of a candidate seen on `rows` alone, and the variance of that prediction.

    The regression of `predicted_mean`, of the candidate's margins `(n,)` on those of the rivals `(m, all rows)`. A row not
    seen is right with the probability that its margin, a normal then, is above 0; or if they are `smooth`, in part. What all
    rows share of the error, by the doubt about intercept and slopes, is carried over to the mean by the first derivative.
    """
    n, whole = len(outcomes), rivals.shape[1]
    if n == whole:
        return float(outcomes.mean()), 0.0
    seen = rivals[:, rows]
    slopes, inverse, noise = _regression(margins, seen, prior=PRIOR_MARGINS, misses=MISSES)
    shifts = np.delete(rivals, rows, axis=1) - seen.mean(1, keepdims=True)
    expected = margins.mean() + slopes @ shifts
    variances = noise * (1 + 1 / n + np.einsum("iu,iu->u", shifts, inverse @ shifts))
    if smooth:
        both = np.concatenate([margins, expected]), np.concatenate([np.zeros(n), variances])
        mean = float(smoothed(*both).mean())
        widths = np.sqrt(variances + BAND**2 * (both[0] ** 2 + both[1]).mean())
    else:
        widths = np.sqrt(variances)
        mean = float(outcomes.sum() + ndtr(expected / widths).sum()) / whole
    z = expected / widths
    right, rises = ndtr(z), np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / widths
    alone = (rises**2).sum() * noise if smooth else (right * (1 - right)).sum()
    moved = shifts @ rises
    variance = alone + noise * (rises.sum() ** 2 / n + moved @ inverse @ moved)
    return mean, float(variance) / whole**2


def _regression(values: Floats, seen: Floats, *, prior: float, misses: float) -> tuple[Floats, Floats, float]:
    """Of `values` `(n,)` on `seen` `(m, n)`, both less their means: slopes, their covariance in units of the noise's variance,
    and that variance. The prior counts as so many rows, and the noise is as if so many more rows had been missed."""
    centered, wanted = seen - seen.mean(1, keepdims=True), values - values.mean()
    scale = max(float(seen.var(1).mean()), float(values.var()), 1e-12)
    gram = centered @ centered.T
    inverse = np.linalg.inv(gram + prior * scale * np.eye(len(seen)))
    slopes = np.full(len(seen), 1 / len(seen))
    slopes += inverse @ (centered @ (wanted - slopes @ centered))
    left, n = wanted - slopes @ centered, len(values)
    freedom = max(n - 1 - float(np.trace(inverse @ gram)), n / 4)
    return slopes, inverse, (float(left @ left) + misses * scale) / freedom


def _valued(mean: float, variance: float, means: Floats, values: Floats) -> tuple[float, float]:
    """The metric's value at a mean outcome, and its standard deviation, by the rivals' line through (mean outcome, value)."""
    if np.allclose(means, values, rtol=1e-5, atol=1e-6):
        return mean, variance**0.5
    spread = float(((means - means.mean()) ** 2).sum())
    slope = float(((means - means.mean()) * (values - values.mean())).sum()) / max(spread, 1e-12)
    left = values - values.mean() - slope * (means - means.mean())
    scatter = float(left @ left) / max(len(means) - 2, 1)
    doubt = scatter * (1 + 1 / len(means) + (mean - means.mean()) ** 2 / max(spread, 1e-12))
    return float(values.mean() + slope * (mean - means.mean())), float(slope**2 * variance + doubt) ** 0.5


def _spread(count: int, dimensions: int) -> Floats:
    """Points `(count, dimensions)` that fill the unit cube evenly: Roberts' additive recurrence, whose generalized golden ratio
    is the root above 1 of g**(d+1) = g + 1."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    found: Floats = (0.5 + np.arange(1, count + 1)[:, None] * ratio ** -np.arange(1.0, dimensions + 1)) % 1
    return found
