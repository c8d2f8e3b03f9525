"""The search: ask Optuna for a point, score its recipe, tell."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from hf_merge.errors import EvaluationError, HfMergeError, RecipeError, unknown
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import MAXIMIZE, MINIMIZE, Scores
from hf_merge.search.progress import Progress
from hf_merge.search.samplers.names import sampler as sampler_of
from hf_merge.search.space import Space
from hf_merge.search.storage import Storage, alone
from hf_merge.search.study import Study
from hf_merge.search.trial import Trial

log = logging.getLogger(__name__)

FAILURES = (HfMergeError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""What a recipe may die of while the search goes on (torch's out-of-memory error is a `RuntimeError`). Anything else is a
mistake in the program and ends the search."""

PATIENCE = 100
"""Trials in a row that only repeat recipes before the search gives up: the sampler finds nothing new."""


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
    progress: bool = True,
    on_trial: Callable[[Trial], None] | None = None,
) -> Study:
    """Evaluates recipes of `space` until the study holds `trials` evaluated ones, earlier runs' included.

    `score(recipe)` returns a finite value for every objective of `directions` ("maximize" or "minimize" by name). The first
    trials are the space's parents and their uniform average, then the `seeds` (known recipes by label). A recipe is evaluated
    once: what the sampler repeats is told with the scores it had and is not counted, and so are the scores that are known
    `already` (by the recipe's digest). A recipe that fails (see `FAILURES`) is stored with its error, counts, and is not
    tried again; if all of the first ones fail, nothing will work, and the last error is raised.

    Every trial is stored in `storage` as it ends. The same call again resumes: after Ctrl-C (which returns what there is) or a
    killed process, the recipe that was interrupted is evaluated once more and no other. `fingerprint` (JSON values by name)
    says what the scores depend on besides the space and the directions; a study with another one is not resumed.

    Raises `RecipeError` for arguments that make no sense and for a stored study with other settings.
    """
    found = checked(space, directions, trials=trials, sampler=sampler, seeds=seeds)
    settings = {"directions": directions, "space": space.description, "fingerprint": fingerprint or {}}
    parents = [recipe.digest for recipe in space.parents().values()]
    with alone(storage):
        study = Study.open(storage, study_name, settings, parents)
        existing = len(study.optuna.get_trials(deepcopy=False))
        for label, recipe in found.items():
            study.enqueue(recipe, space.params(recipe), label)
        study.optuna.sampler = sampler_of(sampler, seed=seed, trials=trials, existing=existing)
        run = _Run(study, score, space, already or {}, on_trial, least=len(found))
        try:
            run.until(trials, progress)
        except KeyboardInterrupt:
            study.requeue()
            log.warning("Interrupted after %d of %d evaluations. The same call resumes.", study.evaluated, trials)
    return study


def checked(
    space: Space,
    directions: Mapping[str, str],
    *,
    trials: int,
    sampler: str | BaseSampler = "nsga2",
    seeds: Mapping[str, Recipe] | None = None,
) -> dict[str, Recipe]:
    """The recipes that a search with these arguments would try first, by label. Raises `RecipeError` as `search` would."""
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
    return found


@dataclass
class _Run:
    study: Study
    score: Callable[[Recipe], Scores]
    space: Space
    already: Mapping[str, Scores]
    on_trial: Callable[[Trial], None] | None
    least: int

    def until(self, trials: int, progress: bool) -> None:
        seen = {t.recipe.digest: t for t in self.study.trials}
        evaluated, in_a_row = self.study.evaluated, 0
        with Progress(trials, evaluated, self.study.directions, shown=progress) as bar:
            while evaluated < trials and in_a_row < PATIENCE:
                asked = self.study.optuna.ask(self.space.distributions)
                recipe = self.study.start(asked, self.space.recipe(asked.params))
                before = seen.get(recipe.digest)
                if before is not None:
                    in_a_row += 1
                    self.study.finish(asked, scores=before.scores, error=before.error or "", repeat_of=before)
                    continue
                in_a_row = 0
                known = recipe.digest in self.already
                trial = self._known(asked, recipe) if known else self._tried(asked, recipe, seen)
                seen[recipe.digest] = trial
                self.study.fix_reference()
                evaluated += not known
                bar.show(list(seen.values()), self.study.reference, advance=not known)
                if self.on_trial is not None:
                    self.on_trial(trial)
        if evaluated < trials:
            log.warning(
                "Stopped after %d of %d evaluations: %d trials in a row brought no new recipe.", evaluated, trials, PATIENCE
            )

    def _known(self, asked: optuna.Trial, recipe: Recipe) -> Trial:
        return self.study.finish(asked, scores=_finite(self.already[recipe.digest], self.study.directions), known=True)

    def _tried(self, asked: optuna.Trial, recipe: Recipe, seen: Mapping[str, Trial]) -> Trial:
        start = time.perf_counter()
        try:
            scores = _finite(self.score(recipe), self.study.directions)
        except FAILURES as error:
            seconds = time.perf_counter() - start
            message = f"{type(error).__name__}: {error}"
            trial = self.study.finish(asked, error=message, seconds=seconds)
            log.warning("Trial %d failed: %s (%s)", trial.number, message, recipe)
            if len(seen) + 1 >= self.least and not any(t.scores for t in seen.values()):
                error.add_note(f"None of the first {len(seen) + 1} recipes of the search could be scored.")
                raise
            return trial
        return self.study.finish(asked, scores=scores, seconds=time.perf_counter() - start)


def _finite(scores: Scores, directions: Mapping[str, str]) -> Scores:
    missing = [name for name in directions if name not in scores]
    if missing:
        raise EvaluationError(f"No score for {', '.join(missing)}; got {', '.join(scores) or 'none'}.")
    for name in directions:
        if not math.isfinite(scores[name].value):
            raise EvaluationError(f"The score of {name!r} is {scores[name].value}.")
    return scores
