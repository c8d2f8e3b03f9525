"""Samplers whose draw depends on the seed, the trial's number and the study's trials, and on nothing else.

So a search that is stopped between trials and resumed goes on as if it had not been, and workers with equal seeds draw
different points.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from zlib import crc32

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hf_merge.pareto import Floats


@dataclass(frozen=True)
class Cube:
    """A search space as the unit cube: one coordinate for each parameter, a category in the middle of its share of it."""

    space: Mapping[str, BaseDistribution]

    @property
    def choices(self) -> NDArray[np.int64]:
        """How many categories each coordinate has `(d,)`; 0 for numbers."""
        return np.array(
            [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in self.space.values()], dtype=int
        )

    def encode(self, params: Mapping[str, Any]) -> Floats:
        """The point `(d,)` of these values; values beyond their range come to its end."""
        return np.array([_to_unit(d, params[name]) for name, d in self.space.items()])

    def decode(self, point: Floats) -> dict[str, Any]:
        """The values at a point `(d,)`."""
        return {name: _from_unit(d, float(x)) for (name, d), x in zip(self.space.items(), np.clip(point, 0, 1), strict=True)}

    def features(self, points: Floats) -> Floats:
        """Points `(n, d)` with every category as a coordinate of its own, 0 or 1."""
        columns = []
        for column, size in zip(points.T, self.choices, strict=True):
            chosen = np.minimum((column * size).astype(int), size - 1)
            columns += [column] if size == 0 else [(chosen == i).astype(float) for i in range(size)]
        return np.stack(columns, axis=-1)

    def from_features(self, features: Floats) -> Floats:
        """The point `(d,)` of one row of features: of each parameter's categories the one with the greatest coordinate."""
        found, at = [], 0
        for size in self.choices:
            part = features[at : at + max(size, 1)]
            found.append(part[0] if size == 0 else (int(np.argmax(part)) + 0.5) / size)
            at += len(part)
        return np.array(found)


@dataclass(frozen=True)
class History:
    """What is known when a point is drawn: `points` `(n, d)` of the cube, their `losses` `(n, m)` (all minimized) and summed
    constraint `violations` `(n,)`, in the order of the trials; the points that are `running` `(r, d)`."""

    points: Floats
    losses: Floats
    violations: Floats
    running: Floats
    trials: Sequence[FrozenTrial]

    @classmethod
    def of(cls, study: optuna.Study, cube: Cube) -> "History":
        """The study's complete trials that have all the cube's parameters; without those that only repeat a recipe."""
        known = [
            t
            for t in study.get_trials(deepcopy=False)
            if "repeat_of" not in t.user_attrs and cube.space.keys() <= t.params.keys()
        ]
        done = [t for t in known if t.state == TrialState.COMPLETE]
        signs = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions])
        running = [cube.encode(t.params) for t in known if t.state == TrialState.RUNNING]
        return cls(
            points=np.array([cube.encode(t.params) for t in done]).reshape(len(done), len(cube.space)),
            losses=np.array([t.values for t in done], dtype=float).reshape(len(done), len(signs)) * signs,
            violations=np.array([sum(max(c, 0.0) for c in t.constraints.values()) for t in done], dtype=float),
            running=np.array(running).reshape(len(running), len(cube.space)),
            trials=done,
        )


class NumberedSampler(BaseSampler):
    """A sampler that proposes a point of the cube. `seed` and a trial's number are all the chance there is in it."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def propose(self, study: optuna.Study, trial: FrozenTrial, cube: Cube, rng: np.random.Generator) -> Floats:
        """The next point `(d,)` of `cube`."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all complete trials have."""
        shared = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: d for name, d in shared.items() if not d.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A proposal's values."""
        if not search_space:
            return {}
        cube = Cube(search_space)
        return cube.decode(self.propose(study, trial, cube, self._rng(trial)))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform draw, for what no complete trial has."""
        return _from_unit(param_distribution, self._rng(trial, crc32(param_name.encode())).random())

    def _rng(self, trial: FrozenTrial, *more: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, trial.number, *more))


def _to_unit(distribution: BaseDistribution, value: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    numbers = cast(FloatDistribution | IntDistribution, distribution)
    low, high, x = float(numbers.low), float(numbers.high), float(value)
    if numbers.log:
        low, high, x = np.log([low, high, x]).tolist()
    return min(max((x - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def _from_unit(distribution: BaseDistribution, x: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(x * len(distribution.choices)), len(distribution.choices) - 1)]
    numbers = cast(FloatDistribution | IntDistribution, distribution)
    low, high = float(numbers.low), float(numbers.high)
    value = float(np.exp(np.log(low) + x * np.log(high / low))) if numbers.log else low + x * (high - low)
    if numbers.step is not None:
        value = low + round((value - low) / numbers.step) * numbers.step
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else value
