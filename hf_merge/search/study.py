"""A search as it is stored: its trials, its reference point, and how a trial begins and ends."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from hf_merge.errors import HfMergeError, RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.yaml import from_dict, to_dict
from hf_merge.scores import MAXIMIZE, Score, Scores, partial
from hf_merge.search.claims import Claim, Standing, claim, has_outcome, holders, queued_again, standing
from hf_merge.search.constraints import BEST_PARENT, Bound, bounds
from hf_merge.search.leads import LEADS, leads
from hf_merge.search.storage import Storage, backend, journal, quiet, shown
from hf_merge.search.trial import Front, Trial, reference_point

DEATHS = 3
"""Processes that may die of a recipe before it is stored as failed: one that is too large must not end every worker."""

SILENCE = 120.0
"""Seconds without a sign of life after which a worker is taken for dead."""


class Study:
    """A stored search. `optuna` is the Optuna study behind it, for Optuna's own plots and tables.

    One `Trial` stands for each recipe that was tried. Optuna's study has more: repeats of a recipe, told with the scores that
    it already had (user attribute `repeat_of`), trials that were interrupted or whose worker died, queued again as another
    trial (which says so: `again`), and trials that one worker began while another took the last of the budget (`released`). How
    several workers share a study is told in `claims`.
    """

    def __init__(self, study: optuna.Study) -> None:
        attrs = study.user_attrs
        if "settings" not in attrs:
            raise RecipeError(f"The study {study.study_name!r} was not made by hf_merge. Give another study_name.")
        self.optuna = study
        self.settings = attrs["settings"]
        self._parents: list[str] = attrs["parents"]
        self._anchors: dict[str, str] = attrs.get("first", {})
        self.silence: float = attrs.get("silence", SILENCE)
        constraints = dict(self.settings.get("constraints", []))
        self.bounds: dict[str, Bound] = bounds(constraints, self.directions, self._anchors)
        self._known: dict[int, Trial] = {}
        self.made = False
        """Whether this process made it."""

    @classmethod
    def load(cls, storage: Storage, study_name: str = "hf_merge") -> "Study":
        """The study in a storage, also while a search is running in it. Raises `HfMergeError` if there is none."""
        path = journal(storage)
        with quiet():
            try:
                if path is not None and not path.exists():  # Optuna would make an empty one
                    raise KeyError(study_name)
                return cls(optuna.load_study(study_name=study_name, storage=backend(storage), sampler=RandomSampler()))
            except KeyError as error:
                raise HfMergeError(f"There is no study {study_name!r} in {shown(storage)}.") from error

    @property
    def directions(self) -> dict[str, str]:
        """`maximize` or `minimize` by objective."""
        return dict(self.settings["directions"])

    @property
    def trials(self) -> list[Trial]:
        """The recipes tried, in the order of their numbers: those with scores, and those that failed with their `error`."""
        stored = self._stored()
        found = [self._tried(t) for t in holders(stored).values() if t.state.is_finished()]
        return self.judged(found, found)

    def judged(self, trials: Sequence[Trial], all_trials: Sequence[Trial] | None = None) -> list[Trial]:
        """`trials`, of this study or of another stage of the same search, with the constraints that they break."""
        if not self.bounds:
            return list(trials)
        limits = self._limits(self.trials if all_trials is None else all_trials)
        return [replace(t, violations={k: v for k, v in self._violations(t.scores, limits).items() if v > 0}) for t in trials]

    def _tried(self, ended: FrozenTrial) -> Trial:
        if ended.number not in self._known:
            self._known[ended.number] = _trial(ended)
        return self._known[ended.number]

    def _limits(self, trials: Sequence[Trial]) -> dict[str, float | None]:
        """By constrained objective the score of its anchor: None as long as there is none, NaN if there never will be."""
        by_digest = {t.recipe.digest: t for t in trials}
        found: dict[str, float | None] = {}
        for name, bound in self.bounds.items():
            wanted = self._parents if bound.anchor == BEST_PARENT else [self._anchors.get(bound.anchor or "", "")]
            tried = [by_digest[digest] for digest in wanted if digest in by_digest]
            values = [t.scores[name].value for t in tried if t.scores]
            best = (max if self.directions[name] == MAXIMIZE else min)(values, default=math.nan)
            found[name] = best if len(tried) == len(wanted) else None
        return found

    def _violations(self, scores: Scores, limits: Mapping[str, float | None]) -> dict[str, float]:
        """How far each constraint is broken, 0 where its anchor has no score yet; nothing for a trial that failed."""
        if not scores:
            return {}
        return {name: bound.violation(scores[name].value, limits[name]) for name, bound in self.bounds.items()}

    @property
    def evaluated(self) -> int:
        """How many recipes were evaluated, failures included; repeats, and scores known beforehand, cost nothing."""
        return self.standing().evaluated

    def standing(self, stored: list[FrozenTrial] | None = None) -> Standing:
        """Where the study stands, by the trials that Optuna has (or had, if they are given)."""
        return standing(self._stored() if stored is None else stored)

    @property
    def repeats(self) -> int:
        """How many trials only repeated a recipe."""
        return sum("repeat_of" in t.user_attrs for t in self._stored())

    @property
    def front(self) -> Front:
        """The trials that no other dominates."""
        return Front.of(self.trials, self.directions, self.reference)

    @property
    def reference(self) -> dict[str, float]:
        """The hypervolume's reference point: in each objective the parents' worst score, less a tenth of their range.

        Fixed and stored by the search once all parents have been tried; before that, what the trials so far make it. If no
        parent could be scored, the other trials stand in for them.
        """
        stored = self.optuna.user_attrs.get("reference")
        if stored is not None:
            return dict(stored)
        scored = [t for t in self.trials if t.scores]
        parents = [t for t in scored if t.recipe.digest in self._parents]
        return reference_point([t.scores for t in parents or scored], self.directions)

    def fix_reference(self) -> None:
        """Stores the reference point if it is not there yet and all parents have been tried."""
        if "reference" in self.optuna.user_attrs:
            return
        scored = {t.recipe.digest: bool(t.scores) for t in self.trials}
        if any(scored.values()) and set(self._parents) <= scored.keys():
            self.optuna.set_user_attr("reference", self.reference)

    def requeue(self, numbers: Iterable[int] | None = None, *, died: bool = True) -> None:
        """Ends trials (all that are running, or those with `numbers`) which no process runs any more: told if they have their
        outcome, else queued to run again. The recipe is queued before its trial is ended, so a kill in between loses nothing,
        and only once, whoever sees it first. A recipe of which `DEATHS` processes have `died` is not run again."""
        stored = self._stored()
        queued = queued_again(stored)
        for trial in stored:
            if trial.state != TrialState.RUNNING or (numbers is not None and trial.number not in numbers):
                continue
            attrs = trial.user_attrs
            if "digest" in attrs and not has_outcome(trial) and trial.number not in queued:
                kept = {k: v for k, v in attrs.items() if k in ("digest", "recipe", "label", "known")}
                kept |= {"again": trial.number, "deaths": attrs.get("deaths", 0) + died}
                self.optuna.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params, user_attrs=kept)
            self._tell(trial.number, attrs)

    def start(self, asked: optuna.Trial, recipe: Recipe, *, known: Container[str] = (), worker: str = "") -> Recipe:
        """Declares what a trial is about to run, and returns it: the recipe it was queued with, or else `recipe`. A recipe
        whose digest is `known` does not count."""
        queued = asked.user_attrs.get("recipe")
        if queued is not None:
            recipe = from_dict(queued)
        if worker:
            asked.set_user_attr("worker", worker)
            asked.set_user_attr("beat", 0)
        if recipe.digest in known:
            asked.set_user_attr("known", True)
        if queued is None:
            asked.set_user_attr("recipe", to_dict(recipe))
            asked.set_user_attr("digest", recipe.digest)  # last: it stands for the others
        return recipe

    def claim(self, asked: optuna.Trial, trials: int) -> Claim:
        """Whether a started trial may be evaluated in a budget of `trials`."""
        return claim(self._stored(), asked.number, trials)

    def ended(self, number: int) -> Trial | None:
        """The trial with this number, if it has ended."""
        stored = self._stored()[number]
        return self._tried(stored) if stored.state.is_finished() else None

    def finish(
        self,
        asked: optuna.Trial,
        *,
        scores: Scores | None = None,
        error: str = "",
        seconds: float = 0.0,
        repeat_of: int | None = None,
    ) -> Trial | None:
        """Stores how a trial ended. All that says so is there before the last attribute is, so a kill at any point leaves
        either a trial to run again or one that has its outcome. None if it had been taken from this worker before that."""
        marks = {"seconds": seconds} | ({} if repeat_of is None else {"repeat_of": repeat_of})
        if scores and partial(scores):
            marks["stopped"] = True
        outcome = {"scores": _to_json(scores)} if scores else {"error": error}
        try:
            if scores and self.bounds:
                for name, violation in self._violations(scores, self._limits(self.trials)).items():
                    asked.set_constraint(name, violation if math.isfinite(violation) else 1.0)
            if scores and any(kept := leads(scores[name] for name in self.directions)):
                asked.storage.set_trial_system_attr(asked._trial_id, LEADS, kept)
            for name, value in (marks | outcome).items():
                asked.set_user_attr(name, value)
        except UpdateFinishedTrialError:
            pass
        self._tell(asked.number, asked.user_attrs)
        stored = self._stored()[asked.number]
        return _trial(stored) if has_outcome(stored) else None

    def drop(self, asked: optuna.Trial, *, repeat_of: int | None = None) -> None:
        """Ends a trial without an outcome: another one is evaluating its recipe, or the budget is spent."""
        with suppress(UpdateFinishedTrialError):
            asked.set_user_attr(*(("released", True) if repeat_of is None else ("repeat_of", repeat_of)))
        self._tell(asked.number, {})

    def _tell(self, number: int, attrs: Mapping[str, Any]) -> None:
        values = [attrs["scores"][name]["value"] for name in self.directions] if "scores" in attrs else None
        try:
            self.optuna.tell(number, values, state=None if values else TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # ended already, by this worker or by another that took it for dead
            if not self._stored()[number].state.is_finished():
                raise

    def _stored(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def __repr__(self) -> str:
        failed = sum(t.error is not None for t in self.trials)
        counts = f"{self.evaluated} recipes evaluated, {failed} failed, {len(self.front)} on the front"
        return f"Study {self.optuna.study_name!r}: {counts}"


def _trial(stored: FrozenTrial) -> Trial:
    attrs = stored.user_attrs
    return Trial(
        number=stored.number,
        recipe=from_dict(attrs["recipe"]),
        scores={
            name: Score(value=s["value"], examples=s["examples"], seconds=s["seconds"])
            for name, s in attrs.get("scores", {}).items()
        },
        error=attrs.get("error"),
        label=attrs.get("label", ""),
        seconds=attrs["seconds"],
        stopped=attrs.get("stopped", False),
    )


def _to_json(scores: Scores) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": float(s.value), "examples": int(s.examples), "seconds": float(s.seconds)}
        | ({"interval": list(s.interval)} if s.interval else {})
        for name, s in scores.items()
    }
