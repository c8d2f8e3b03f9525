"""NSGA-II and NSGA-III whose first generation holds the recipes that were enqueued.

Children are drawn by BLX-α (Eshelman and Schaffer, 1993), the one crossover that was better than Optuna's default in
`benchmarks/crossover.py`. True hypervolume of the reported front as a share of the known one, mean ± s.e. over 20 problems with
accuracies on 500 rows, for 60 and 100 evaluations (populations of 12 and 20):

    random sampler      0.684 ± 0.006   0.746 ± 0.008
    uniform             0.698 ± 0.007   0.764 ± 0.007
    SBX                 0.675 ± 0.012   0.771 ± 0.009
    BLX-α               0.732 ± 0.012   0.817 ± 0.009

Uniform and SBX are within noise of random at 60; polynomial mutation helped neither of them. BLX-α's lead over uniform, 0.035
to 0.058 at 60 and 0.042 to 0.053 at 100, was there without noise and with less conflict between the tasks as well. It is one
synthetic family of problems: a direction, not a law.
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
