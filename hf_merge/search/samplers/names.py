"""The samplers by name."""

import warnings
from collections.abc import Callable, Mapping
from hashlib import blake2b
from types import MappingProxyType

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.samplers.nsgaii import BLXAlphaCrossover

from hf_merge.errors import RecipeError, unknown
from hf_merge.search.samplers.nsga2 import SeededNSGAIIISampler, SeededNSGAIISampler, population

SAMPLERS: Mapping[str, Callable[[int, int], BaseSampler]] = MappingProxyType(
    {
        "nsga2": lambda seed, trials: SeededNSGAIISampler(
            seed=seed, population_size=population(trials), crossover=BLXAlphaCrossover()
        ),
        "nsga3": lambda seed, trials: SeededNSGAIIISampler(
            seed=seed, population_size=population(trials), crossover=BLXAlphaCrossover()
        ),
        "tpe": lambda seed, trials: TPESampler(seed=seed, multivariate=True),
        "gp": lambda seed, trials: GPSampler(seed=seed),
        "random": lambda seed, trials: RandomSampler(seed=seed),
    }
)
"""Each makes a sampler from a seed and the search's whole number of trials."""


def sampler(given: str | BaseSampler, *, seed: int, trials: int, existing: int) -> BaseSampler:
    """The sampler of a name, or `given` itself if it is one. Raises `RecipeError` for an unknown name.

    It is seeded by (`seed`, number of `existing` trials in the study): a resumed search with the first run's seed would
    draw the first run's points again.
    """
    if isinstance(given, BaseSampler):
        return given
    if given not in SAMPLERS:
        raise RecipeError(unknown("sampler", given, SAMPLERS))
    key = blake2b(f"{seed}\0{existing}".encode(), digest_size=4).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return SAMPLERS[given](int.from_bytes(key, "little"), trials)
