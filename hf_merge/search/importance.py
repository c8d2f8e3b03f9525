"""Which of the searched parameters mattered."""

import math
import warnings

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from hf_merge.scores import MAXIMIZE
from hf_merge.search.study import Study

LEAST = 20
"""Trials below which nothing is said about importances."""

TOP = 0.25
"""The share of trials that count as good. (At 20 trials the five that Optuna asks for.)"""


def importances(study: Study) -> dict[str, dict[str, float]]:
    """By objective: the parameters' importances for being among the best quarter of the trials, most important first; they sum
    to 1. (PED-ANOVA, arXiv:2304.10255.) Empty if there are fewer than `LEAST` trials."""
    trials = [t for t in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values and t.params]
    if len(trials) < LEAST:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP)
    found = {}
    for index, (name, direction) in enumerate(study.directions.items()):
        sign = -1.0 if direction == MAXIMIZE else 1.0

        def loss(trial: FrozenTrial, index: int = index, sign: float = sign) -> float:
            return sign * trial.values[index]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is new, and that less is better, which it is here
            shares = get_param_importances(study.optuna, evaluator=evaluator, target=loss)
        known = {key: float(value) for key, value in shares.items() if math.isfinite(value)}
        if known:
            found[name] = known
    return found
