"""NSGA-II and NSGA-III for tens of evaluations: one child at a time, and every trial may be its parent.

The steady-state form (Durillo et al., 2009): there are no generations to wait for, so the queued recipes, late results and
other workers' trials are parents as soon as they are scored. The numbers below were chosen on instances of
`benchmarks/search.py` that its tables do not use.
"""

import numpy as np
import optuna
import torch
from optuna.samplers import NSGAIISampler
from optuna.trial import FrozenTrial

from hf_merge.pareto import Floats
from hf_merge.search.samplers.evolution import Indices, by_crowding, by_direction, children
from hf_merge.search.samplers.numbered import Cube, History, NumberedSampler

DESIGN = 20
"""Trials before the first child: the queued ones, then a Sobol sequence."""


class NSGA2Sampler(NumberedSampler):
    """NSGA-II (Deb et al., 2002), steady-state.

    The parents are drawn from the best `population` trials and the whole front, in two tournaments by rank and crowding; of the
    second's candidates the one that is nearer to the first parent in the objectives is taken. A child is made by BLX-α and
    polynomial mutation. Trials that break constraints come after all that do not.
    """

    def __init__(self, *, seed: int = 0, population: int = 12, design: int = DESIGN) -> None:
        super().__init__(seed=seed)
        self.population, self.design = population, design

    def propose(self, study: optuna.Study, trial: FrozenTrial, cube: Cube, rng: np.random.Generator) -> Floats:
        """A point of the design, then children."""
        history = History.of(study, cube)
        if len(history.points) < max(self.design, 2):
            return sobol(len(cube.space), seed=self.seed, index=trial.number)
        parents = self.parents(history, rng)
        for _ in range(20):
            mother, father = self.pair(history.losses[parents], rng)
            child = children(history.points[parents[[mother]]], history.points[parents[[father]]], cube.choices, rng)[0]
            if not (np.concatenate([history.points, history.running]) == child).all(1).any():
                break
        return child

    def parents(self, history: History, rng: np.random.Generator) -> Indices:
        """Indices of the trials that may have children, best first."""
        return by_crowding(history.losses, self.population, history.violations, whole_ranks=True)

    def pair(self, losses: Floats, rng: np.random.Generator) -> tuple[int, int]:
        """Two different rows of the parents' `losses`."""
        first = int(rng.integers(len(losses), size=2).min())
        others = np.delete(np.arange(len(losses)), first)
        rivals = rng.choice(others, size=min(2, len(others)), replace=False)
        span = np.ptp(losses, axis=0)
        far = ((losses[rivals] - losses[first]) / np.where(span > 0, span, 1.0)) ** 2
        return first, int(rivals[far.sum(1).argmin()])


class NSGA3Sampler(NSGA2Sampler):
    """NSGA-III (Deb and Jain, 2014), steady-state: the parents are the trials that its reference directions choose, and each is
    as likely as the others."""

    def __init__(self, *, seed: int = 0, population: int = 20, design: int = DESIGN) -> None:
        super().__init__(seed=seed, population=population, design=design)

    def parents(self, history: History, rng: np.random.Generator) -> Indices:
        """Indices of the trials that may have children."""
        return by_direction(history.losses, self.population, rng, history.violations)

    def pair(self, losses: Floats, rng: np.random.Generator) -> tuple[int, int]:
        """Two different rows."""
        first, second = rng.choice(len(losses), size=2, replace=False)
        return int(first), int(second)


def sobol(size: int, *, seed: int, index: int) -> Floats:
    """Point number `index` `(size,)` of the scrambled Sobol sequence of a seed."""
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    point: Floats = engine.fast_forward(index).draw(1, dtype=torch.float64).numpy()[0]
    return point


class SeededNSGAIISampler(NSGAIISampler):
    """Optuna's generational NSGA-II, with enqueued trials in the generation in which they run; what `NSGA2Sampler` is
    compared with."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)


def population(trials: int) -> int:
    """The generational population for a budget of `trials`: some five generations, of 8 to 50."""
    return min(max(trials // 5, 8), 50)
