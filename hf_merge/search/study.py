"""A search as it is stored: its trials, its reference point, and what it takes to resume it."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from hf_merge.errors import HfMergeError, RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.yaml import from_dict, to_dict
from hf_merge.scores import MAXIMIZE, Score, Scores
from hf_merge.search.storage import Storage, backend, journal
from hf_merge.search.trial import Front, Trial, to_points
from hf_merge.version import __version__

MARGIN = 0.1
"""How far beyond the worst parent the reference point lies, as a part of the parents' range."""


class Study:
    """A stored search. `optuna` is the Optuna study behind it, for Optuna's own plots and tables.

    One `Trial` stands for each recipe that was tried. Optuna's study has more: repeats of a recipe, told with the scores that
    it already had (user attribute `repeat_of`), and trials that were interrupted and queued again.
    """

    def __init__(self, study: optuna.Study) -> None:
        if "settings" not in study.user_attrs:
            raise RecipeError(f"The study {study.study_name!r} was not made by hf_merge. Give another study_name.")
        self.optuna = study

    @classmethod
    def load(cls, storage: Storage, study_name: str = "hf_merge") -> "Study":
        """The study in a storage, also while a search is running in it. Raises `HfMergeError` if there is none."""
        path = journal(storage)
        with _quiet():
            try:
                if path is not None and not path.exists():  # Optuna would make an empty one
                    raise KeyError(study_name)
                return cls(optuna.load_study(study_name=study_name, storage=backend(storage), sampler=RandomSampler()))
            except KeyError as error:
                raise HfMergeError(f"There is no study {study_name!r} in {storage}.") from error

    @classmethod
    def open(cls, storage: Storage, study_name: str, settings: Mapping[str, Mapping[str, Any]], parents: list[str]) -> "Study":
        """The study to continue; a new one if there is none, or if nothing was ever scored in it.

        `settings` (sections of JSON values, one of them "directions") must equal the stored ones, else `RecipeError` says what
        differs. `parents` are the digests of the recipes that fix the reference point. Only one process may have a study open.
        """
        store = backend(storage)
        with _quiet():
            if study_name in optuna.get_all_study_names(store):
                found = optuna.load_study(study_name=study_name, storage=store, sampler=RandomSampler())
                trials = found.get_trials(deepcopy=False)
                if any("settings" not in found.user_attrs or "scores" in t.user_attrs for t in trials):
                    study = cls(found)
                    study._check(settings, storage)
                    study.requeue()
                    return study
                optuna.delete_study(study_name=study_name, storage=store)
            directions = settings["directions"]
            made = optuna.create_study(study_name=study_name, storage=store, directions=list(directions.values()))
            made.set_metric_names(list(directions))
            made.set_user_attr("hf_merge", __version__)
            made.set_user_attr("parents", parents)
            made.set_user_attr("settings", {section: list(values.items()) for section, values in settings.items()})
            return cls(made)

    def _check(self, settings: Mapping[str, Mapping[str, Any]], storage: Storage) -> None:
        stored, wrong = self.optuna.user_attrs["settings"], []
        for section in sorted(stored.keys() | settings.keys()):
            before = dict(stored.get(section, []))
            now = json.loads(json.dumps(dict(settings.get(section, {}))))
            names = [n for n in before | now if before.get(n) != now.get(n)]
            wrong += [f"  {section}, {name}: was {before.get(name)!r}, is {now.get(name)!r}" for name in names]
        if wrong:
            where = "" if storage is None else f" in {storage}"
            raise RecipeError(
                f"The study {self.optuna.study_name!r}{where} was started with other settings:\n" + "\n".join(wrong) + "\n"
                "Search with those to resume it, or give another study_name or storage to start anew."
            )

    @property
    def directions(self) -> dict[str, str]:
        """`maximize` or `minimize` by objective."""
        return dict(self.optuna.user_attrs["settings"]["directions"])

    @property
    def trials(self) -> list[Trial]:
        """The recipes tried, in the order of their numbers: those with scores, and those that failed with their `error`."""
        return [_trial(t) for t in self._first_tries()]

    @property
    def evaluated(self) -> int:
        """How many recipes were evaluated, failures included; repeats, and scores known beforehand, cost nothing."""
        return sum("known" not in t.user_attrs for t in self._first_tries())

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
        parents = [t for t in scored if t.recipe.digest in self.optuna.user_attrs["parents"]]
        return _beyond(parents or scored, self.directions)

    def fix_reference(self) -> None:
        """Stores the reference point if it is not there yet and all parents have been tried."""
        attrs = self.optuna.user_attrs
        if "reference" in attrs:
            return
        scored = {t.user_attrs["digest"]: "scores" in t.user_attrs for t in self._first_tries()}
        if any(scored.values()) and set(attrs["parents"]) <= scored.keys():
            self.optuna.set_user_attr("reference", self.reference)

    def enqueue(self, recipe: Recipe, params: dict[str, Any], label: str) -> None:
        """Puts `recipe`, whose nearest point of the space is `params`, next in the queue, unless the study has it already."""
        if all(t.user_attrs.get("digest") != recipe.digest for t in self._stored()):
            attrs = {"digest": recipe.digest, "recipe": to_dict(recipe), "label": label}
            self.optuna.enqueue_trial(params, user_attrs=attrs)

    def requeue(self) -> None:
        """Ends what is running in no process any more: told if it had been scored, else queued to run again."""
        for trial in self._stored():
            if trial.state != TrialState.RUNNING:
                continue
            if not _is_scored(trial):  # queued before it is ended: a kill in between repeats it and does not lose it
                kept = {k: v for k, v in trial.user_attrs.items() if k in ("digest", "recipe", "label")}
                self.optuna.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params, user_attrs=kept)
            self._tell(trial.number, trial.user_attrs)

    def start(self, asked: optuna.Trial, recipe: Recipe) -> Recipe:
        """Notes what a trial is about to run, and returns it: the recipe it was queued with, or else `recipe`."""
        queued = asked.user_attrs.get("recipe")
        if queued is not None:
            return from_dict(queued)
        asked.set_user_attr("digest", recipe.digest)
        asked.set_user_attr("recipe", to_dict(recipe))
        return recipe

    def finish(
        self,
        asked: optuna.Trial,
        *,
        scores: Scores | None = None,
        error: str = "",
        seconds: float = 0.0,
        known: bool = False,
        repeat_of: Trial | None = None,
    ) -> Trial:
        """Stores how a trial ended. All that says so is there before the last attribute is, so a kill at any point leaves
        either a trial to run again or one that has its outcome."""
        marks = {"seconds": seconds} | ({"known": True} if known else {})
        marks |= {"repeat_of": repeat_of.number} if repeat_of else {}
        outcome = {"scores": _to_json(scores)} if scores else {"error": error}
        for name, value in (marks | outcome).items():
            asked.set_user_attr(name, value)
        self._tell(asked.number, asked.user_attrs)
        return _trial(self.optuna.get_trials(deepcopy=False)[asked.number])

    def _tell(self, number: int, attrs: Mapping[str, Any]) -> None:
        values = [attrs["scores"][name]["value"] for name in self.directions] if "scores" in attrs else None
        self.optuna.tell(number, values, state=None if values else TrialState.FAIL)

    def _stored(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def _first_tries(self) -> Iterator[FrozenTrial]:
        for trial in self._stored():
            if trial.state.is_finished() and _is_scored(trial) and "repeat_of" not in trial.user_attrs:
                yield trial

    def __repr__(self) -> str:
        failed = sum(t.error is not None for t in self.trials)
        counts = f"{self.evaluated} recipes evaluated, {failed} failed, {len(self.front)} on the front"
        return f"Study {self.optuna.study_name!r}: {counts}"


def _is_scored(stored: FrozenTrial) -> bool:
    """Whether it has its outcome, which a trial that was cut off has not."""
    return "scores" in stored.user_attrs or "error" in stored.user_attrs


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
    )


def _to_json(scores: Scores) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": float(s.value), "examples": int(s.examples), "seconds": float(s.seconds)}
        | ({"interval": list(s.interval)} if s.interval else {})
        for name, s in scores.items()
    }


def _beyond(trials: Sequence[Trial], directions: Mapping[str, str]) -> dict[str, float]:
    if not trials:
        return dict.fromkeys(directions, 0.0)
    points = to_points(trials, directions)
    found = {}
    for column, (name, direction) in zip(points.T, directions.items(), strict=True):
        worst = float(column.min())
        span = float(column.max()) - worst or abs(worst) or 1.0
        found[name] = (1 if direction == MAXIMIZE else -1) * (worst - MARGIN * span)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna without its greetings: a new study's INFO line, and the warning that names of objectives are experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
