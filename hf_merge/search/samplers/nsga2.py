"""NSGA-II and NSGA-III whose first generation holds the recipes that were enqueued.

Children are drawn by BLX-α (Eshelman and Schaffer, 1993), which `benchmarks/crossover.py` chose. TABLE
It is one synthetic problem: a direction, not a law.
"""

import optuna
from optuna.samplers import NSGAIIISampler, NSGAIISampler
from optuna.trial import FrozenTrial


class SeededNSGAIISampler(NSGAIISampler):
    """Optuna's NSGA-II, with enqueued trials in the generation in which they run.

    Optuna gives them no generation, so they are never parents of anything. The mark is stored under this class's name:
    renaming it restarts the generations of stored studies.
    """

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)


class SeededNSGAIIISampler(NSGAIIISampler):
    """Optuna's NSGA-III, with enqueued trials in the generation in which they run (see `SeededNSGAIISampler`)."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)


def population(trials: int) -> int:
    """The population for a budget of `trials`: some five generations, of 8 to 50."""
    return min(max(trials // 5, 8), 50)
