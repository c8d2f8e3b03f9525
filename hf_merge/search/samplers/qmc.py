"""A scrambled Sobol sequence over the whole space, its categories included."""

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from hf_merge.pareto import Floats
from hf_merge.search.samplers.nsga2 import sobol
from hf_merge.search.samplers.numbered import Cube, NumberedSampler


class QMCSampler(NumberedSampler):
    """The point of the sequence whose index is the trial's number. (Optuna's own draws categories at random.)"""

    def propose(self, study: optuna.Study, trial: FrozenTrial, cube: Cube, rng: np.random.Generator) -> Floats:
        """The next point of the sequence."""
        return sobol(len(cube.space), seed=self.seed, index=trial.number)
