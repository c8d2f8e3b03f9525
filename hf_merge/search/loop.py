"""The search: ask Optuna for a point, score its recipe, tell."""

import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from hf_merge.errors import EvaluationError, HfMergeError, RecipeError, unknown
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import MAXIMIZE, MINIMIZE, Scores
from hf_merge.search.constraints import bounds
from hf_merge.search.opening import Terms, opened
from hf_merge.search.progress import Progress
from hf_merge.search.samplers.names import sampler as sampler_of
from hf_merge.search.space import Space
from hf_merge.search.storage import Storage, alone, journal
from hf_merge.search.study import DEATHS, SILENCE, Study
from hf_merge.search.trial import Trial
from hf_merge.search.worker import Pulse, worker_name

log = logging.getLogger(__name__)

FAILURES = (HfMergeError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""What a recipe may die of while the search goes on (torch's out-of-memory error is a `RuntimeError`). Anything else is a
mistake in the program and ends the search."""

PATIENCE = 100
"""Trials in a row that only repeat recipes before the search gives up: the sampler finds nothing new."""

MISFIT = 3
"""Recipes that fail on a worker before any other before it leaves: one machine that cannot do the work must not spend the
budget."""

POLL = 0.5
"""Seconds between two looks at what other workers are doing, while there is nothing to do for this one."""


def search(
    score: Callable[[Recipe], Scores],
    space: Space,
    directions: Mapping[str, str],
    *,
    trials: int,
    sampler: str | BaseSampler = "nsga2",
    seed: int = 0,
    storage: Storage = None,
    study_name: str = "hf_merge",
    fingerprint: Mapping[str, Any] | None = None,
    seeds: Mapping[str, Recipe] | None = None,
    already: Mapping[str, Scores] | None = None,
    constraints: Mapping[str, str] | None = None,
    shared: bool | None = None,
    silence: float = SILENCE,
    progress: bool = True,
    on_trial: Callable[[Trial], None] | None = None,
) -> Study:
    """Evaluates recipes of `space` until the study holds `trials` evaluated ones, earlier runs' and other workers' included.

    `score(recipe)` returns a finite value for every objective of `directions` ("maximize" or "minimize" by name). The first
    trials are the space's parents and their uniform average, then the `seeds` (known recipes by label). A recipe is evaluated
    once: what the sampler repeats is told with the scores it had and is not counted, and so are the scores that are known
    `already` (by the recipe's digest). A recipe that fails (see `FAILURES`) is stored with its error, counts, and is not
    tried again; if all of the first ones fail, nothing will work, and the last error is raised.

    `constraints` are bounds of objectives, such as `{"spam": ">= base - 0.01"}`: `>=` or `<=`, and a number, the label of one
    of the first recipes or "best parent", or one of those plus or minus a number. The samplers are told how far each trial
    breaks them, and the front holds only trials that keep them all.

    Every trial is stored in `storage` as it ends. The same call again resumes: after Ctrl-C (which returns what there is) or a
    killed process, the recipe that was interrupted is evaluated once more and no other. `fingerprint` (JSON values by name)
    says what the scores depend on besides the space and the directions; a study with another one is not resumed.

    The same call in several processes, on any machines, works on one study together if it is `shared`, which is the default
    for everything but a journal file and memory. Recipes are claimed once and the budget is met exactly. A worker may come
    at any time, and go (Ctrl-C puts its recipe back); one that gives no sign of life for `silence` seconds is taken for dead,
    and its recipe is queued again, once. A database that restarts is waited for. PostgreSQL and MySQL are safe across machines,
    and so is Optuna's gRPC proxy in front of one; SQLite and a `shared` journal are safe for the processes of one machine.
    Workers with another fingerprint or other code of hf_merge are refused.

    Raises `RecipeError` for arguments that make no sense and for a stored study with other settings.
    """
    found = checked(space, directions, trials=trials, sampler=sampler, seeds=seeds, constraints=constraints)
    settings = {
        "directions": directions,
        "space": space.description,
        "fingerprint": fingerprint or {},
        "constraints": constraints or {},
    }
    terms = Terms(
        settings=settings,
        parents=[recipe.digest for recipe in space.parents().values()],
        first={label: (recipe, space.params(recipe)) for label, recipe in found.items()},
        silence=silence,
    )
    shared = (storage is not None and journal(storage) is None) if shared is None else shared
    with alone(storage, shared=shared):
        study = opened(storage, study_name, terms, shared=shared)
        name = worker_name() if shared else ""
        existing = 0 if study.made else len(study.optuna.get_trials(deepcopy=False))
        # Two workers that join at the same time must not draw the same points.
        key = existing + (zlib.crc32(name.encode()) << 32 if shared and not study.made else 0)
        study.optuna.sampler = sampler_of(sampler, seed=seed, trials=trials, existing=key)
        run = _Run(study, score, space, trials, already or {}, on_trial, least=len(found), worker=name)
        try:
            run.until_done(progress)
        except KeyboardInterrupt:
            log.warning("Interrupted after %d of %d evaluations. The same call resumes.", study.evaluated, trials)
    return study


def checked(
    space: Space,
    directions: Mapping[str, str],
    *,
    trials: int,
    sampler: str | BaseSampler = "nsga2",
    seeds: Mapping[str, Recipe] | None = None,
    constraints: Mapping[str, str] | None = None,
) -> dict[str, Recipe]:
    """The recipes that a search with these arguments would try first, by label, those that constraints name before the others.
    Raises `RecipeError` as `search` would."""
    sampler_of(sampler, seed=0, trials=trials, existing=0)
    if not directions:
        raise RecipeError("A search needs objectives, got none.")
    for direction in directions.values():
        if direction not in (MAXIMIZE, MINIMIZE):
            raise RecipeError(unknown("direction", direction, (MAXIMIZE, MINIMIZE)))
    first = space.seeds()
    for label in seeds or {}:
        if label in first:
            raise RecipeError(f"The seed {label!r} has the name of a parent or of the uniform average. Give it another one.")
    found = first | dict(seeds or {})
    if trials < len(found):
        raise RecipeError(f"trials={trials} is not enough for the {len(found)} first recipes: {', '.join(found)}.")
    anchors = {bound.anchor for bound in bounds(constraints or {}, directions, found).values()}
    return {label: found[label] for label in sorted(found, key=lambda label: label not in anchors)}


@dataclass
class _Run:
    study: Study
    score: Callable[[Recipe], Scores]
    space: Space
    trials: int
    already: Mapping[str, Scores]
    on_trial: Callable[[Trial], None] | None
    least: int
    worker: str
    bad_luck: int | None = 0
    """Recipes that failed here before the first that did not."""

    def until_done(self, progress: bool) -> None:
        """Evaluates until the budget is met, by this worker and the others."""
        with Progress(self.trials, self.study.evaluated, self.study.directions, shown=progress) as bar:
            self.pulse = Pulse(self.study.optuna, self.study.silence, lambda stored: self._show(bar, stored))
            with self.pulse if self.worker else nullcontext():
                in_a_row = 0
                while in_a_row < PATIENCE:
                    self._bury()
                    standing = self.study.standing()
                    if standing.evaluated >= self.trials:
                        return
                    if standing.claimed >= self.trials and not standing.queued:  # the last ones are running elsewhere
                        time.sleep(POLL)
                        continue
                    in_a_row = in_a_row + 1 if self._repeats() else 0
                    self._show(bar)
        evaluated = self.study.evaluated
        log.warning(
            "Stopped after %d of %d evaluations: %d trials in a row brought no new recipe.", evaluated, self.trials, PATIENCE
        )

    def _repeats(self) -> bool:
        """Runs the next trial; whether it only repeated a recipe."""
        asked = None
        try:
            asked = self.study.optuna.ask(self.space.distributions)
            return self._run(asked)
        except UpdateFinishedTrialError:
            log.warning("A trial was taken from this worker, which gave no sign of life for too long.")
            return False
        except BaseException:
            if asked is not None or not self.worker:
                self.study.requeue([asked.number] if asked is not None else None, died=False)
            raise
        finally:
            self.pulse.runs(None)

    def _run(self, asked: optuna.Trial) -> bool:
        recipe = self.study.start(asked, self.space.recipe(asked.params), known=self.already, worker=self.worker)
        self.pulse.runs(asked)
        while (claim := self.study.claim(asked, self.trials)).pending:
            self._bury()
            time.sleep(POLL / 5)
        if claim.over:
            self.study.drop(asked)
            return False
        if claim.repeat_of is not None:
            same = self.study.ended(claim.repeat_of)
            if same is None:
                self.study.drop(asked, repeat_of=claim.repeat_of)
            else:
                self.study.finish(asked, scores=same.scores, error=same.error or "", repeat_of=same.number)
            return True
        trial = self._tried(asked, recipe)
        if trial is None:
            raise UpdateFinishedTrialError
        self.study.fix_reference()
        if self.on_trial is not None:
            self.on_trial(trial)
        return False

    def _tried(self, asked: optuna.Trial, recipe: Recipe) -> Trial | None:
        deaths = asked.user_attrs.get("deaths", 0)
        if deaths >= DEATHS:
            return self.study.finish(asked, error=f"{deaths} processes died while they evaluated it.")
        start = time.perf_counter()
        try:
            scores = _finite(self.already.get(recipe.digest) or self.score(recipe), self.study.directions)
        except FAILURES as error:
            return self._failed(asked, recipe, error, time.perf_counter() - start)
        self.bad_luck = None
        known = recipe.digest in self.already
        return self.study.finish(asked, scores=scores, seconds=0.0 if known else time.perf_counter() - start)

    def _failed(self, asked: optuna.Trial, recipe: Recipe, error: Exception, seconds: float) -> Trial | None:
        message = f"{type(error).__name__}: {error}"
        trial = self.study.finish(asked, error=message, seconds=seconds)
        log.warning("Trial %d failed: %s (%s)", asked.number, message, recipe)
        tried = self.study.trials
        if len(tried) >= self.least and not any(t.scores for t in tried):
            error.add_note(f"None of the first {len(tried)} recipes of the search could be scored.")
            raise error
        if self.worker and self.bad_luck is not None:
            self.bad_luck += 1
            if self.bad_luck == MISFIT:
                error.add_note(f"All of the first {MISFIT} recipes that this worker ran failed, and others' did not.")
                raise error
        return trial

    def _bury(self) -> None:
        """Puts back what workers that died were evaluating."""
        if self.worker and (stale := self.pulse.stale()):
            log.warning(
                "No sign of life from the worker of trial %s; its recipe is put back.", ", ".join(map(str, sorted(stale)))
            )
            self.study.requeue(stale)

    def _show(self, bar: Progress, stored: list[FrozenTrial] | None = None) -> None:
        if bar.shown:
            standing = self.study.standing(stored)
            trials, reference = self.study.trials, self.study.reference
            bar.show(trials, reference, evaluated=standing.evaluated, running=standing.running)


def _finite(scores: Scores, directions: Mapping[str, str]) -> Scores:
    missing = [name for name in directions if name not in scores]
    if missing:
        raise EvaluationError(f"No score for {', '.join(missing)}; got {', '.join(scores) or 'none'}.")
    for name in directions:
        if not math.isfinite(scores[name].value):
            raise EvaluationError(f"The score of {name!r} is {scores[name].value}.")
    return scores
