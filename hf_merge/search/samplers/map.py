"""MAP (arXiv:2406.07529, ICLR 2025) for a budget: the front that a surrogate predicts, verified point by point.

MAP fits a quadratic for each objective to some evaluations, finds the quadratics' front with NSGA-III and evaluates points
of it. Here every evaluation is learned from before the next one is chosen, the point is the one that is predicted to improve
the front most, and a Gaussian process follows what a quadratic cannot. Where trials have margins (`leads`), these are learned
and not the values that they make. The original searches [-3, 3] whatever it has sampled; here it is the range that was sampled.
"""

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hf_merge.pareto import Floats, non_dominated
from hf_merge.search.leads import leads_of
from hf_merge.search.samplers.evolution import Indices, by_crowding, by_direction, children, reflected
from hf_merge.search.samplers.nsga2 import DESIGN, sobol
from hf_merge.search.samplers.numbered import Cube, History, NumberedSampler
from hf_merge.search.samplers.surrogate import MarginSurrogate, Surrogate

PREDICTED = "map:predicted"
"""The system attribute of a trial with the values that were expected of it, one for each objective."""

SAMPLES = 6000
"""Random points that measure a hypervolume."""

REACH = 0.8
"""Hypervolume counts up to this quantile of the design's losses, in each objective. The front's own ends would not do: a front
that is short at first would stay so, and points that are hopeless in one objective are on the front all the same."""

LEAST = 0.05
"""And it counts beyond the front's best by at least this part of all trials' range: the design may have
been that good."""

NEAR = 1e-3
"""A point is new if one of its coordinates is so far from those of each other point."""


FOLLOWS = 0.8
"""How much of an objective's variance margins explain at least where they are modeled in its place."""


class MAPSampler(NumberedSampler):
    """Proposes the point that is predicted to improve the front most, after `design` trials (queued ones, then a Sobol
    sequence).

    `process=False` leaves the quadratics of the values alone: MAP as it was published, one point at a time. With `optimism` a
    prediction is better by so many standard deviations (the paper's "Bayesian MAP" has ½); on `benchmarks/search.py` it
    brought nothing.
    What was expected of a trial is kept with it; `prediction_errors` compares it with what came.
    Constraints are modeled like objectives: a point is predicted to keep all of them if there is such a point.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        design: int = DESIGN,
        optimism: float = 0.0,
        process: bool = True,
        size: int = 40,
        generations: int = 15,
    ) -> None:
        super().__init__(seed=seed)
        self.design, self.optimism, self.process = design, optimism, process
        self.size, self.generations = size, generations

    def propose(self, study: optuna.Study, trial: FrozenTrial, cube: Cube, rng: np.random.Generator) -> Floats:
        """A point of the design, then of the predicted front."""
        history = History.of(study, cube)
        if len(history.points) < max(self.design, 3):
            return sobol(len(cube.space), seed=self.seed, index=trial.number)
        signs = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions])
        search = _Search(history, cube, signs, rng, self)
        point = search.best()
        if point is None:
            return rng.random(len(cube.space))
        expected = search.losses(point[None], 0.0)[0] * signs
        study._storage.set_trial_system_attr(trial._trial_id, PREDICTED, expected.tolist())
        return point


def prediction_errors(study: optuna.Study) -> list[float]:
    """The mean absolute error of what `map` predicted, for each objective in its own unit; NaN without predictions."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE and PREDICTED in t.system_attrs]
    if not done:
        return [float("nan")] * len(study.directions)
    missed = np.array([np.subtract(t.system_attrs[PREDICTED], t.values) for t in done])
    return [float(v) for v in np.abs(missed).mean(0)]


class _Search:
    """One search of the surrogates' front."""

    def __init__(self, history: History, cube: Cube, signs: Floats, rng: np.random.Generator, settings: MAPSampler) -> None:
        self.cube, self.signs, self.rng, self.settings = cube, signs, rng, settings
        self.known = np.concatenate([history.points, history.running])
        self.points, self.broken = history.points, history.violations
        features = cube.features(history.points)
        self.models = [self._model(features, history, i) for i in range(len(signs))]
        self.told = self.open = np.stack([m.values for m in self.models], axis=1) * signs
        feasible = history.violations <= 0
        self.limit = None if feasible.all() else Surrogate(features, history.violations, process=settings.process)
        # What a race stopped is never on the front, whatever it is expected to score.
        whole = np.array([not t.user_attrs.get("stopped", False) for t in history.trials])
        reached = self.told[feasible & whole] if (feasible & whole).any() else self.told
        if len(history.running):
            reached = np.concatenate([reached, self.losses(history.running, 0.0)])
        self.front = reached[non_dominated(-reached)]
        self.errors = np.array([m.error for m in self.models])

    def _model(self, features: Floats, history: History, objective: int) -> Surrogate | MarginSurrogate:
        values = history.losses[:, objective] * self.signs[objective]
        margins = leads_of(history.trials, objective) if self.settings.process else None
        if margins is not None and (model := MarginSurrogate(features, margins, values)).follows > FOLLOWS:
            return model
        return Surrogate(features, values, process=self.settings.process)

    def losses(self, points: Floats, optimism: float) -> Floats:
        """What is expected at points `(n, d)`."""
        features = self.cube.features(points)
        found = [s * m.predict(features, -s * optimism) for s, m in zip(self.signs, self.models, strict=True)]
        return np.stack(found, axis=1)

    def hopes(self, points: Floats) -> Floats:
        """The same with the settings' optimism, but records in an objective are only believed beyond the model's error: where
        the best is reached, noise in the model would else promise a little more of it forever."""
        losses, best = self.losses(points, self.settings.optimism), self.front.min(0)
        return np.where(losses < best, np.minimum(losses + self.errors, best), losses)

    def violations(self, points: Floats) -> Floats:
        """By how much points are expected to break the constraints, 0 if by less than half of what the least did."""
        if self.limit is None:
            return np.zeros(len(points))
        expected = self.limit.predict(self.cube.features(points))
        return np.where(expected > self.broken[self.broken > 0].min() / 2, expected, 0.0)

    def best(self) -> Floats | None:
        """The new point that is expected to improve the front most; None if no point is new."""
        points, losses, violations = self._evolved()
        self.open = self._undominated(np.concatenate([self.front, losses]).min(0))
        new = self._new(points)
        if not new.any():
            return None
        points = points[new]
        gains = self._gains(losses[new], violations[new])
        for width in (0.1, 0.03, 0.01):
            near = self._around(points[gains.argmax()], width)
            near = near[self._new(near)]
            points = np.concatenate([points, near])
            gains = np.concatenate([gains, self._gains(self.hopes(near), self.violations(near))])
        return points[gains.argmax()]

    def _evolved(self) -> tuple[Floats, Floats, Floats]:
        """NSGA-III's last population, its losses and its violations."""
        size, rng = self.settings.size, self.rng
        start = by_crowding(self.told, size // 2, self.broken)
        points = np.concatenate([self.points[start], rng.random((size - len(start), self.points.shape[1]))])
        losses, violations = self.hopes(points), self.violations(points)
        for _ in range(self.settings.generations):
            mothers, fathers = rng.integers(size, size=(2, size))
            made = children(points[mothers], points[fathers], self.cube.choices, rng)
            points = np.concatenate([points, made])
            losses = np.concatenate([losses, self.hopes(made)])
            violations = np.concatenate([violations, self.violations(made)])
            kept: Indices = by_direction(losses, size, rng, violations)
            points, losses, violations = points[kept], losses[kept], violations[kept]
        return points, losses, violations

    def _gains(self, losses: Floats, violations: Floats) -> Floats:
        """The hypervolume that each point adds to the front, as a count of `SAMPLES` points of the box that `_box` says."""
        kept = np.flatnonzero(violations <= 0)
        found = -1.0 - violations
        found[kept] = (losses[kept, None] <= self.open).all(-1).sum(1)
        return found

    def _undominated(self, ideal: Floats) -> Floats:
        """Points of the box of losses from `ideal` to where they count, without those that the front dominates."""
        front, first = self.front, self.told[: self.settings.design]
        worst = np.maximum(np.quantile(first, REACH, axis=0), front.min(0) + LEAST * np.ptp(self.told, axis=0) + 1e-12)
        drawn = ideal + self.rng.random((SAMPLES, len(ideal))) * (worst - ideal)
        return drawn[~(front <= drawn[:, None]).all(-1).any(1)]

    def _around(self, point: Floats, width: float) -> Floats:
        """Points that differ from `point` in about half of its numbers."""
        moves = self.rng.normal(size=(self.settings.size, len(point))) * (
            self.rng.random((self.settings.size, len(point))) < 0.5
        )
        return reflected(point + width * moves * (self.cube.choices == 0))

    def _new(self, points: Floats) -> NDArray[np.bool_]:
        new: NDArray[np.bool_] = np.abs(points[:, None] - self.known).max(-1).min(1) > NEAR
        return new
