"""MM-MO: multi-objective Bayesian optimization of a merge ("It's Morphing Time", arXiv:2407.00487), as an Optuna sampler.

Needs the extra `bo` (BoTorch). What one step does is in `mmmo_proposal`; here is what makes it a sampler: which trials count,
whose turn it is, and what is kept in the study.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from hf_merge.search.samplers.mmmo_encoding import Encoding
from hf_merge.search.samplers.mmmo_proposal import Data, Settings, design, propose

PUBLISHED = Settings(
    acquisition="qEHVI",
    candidates=10,
    batch=5,
    sure=0,
    samples=128,
    restarts=10,
    raw_samples=512,
    iterations=200,
    published=True,
)
"""The authors' set-up: 10 random points, then batches of 5 out of 10; theirs were four, so 30 evaluations."""

LEAST = 3
"""Scored points that it takes to fit a surrogate and to make a mutant."""


def mmmo(*, paper: bool = False, seed: int | None = None, **changes: Any) -> "MMMOSampler":
    """MM-MO with its default settings, or as published with `paper=True` (search for 30 trials then), with `changes` to them by
    name (see `Settings`). Raises `ValueError` for settings that make no sense, `TypeError` for a name that is none."""
    start = PUBLISHED if paper else Settings()
    return MMMOSampler(Settings(**{**vars(start), **changes}), seed=seed)


class MMMOSampler(BaseSampler):
    """Proposes batches of points that are expected to add most to the front.

    Every trial has a place in one sequence, by its number; queued trials take places too, and a trial that runs an interrupted
    one again has that one's. The first `initial` places are a Sobol design, each `batch` of places after it is proposed at
    once, when its first trial asks, and kept in the study's system attributes. So trials may be asked by any number of
    workers; what others still run is taken into account. Failed trials are left out.

    All randomness comes from the seed and the place. The study keeps the seed of the sampler that drew from it first, and
    every later sampler uses that one: a search that was interrupted goes on as if it had not been.

    Numbers of the intersection of all scored trials are searched; choices are one-hot. Constraints that all scored trials
    carry (`trial.set_constraint`) are modeled like objectives and respected. With a single objective the acquisition is
    qLogNEI. Other parameters, and all of the very first trial, are drawn uniformly.
    """

    def __init__(self, settings: Settings | None = None, *, seed: int | None = None) -> None:
        self.settings = settings or Settings()
        self.seed = int(torch.seed() % 2**31) if seed is None else seed
        self._space = IntersectionSearchSpace()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all scored trials have and that have more than one value."""
        return {name: d for name, d in self._space.calculate(study).items() if not d.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point of the trial's place in the sequence."""
        if not search_space:
            return {}
        trials = study.get_trials(deepcopy=False)
        place, seed = places(trials)[trial.number], self._seed(study)
        encoding = Encoding(search_space)
        if place >= self.settings.initial:
            start = place - (place - self.settings.initial) % self.settings.batch
            batch = self._batch(study, start, trials, encoding, seed)
            if place - start < len(batch):
                return {name: value for name, value in batch[place - start].items() if name in search_space}
        return encoding.decode(self._design(place, encoding.width, seed))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform draw."""
        place = places(study.get_trials(deepcopy=False))[trial.number]
        draw = RandomSampler(seed=_derived(self._seed(study), place, param_name))
        return draw.sample_independent(study, trial, param_name, param_distribution)

    def _batch(
        self, study: optuna.Study, start: int, trials: Sequence[FrozenTrial], encoding: Encoding, seed: int
    ) -> list[dict[str, Any]]:
        """The batch from place `start` on: the one in the study, or a new one; none without enough data."""
        key = f"mmmo:batch:{start}+{self.settings.batch}"
        stored = _attributes(study).get(key)
        if stored is None:
            data = observed(trials, study.directions, encoding, self._reference(study))
            if len(data.x) < LEAST:
                return []
            with _quietly():
                rows = propose(data, encoding, self.settings, _derived(seed, start))
            stored = _attributes(study).get(key)  # another worker may have been faster, and its points may be out already
            if stored is None:
                stored = [_internal(encoding.decode(row), encoding.space) for row in rows]
                study._storage.set_study_system_attr(study._study_id, key, stored)
        return [
            {name: d.to_external_repr(point[name]) for name, d in encoding.space.items() if name in point} for point in stored
        ]

    def _design(self, place: int, columns: int, seed: int) -> Tensor:
        if self.settings.published:
            generator = torch.Generator().manual_seed(_derived(seed, place))
            return torch.rand(columns, dtype=torch.float64, generator=generator)
        return design(_derived(seed), 1, columns, start=place)[0]

    def _reference(self, study: optuna.Study) -> Sequence[float] | None:
        stored = study.user_attrs.get("reference")
        return self.settings.reference or (None if stored is None else list(stored.values()))

    def _seed(self, study: optuna.Study) -> int:
        kept = _attributes(study).get("mmmo:seed")
        if kept is None:
            study._storage.set_study_system_attr(study._study_id, "mmmo:seed", self.seed)
            return self.seed
        return int(kept)


def places(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """The place of every trial, by number: how many came before it, less those that only ran an interrupted one again.

    A trial runs another one again if Optuna's heartbeat says so, or if it was queued with all that a failed one had.
    """
    found: dict[int, int] = {}
    failed: dict[str, int] = {}
    taken = 0
    for trial in sorted(trials, key=lambda t: t.number):
        queued = trial.system_attrs.get("fixed_params")
        again = trial.system_attrs.get("failed_trial")
        if again in found:
            place = found[again]
        elif queued is not None and _key(queued) in failed:
            place = failed[_key(queued)]
        else:
            place, taken = taken, taken + 1
        found[trial.number] = place
        if trial.state == TrialState.FAIL:
            failed[_key((queued or {}) | trial.params)] = place
    return found


def observed(
    trials: Sequence[FrozenTrial],
    directions: Sequence[StudyDirection],
    encoding: Encoding,
    reference: Sequence[float] | None = None,
) -> Data:
    """What finished trials scored and what is still running, as far as they have all parameters of the space."""
    able = [t for t in trials if encoding.space.keys() <= t.params.keys()]
    scored = [t for t in able if t.state == TrialState.COMPLETE and all(math.isfinite(v) for v in t.values)]
    running = [t for t in able if t.state == TrialState.RUNNING]
    signs = torch.tensor([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions], dtype=torch.float64)
    limits = sorted(set.intersection(*(set(t.constraints) for t in scored))) if scored else []
    return Data(
        x=encoding.encode([t.params for t in scored]),
        y=torch.tensor([t.values for t in scored], dtype=torch.float64).reshape(len(scored), len(signs)) * signs,
        slack=torch.tensor([[t.constraints[name] for name in limits] for t in scored], dtype=torch.float64).reshape(
            len(scored), len(limits)
        ),
        pending=encoding.encode([t.params for t in running]),
        reference=None if reference is None else torch.tensor(reference, dtype=torch.float64) * signs,
    )


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


def _internal(point: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> dict[str, float]:
    return {name: space[name].to_internal_repr(value) for name, value in point.items()}


def _attributes(study: optuna.Study) -> dict[str, Any]:
    return study._storage.get_study_system_attrs(study._study_id)


def _derived(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


@contextmanager
def _quietly() -> Iterator[None]:
    """One thread, with which fitting is fastest and the same everywhere, and without BoTorch's advice to its callers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
