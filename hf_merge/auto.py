"""`auto_merge()`: the whole story on one screen, and the only place that wires everything."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.errors import RecipeError, unknown
from hf_merge.evaluation.objective import Objective
from hf_merge.hierarchical import Architecture, check_architecture, search_architecture
from hf_merge.publishing.facts import SearchFacts
from hf_merge.publishing.push import check_writable
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.result import MergeResult
from hf_merge.scores import load_scores
from hf_merge.scoring import scores_path
from hf_merge.search.importance import importances
from hf_merge.search.samplers.names import BaseSampler
from hf_merge.search.storage import Storage
from hf_merge.search.study import Study
from hf_merge.search.trial import Front, Trial
from hf_merge.wiring import Model, Searched, base_of, searched


def auto_merge(
    base: Model | None,
    models: Sequence[Model | RecipeModel],
    objectives: Sequence[Objective],
    *,
    trials: int = 100,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    layer_groups: int = 1,
    module_groups: Mapping[str, str | Sequence[str]] | None = None,
    dtype: str | None = None,
    sampler: str | BaseSampler = "nsga2",
    racing: bool = False,
    constraints: Mapping[str, str] | None = None,
    strategy: Literal["parameters", "hierarchical"] = "parameters",
    preferences: int = 16,
    paths: int | None = None,
    merges: int = 1,
    storage: Storage = None,
    study_name: str = "hf_merge",
    folder: Path | str | None = None,
    push_to: str | None = None,
    preference: Mapping[str, float] | Literal["knee"] = "knee",
    private: bool | None = None,
    consent: bool = False,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> MergeResult:
    """Search the merges of `models`, fine-tunes of `base`, for the Pareto front of `objectives`, and re-score it on
    held-out data.

    Candidates are merged in place into one model in memory and measured on each objective's search rows; `trials` counts
    the distinct recipes that are evaluated, the parents, the base and the uniform average among them. Everything is kept in
    `folder` as it happens: the same call again, after Ctrl-C or a crash, goes on where it was.

    Args:
        base: the common ancestor, a Hub id (`name@revision`) or a folder; None for methods that need none (then `linear`).
        models: the fine-tunes, likewise.
        objectives: what the merge should be good at.
        trials: distinct recipes to evaluate, those of earlier runs of the same search included.
        seed: of the sampler, of random merge methods and of the bootstrap.
        methods, ranges, layer_groups, module_groups, dtype: what is searched; see `Space`.
        sampler: a name (`nsga2`, `nsga3`, `map`, `mmmo`, `gp`, `tpe`, `cmaes`, `qmc`, `random`) or any Optuna sampler.
        racing: measure a candidate only while it promises more than a new one for as many rows; see `hf_merge.search.racing`.
        constraints: how far an objective may fall, such as `{"spam": ">= base - 0.01"}`; see `search`.
        strategy: "parameters" searches merges of whole models; "hierarchical" goes on from the best of them to paths through
            the layers of all models and of that merge (HM3, arXiv:2409.18893). Models of different depths have no merge, and
            the base no part: paths go through the models' own layers.
        preferences: how many trade-offs the search among paths is trained on: each objective alone, all alike, random ones.
        paths: distinct paths to score; as many as `trials` unless given.
        merges: how many merges' layers the paths may take, each path those of one: the knee of the front's, then those that are
            best for the most preferences. Each is a whole model more in memory.
        storage: a database's URL or an Optuna storage in place of the journal in `folder`; other processes may then `join`.
        study_name: the study's name there.
        folder: where the run is kept; None makes a name from what is searched, below `hf_merge_runs`.
        push_to: repository for the point that `preference` chooses; whether it can be written is checked first.
        private, consent: see `MergeResult.push_to_hub`.

    Raises `RecipeError`, `CheckpointError`, `MergeError`, `EvaluationError` or `PublishError` for anything that is wrong
    with the input, before a tensor is read.
    """
    if push_to is not None:
        push_to = check_writable(push_to, hub_api(token), private=private)
    if strategy not in ("parameters", "hierarchical"):
        raise RecipeError(unknown("strategy", strategy, ("parameters", "hierarchical")))
    paths = trials if paths is None else paths
    if strategy == "hierarchical":
        check_architecture(objectives, preferences=preferences, paths=paths, merges=merges)
    found = searched(
        base,
        models,
        objectives,
        trials=trials,
        seed=seed,
        methods=methods,
        ranges=ranges,
        layer_groups=layer_groups,
        module_groups=module_groups,
        dtype=dtype,
        sampler=sampler,
        racing=racing,
        constraints=constraints,
        storage=storage,
        study_name=study_name,
        folder=folder,
        device=device,
        token=token,
        progress=progress,
        for_paths=strategy == "hierarchical",
    )
    architecture = None
    if strategy == "hierarchical":
        architecture = search_architecture(
            found, preferences=preferences, paths=paths, merges=merges, seed=seed, progress=progress
        )
    result = MergeResult(
        **_rescored(found, architecture, progress),
        objectives=tuple(found.evaluator.describe()),
        search=_facts(found.study, architecture, sampler, seed, constraints or {}),
        online=None if architecture is None else architecture.refine,
    )
    result.save(found.run)
    if push_to is not None:
        result.push_to_hub(push_to, preference=preference, private=private, consent=consent, token=token, progress=progress)
    return result


def join(
    study: Mapping[str, Any],
    storage: Storage,
    study_name: str = "hf_merge",
    *,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Study:
    """Work on a study together with other processes, on this machine or others, until its `trials` are evaluated.

    `study` is what a study file holds, the same for all workers. The study `study_name` in `storage` is made if it is not
    there. `auto_merge` with the same arguments and storage works on it as well, and re-scores the front at the end. See
    `search` for which storages are safe, and what happens to a worker that leaves or dies. Raises as `auto_merge` does.
    """
    arguments = study_arguments({key: value for key, value in study.items() if key not in _AFTER_SEARCH})
    here = {"storage": storage, "study_name": study_name, "token": token, "progress": progress}
    return searched(**arguments | here | ({} if device is None else {"device": device}), shared=True).study


_AFTER_SEARCH = ("push_to", "preference", "private", "consent", "strategy", "preferences", "paths")
"""Keys of a study file that are not for a worker."""


def study_arguments(study: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `auto_merge` from a study file's mapping. Raises `RecipeError` for a key that it does not have."""
    known = inspect.signature(auto_merge).parameters.keys() - {"token", "progress"}
    fields_of_objective = {field.name for field in fields(Objective)}
    for key in study:
        if key not in known:
            raise RecipeError(unknown("key in a study", key, known))
    for key in ("models", "objectives"):
        if not isinstance(study.get(key), list):
            raise RecipeError(f"A study needs {key!r}, a list.")
    objectives = []
    for entry in study["objectives"]:
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise RecipeError(f"An objective is a mapping with at least a 'name', got {entry!r}.")
        for key in entry:
            if key not in fields_of_objective:
                raise RecipeError(unknown(f"key of objective {entry['name']!r}", key, fields_of_objective))
        objectives.append(Objective(**entry))
    ranges = {name: tuple(bounds) for name, bounds in (study.get("ranges") or {}).items()}
    return {"base": None, **study, "objectives": objectives, "ranges": ranges}


def _facts(
    study: Study, architecture: Architecture | None, sampler: str | BaseSampler, seed: int, constraints: Mapping[str, str]
) -> SearchFacts:
    paths = architecture.trials if architecture else []
    trials = [*study.trials, *paths]
    return SearchFacts(
        evaluated=study.evaluated + len(paths),
        failed=sum(trial.error is not None for trial in trials),
        sampler=sampler if isinstance(sampler, str) else type(sampler).__name__,
        seed=seed,
        seconds=sum(trial.seconds for trial in trials),
        paths=len(paths),
        constraints=constraints,
        importances=importances(study),
    )


def _rescored(found: Searched, architecture: Architecture | None, progress: bool) -> dict[str, Any]:
    """The trials, the front, the parents and what else they are compared with; all but the first with held-out scores. Where
    paths were searched, the front of the merges alone has them too."""
    study, space, run = found.study, found.space, found.run
    merges = [replace(t, scores=load_scores(scores_path(run, "search", t.recipe.digest)) or t.scores) for t in study.trials]
    trials = merges + (architecture.trials if architecture else [])
    front = Front.of(trials, study.directions, study.reference)
    alone = Front.of(merges, study.directions, study.reference)
    by_digest = {trial.recipe.digest: trial for trial in trials if trial.scores}

    def named(recipes: Mapping[str, Recipe]) -> list[Trial]:
        tried = {label: by_digest.get(recipe.digest) for label, recipe in recipes.items()}
        return [replace(trial, label=label) for label, trial in tried.items() if trial]

    parents = named(space.parents())
    others = named({k: v for k, v in {**space.seeds(), **base_of(space)}.items() if k not in space.parents()})
    wanted = {trial.recipe.digest: trial.recipe for trial in (*front, *alone, *parents, *others)}
    score = architecture.score if architecture else found.score
    held_out = {}
    for digest, recipe in tqdm(wanted.items(), desc="Re-scoring on held-out data", unit="model", disable=not progress):
        held_out[digest] = load_scores(scores_path(run, "held_out", digest)) or score(recipe, "held_out")

    def measured(trials: Iterable[Trial]) -> tuple[Trial, ...]:
        return tuple(replace(trial, held_out=held_out.get(trial.recipe.digest, {})) for trial in trials)

    return {
        "front": replace(front, trials=measured(front)),
        "trials": measured(trials),
        "parents": measured(parents),
        "others": measured(others),
    }
