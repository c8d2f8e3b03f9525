"""Opening a study: made, resumed, or joined by another worker, on terms that all agree on."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.samplers import RandomSampler

from hf_merge.errors import RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.yaml import to_dict
from hf_merge.search.storage import Storage, backend, quiet, shown
from hf_merge.search.study import Study
from hf_merge.search.worker import code
from hf_merge.version import __version__

CREATION = 20.0
"""Seconds that the worker which makes a study may take to fill it in, before another does."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all workers of a study agree on.

    `settings`: sections of JSON values, one of them "directions". `parents`: the digests of the recipes that fix the reference
    point. `first`: the recipes to try first, and their points in the space, by label. `silence`: the seconds after which a
    worker without a sign of life is taken for dead.
    """

    settings: Mapping[str, Mapping[str, Any]]
    parents: list[str]
    first: Mapping[str, tuple[Recipe, dict[str, Any]]]
    silence: float


def opened(storage: Storage, study_name: str, terms: Terms, *, shared: bool = False) -> Study:
    """The study to continue, a new one if there is none, with the terms' first recipes in its queue.

    The terms' settings must equal the stored ones, else `RecipeError` says what differs. Only one process may have a study open
    unless all say that it is `shared`. If it is not, what was running is queued again, and a study in which nothing
    was ever scored is made anew; if it is, `RecipeError` is raised where other code of hf_merge made the study.
    """
    store = backend(storage)
    with quiet():
        if study_name in optuna.get_all_study_names(store):
            found = optuna.load_study(study_name=study_name, storage=store, sampler=RandomSampler())
            if shared or _holds_something(found):
                return _joined(found, storage, terms, shared=shared)
            optuna.delete_study(study_name=study_name, storage=store)
        directions = list(terms.settings["directions"].values())
        try:
            made = optuna.create_study(study_name=study_name, storage=store, directions=directions, sampler=RandomSampler())
        except DuplicatedStudyError:  # another worker was faster
            made = optuna.load_study(study_name=study_name, storage=store, sampler=RandomSampler())
            return _joined(made, storage, terms, shared=shared)
        return _filled(made, terms)


def _filled(study: optuna.Study, terms: Terms) -> Study:
    study.set_user_attr("hf_merge", __version__)
    study.set_metric_names(list(terms.settings["directions"]))
    study.set_user_attr("code", code())
    study.set_user_attr("silence", terms.silence)
    study.set_user_attr("parents", terms.parents)
    study.set_user_attr("first", {label: recipe.digest for label, (recipe, _) in terms.first.items()})
    _enqueue(study, terms.first)
    # Last, for other workers wait for it.
    study.set_user_attr("settings", {section: list(values.items()) for section, values in terms.settings.items() if values})
    made = Study(study)
    made.made = True
    return made


def _joined(found: optuna.Study, storage: Storage, terms: Terms, *, shared: bool) -> Study:
    until = time.monotonic() + CREATION
    while shared and _unfinished(found):
        if time.monotonic() > until:
            return _filled(found, terms)
        time.sleep(0.2)
    study = Study(found)
    _check(study, terms.settings, storage)
    if shared:
        _check_code(found, storage)
    else:
        study.requeue()
    _enqueue(found, terms.first)
    return study


def _enqueue(study: optuna.Study, first: Mapping[str, tuple[Recipe, dict[str, Any]]]) -> None:
    """Puts recipes, each with its nearest point of the space, next in the queue, but those that the study has already."""
    there = {t.user_attrs.get("digest") for t in study.get_trials(deepcopy=False)}
    for label, (recipe, params) in first.items():
        if recipe.digest not in there:
            study.enqueue_trial(params, user_attrs={"digest": recipe.digest, "recipe": to_dict(recipe), "label": label})


def _holds_something(study: optuna.Study) -> bool:
    """Whether making it anew would lose a score, or something of another program's."""
    ours = "hf_merge" in study.user_attrs
    return any(not ours or "scores" in t.user_attrs for t in study.get_trials(deepcopy=False))


def _unfinished(study: optuna.Study) -> bool:
    """Whether a worker has made it and not filled it in yet."""
    attrs = study.user_attrs
    return "settings" not in attrs and ("hf_merge" in attrs or not (attrs or study.get_trials(deepcopy=False)))


def _check_code(study: optuna.Study, storage: Storage) -> None:
    theirs, ours = study.user_attrs.get("code", study.user_attrs.get("hf_merge")), code()
    if theirs != ours:
        raise RecipeError(
            f"The study {study.study_name!r} in {shown(storage)} is searched with hf_merge {theirs}, and this is {ours}. All "
            "workers of a study run the same code: install the same here, or give another study_name."
        )


def _check(study: Study, settings: Mapping[str, Mapping[str, Any]], storage: Storage) -> None:
    stored, wrong = study.settings, []
    for section in sorted(stored.keys() | settings.keys()):
        before = dict(stored.get(section, []))
        now = json.loads(json.dumps(dict(settings.get(section, {}))))
        names = [n for n in before | now if before.get(n) != now.get(n)]
        wrong += [f"  {section}, {name}: was {before.get(name)!r}, is {now.get(name)!r}" for name in names]
    if wrong:
        where = "" if storage is None else f" in {shown(storage)}"
        raise RecipeError(
            f"The study {study.optuna.study_name!r}{where} was started with other settings:\n" + "\n".join(wrong) + "\n"
            "Search with those to resume it, or give another study_name or storage to start anew."
        )
