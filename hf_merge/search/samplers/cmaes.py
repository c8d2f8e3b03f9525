"""CMA-ES on one scalarized objective."""

from collections.abc import Sequence

import numpy as np
import optuna
from cmaes import CMA
from optuna.trial import FrozenTrial

from hf_merge.pareto import Floats
from hf_merge.search.samplers.numbered import Cube, History, NumberedSampler

GENERATION = "cmaes:generation"


class CMAESSampler(NumberedSampler):
    """CMA-ES (Hansen and Ostermeier, 2001) from the best of the queued trials, with σ = 1/6 of every range.

    The one objective is the augmented Tchebycheff distance to the ideal point with `weights` (one for each objective, in their
    order; equal ones by default), each objective scaled to [0, 1] over the trials so far. Categories are coordinates of
    their own, of which the greatest wins. Constraints that are broken add their violation and more than any distance.

    Its state is made again from the trials each time: those with the generation's mark (a system attribute) are told in
    order, and the trials without one, the queued recipes, choose the start.
    """

    def __init__(self, *, seed: int = 0, weights: Sequence[float] | None = None, sigma: float = 1 / 6) -> None:
        super().__init__(seed=seed)
        self.weights, self.sigma = weights, sigma

    def propose(self, study: optuna.Study, trial: FrozenTrial, cube: Cube, rng: np.random.Generator) -> Floats:
        """A draw from the distribution that the trials so far have made."""
        history = History.of(study, cube)
        values = self.distances(history)
        generations = np.array([t.system_attrs.get(GENERATION, -1) for t in history.trials])
        features = cube.features(history.points)
        start = np.flatnonzero(generations < 0)
        mean = features[start[values[start].argmin()]] if start.size else np.full(features.shape[1], 0.5)
        state = CMA(mean=mean, sigma=self.sigma, bounds=np.array([[0.0, 1.0]] * len(mean)), seed=int(rng.integers(2**31)))
        while (members := np.flatnonzero(generations == state.generation)).size >= state.population_size:
            told = members[: state.population_size]
            state.tell([(f, float(v)) for f, v in zip(features[told], values[told], strict=True)])
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, state.generation)
        return cube.from_features(state.ask())

    def distances(self, history: History) -> Floats:
        """Each trial's scalarized value `(n,)`."""
        low, high = history.losses.min(0), history.losses.max(0)
        gap = (history.losses - low) / np.where(high > low, high - low, 1.0)
        weights = np.ones(gap.shape[1]) if self.weights is None else np.asarray(self.weights, dtype=float)
        gap = gap * weights / weights.sum()
        broken = history.violations > 0
        return gap.max(1) + 0.05 * gap.sum(1) + np.where(broken, 2.0 + history.violations, 0.0)
