"""HM3's second step (arXiv:2409.18893): paths through the layers of the models and of their best merge."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike

from hf_merge.errors import RecipeError, unknown
from hf_merge.evaluation.objective import Objective
from hf_merge.merging.apart import Apart
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.prefixes import Prefixes
from hf_merge.recipes.path import MERGED, Path, path_of
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Scores, load_scores, partial
from hf_merge.scoring import Scorer, scores_path
from hf_merge.search.layers.paths import PathSearch, refine, search_paths
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.rewards import Floats, drawn, normalizer, scalarize
from hf_merge.search.layers.stored import save_nets
from hf_merge.search.loop import FAILURES
from hf_merge.search.progress import Progress
from hf_merge.search.study import Study
from hf_merge.search.trial import Front, Split, Trial, to_points
from hf_merge.wiring import Searched, base_of

log = logging.getLogger(__name__)

EPISODES = 20
"""Episodes for each path that may be scored: most repeat a path, which costs nothing."""

UNFIT = ("latency", "delta_norm")
"""Metrics that have no honest value here: shared layers are not run again, and a path has other layers than the base."""


@dataclass(eq=False, kw_only=True)
class PathScorer:
    """Scores paths as `merges` scores all other recipes, raced or not; what the run's folder keeps is not measured again."""

    model: PathModel
    merges: Scorer

    def __call__(self, recipe: Recipe, split: Split = "search") -> Scores:
        """The recipe's scores. Raises `RecipeError` for layers of another merge than the pool's."""
        if scores := load_scores(scores_path(self.merges.run, split, recipe.digest)):
            return scores
        if recipe.layers is None:
            return self.merges(recipe, split)
        return self.merges.measured(self.model.take(self.path_of(recipe)), recipe, split)

    def path_of(self, recipe: Recipe) -> Path:
        """The path whose recipe this is. Its layers alone do not say which merge of the pool they are of."""
        for merge in self.model.recipes or (MERGED,):
            path = path_of(recipe.layers, merge) if recipe.layers is not None else ()
            if path and self.model.recipe_of(path).digest == recipe.digest:
                return path
        raise RecipeError("The recipe's layers are of other models, or of another merge, than those of this search's paths.")


@dataclass(eq=False, kw_only=True)
class Architecture:
    """The search among paths: `trials` has one for each path that was scored, numbered from `first` on. The paths that are the
    models and the merge as they are have trials of the first step: they are `known`."""

    study: Study
    score: PathScorer
    pool: Pool
    normalized: Callable[[ArrayLike], Floats]
    known: Mapping[Path, Trial]
    first: int
    seed: int
    trials: list[Trial] = field(default_factory=list)
    found: PathSearch | None = None

    def train(self, preferences: Floats, paths: int, *, progress: bool) -> None:
        """Train policy and critic over `preferences` `(N, K)` until so many `paths` are scored. Ctrl-C ends it early.

        The same call again asks for the same paths, and those that were scored are known: it goes on where it was killed.
        """
        merges = self.study.trials
        with Progress(paths, 0, self.study.directions, shown=progress, desc="Paths", unit="path") as bar:
            scored = count(1)

            def shown(path: Path, values: Floats) -> None:
                bar.show([*merges, *self.trials], self.study.reference, evaluated=next(scored))

            try:
                self.found = search_paths(
                    self.values,
                    self.pool,
                    preferences,
                    episodes=EPISODES * paths,
                    evaluations=paths,
                    seed=self.seed,
                    on_path=shown,
                )
                save_nets(self.score.merges.run / "paths", self.found.nets)
            except KeyboardInterrupt:
                log.warning("Interrupted after %d of %d paths. The same call resumes.", len(self.trials), paths)

    def values(self, path: Path) -> Floats:
        """A path's objectives `(K,)`, normalized by base and specialists and all maximized; NaN if it cannot be scored."""
        if path in self.known:
            return self.normalized(to_points([self.known[path]], self.study.directions)[0])
        recipe, started, error = self.score.model.recipe_of(path), time.monotonic(), None
        scores: Scores = {}
        try:
            scores = self.score(recipe)
        except FAILURES as failure:
            error = f"{type(failure).__name__}: {failure}"
        seconds = time.monotonic() - started
        number = self.first + len(self.trials)
        trial = Trial(number=number, recipe=recipe, scores=scores, error=error, seconds=seconds, stopped=partial(scores))
        self.trials += self.study.judged([trial])
        if error is not None:
            return np.full(len(self.study.directions), np.nan)
        return self.normalized(to_points([trial], self.study.directions)[0])

    def refine(self, preference: Mapping[str, float], paths: int) -> Trial:
        """The best path for a `preference` (weights by objective), after so many more `paths` were scored for it: HM3's online
        phase. Its trial has scores on both splits. Raises `RecipeError` for unknown objectives and without a search."""
        for name in preference:
            if name not in self.study.directions:
                raise RecipeError(unknown("objective", name, self.study.directions))
        if self.found is None:
            raise RecipeError("The search among paths was interrupted. Call auto_merge again to finish it.")
        wanted = [preference.get(name, 0.0) for name in self.study.directions]
        known = self.found.ledger.values
        refined = refine(
            self.found.nets, self.values, wanted, episodes=EPISODES * paths, evaluations=paths, seed=self.seed, known=known
        )
        path = refined.best(wanted)
        if (trial := self.known.get(path)) is None:
            digest = self.score.model.recipe_of(path).digest
            trial = next(t for t in self.trials if t.recipe.digest == digest)
        return replace(trial, held_out=self.score(trial.recipe, "held_out"))


def search_architecture(
    found: Searched, *, preferences: int, paths: int, merges: int, seed: int, progress: bool
) -> Architecture:
    """Search paths through the layers of a finished search's models and of its best merges. Raises as `architecture` does."""
    wanted = drawn(len(found.study.directions), preferences, np.random.default_rng(seed))
    made = architecture(found, seed=seed, merges=merges, preferences=wanted)
    made.train(wanted, paths, progress=progress)
    return made


def architecture(
    found: Searched, *, seed: int, share: bool = True, merges: int = 1, preferences: Floats | None = None
) -> Architecture:
    """What it takes to search paths through the layers of a finished search's models and of its best merges: its front's knee
    and, of more than one, those that are best for the most of the `preferences` `(N, K)`.

    A merge serves all preferences, and with few of them paths are scored for many preferences at once. Models of different
    depths have no merge; the paths go through their own layers. With `share` what a path has run on a batch is not run again
    by paths that begin alike. Raises `RecipeError` if no merge of all models could be scored, and `MergeError` for layers that
    cannot stand in one model.
    """
    study, space = found.study, found.space
    by_digest = {t.recipe.digest: t for t in study.trials if t.scores}
    models = {r.models[0].name: by_digest[r.digest] for r in space.parents().values() if r.digest in by_digest}
    specialists = to_points(list(models.values()), study.directions)
    bases = [by_digest[r.digest] for r in base_of(space).values() if r.digest in by_digest]
    start = to_points(bases, study.directions)[0] if bases else specialists.min(0)
    normalized = normalizer(start, specialists)
    if isinstance(found.score.live, Apart):
        model = found.score.live.pool
    else:
        pooled = _pooled(found, normalized, merges, preferences)
        recipes, prefixes = [trial.recipe for trial in pooled], Prefixes() if share else None
        model = PathModel(recipes[0], found.opened, device=found.evaluator.device, prefixes=prefixes, merges=recipes[1:])
        models |= zip(model.recipes, pooled, strict=True)
    return Architecture(
        study=study,
        score=PathScorer(model=model, merges=found.score),
        pool=Pool.of(model.depths, model.statistics(), alternatives=tuple(model.recipes) if len(model.recipes) > 1 else ()),
        normalized=normalized,
        known={model.identity(name): trial for name, trial in models.items() if name in model.depths},
        first=1 + max(t.number for t in study.trials),
        seed=seed,
    )


def _pooled(found: Searched, normalized: Callable[[ArrayLike], Floats], merges: int, preferences: Floats | None) -> list[Trial]:
    """The merges of the pool, at most so many: the front's knee, then whichever are best for the most preferences."""
    study = found.study
    whole = [t for t in study.trials if t.scores and not t.stopped and len(t.recipe.models) == len(found.space.models)]
    front = Front.of(whole, study.directions, study.reference)
    if not front:
        raise RecipeError("No merge of all models could be scored, so there is none whose layers a path could take.")
    knee, rows = front.choose(), np.zeros((0, len(study.directions))) if preferences is None else preferences
    points = normalized(to_points(list(front), study.directions))
    best = Counter(int(place) for place in scalarize(points, rows[:, None]).argmax(1))
    others = [front.trials[place] for place, _ in best.most_common()]
    return [knee, *(trial for trial in others if trial is not knee)][:merges]


def check_architecture(objectives: Sequence[Objective], *, preferences: int, paths: int, merges: int) -> None:
    """Raises `RecipeError` for what no search among paths can do, before anything is read."""
    if unfit := [o.name for o in objectives if o.metric in UNFIT]:
        raise RecipeError(f"Paths have no honest {' or '.join(UNFIT)}: leave out {', '.join(unfit)}, or the strategy.")
    if min(preferences, paths, merges) < 1:
        given = f"{preferences}, {paths} and {merges}"
        raise RecipeError(f"A search among paths needs a preference, a path and a merge of its pool at least; got {given}.")
