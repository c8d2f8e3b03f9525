"""The samplers by name."""

import warnings
from collections.abc import Callable, Mapping
from hashlib import blake2b
from importlib import import_module
from types import MappingProxyType

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from hf_merge.errors import RecipeError, unknown
from hf_merge.search.samplers.map import MAPSampler
from hf_merge.search.samplers.nsga2 import NSGA2Sampler, NSGA3Sampler
from hf_merge.search.samplers.qmc import QMCSampler


def _of_extra(module: str, name: str, needed: str, install: str) -> Callable[[int], BaseSampler]:
    """A sampler whose module imports what may not be installed."""

    def make(seed: int) -> BaseSampler:
        try:
            found = import_module(f"hf_merge.search.samplers.{module}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in needed.split():
                raise
            raise RecipeError(f"The sampler {module!r} needs {error.name}: pip install {install}.") from error
        made: BaseSampler = getattr(found, name)(seed=seed)
        return made

    return make


SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = MappingProxyType(
    {
        "nsga2": lambda seed: NSGA2Sampler(seed=seed),
        "nsga3": lambda seed: NSGA3Sampler(seed=seed),
        "tpe": lambda seed: TPESampler(seed=seed, multivariate=True),
        "gp": lambda seed: GPSampler(seed=seed),
        "mmmo": _of_extra("mmmo", "MMMOSampler", "botorch gpytorch linear_operator", "'hf_merge[bo]'"),
        "map": lambda seed: MAPSampler(seed=seed),
        "cmaes": _of_extra("cmaes", "CMAESSampler", "cmaes", "cmaes"),
        "qmc": lambda seed: QMCSampler(seed=seed),
        "random": lambda seed: RandomSampler(seed=seed),
    }
)
"""Each makes a sampler from a seed."""

STREAMS = ("tpe", "gp", "random")
"""Optuna's own draw from one stream of random numbers. The others' draws depend on the trial's number as well."""


def sampler(given: str | BaseSampler, *, seed: int, trials: int, existing: int) -> BaseSampler:
    """The sampler of a name, or `given` itself if it is one. Raises `RecipeError` for an unknown name, and for a sampler that
    needs a package that is not installed.

    Optuna's own samplers are seeded by (`seed`, `existing`), where `existing` tells apart the runs and the workers of one
    study: a resumed search with the first run's seed would draw the first run's points again. `trials`, the search's whole
    number, is for samplers that plan for it; none does today.
    """
    if isinstance(given, BaseSampler):
        return given
    if given not in SAMPLERS:
        raise RecipeError(unknown("sampler", given, SAMPLERS))
    if given in STREAMS:
        key = blake2b(f"{seed}\0{existing}".encode(), digest_size=4).digest()
        seed = int.from_bytes(key, "little")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return SAMPLERS[given](seed)
