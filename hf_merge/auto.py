"""`auto_merge()`: the whole story on one screen, and the only place that wires everything."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.errors import RecipeError, unknown
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.merging.architecture import known_config
from hf_merge.merging.live import LiveModel, load_tokenizer
from hf_merge.merging.plan import plan
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.facts import SearchFacts
from hf_merge.publishing.push import check_writable
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.result import MergeResult, scores_path
from hf_merge.scores import Scores, load_scores, save_scores
from hf_merge.search.loop import checked, search
from hf_merge.search.samplers.names import BaseSampler
from hf_merge.search.space import Space
from hf_merge.search.storage import Storage
from hf_merge.search.study import Study
from hf_merge.search.trial import Front, Split, Trial

REPLICATES = 1000
"""Bootstrap resamples behind the intervals of held-out scores."""

RUNS = Path("hf_merge_runs")
"""Where runs are kept unless a folder is given; each has a name of its own, made from what it searches."""

Model = str | os.PathLike[str] | ModelRef


def auto_merge(
    base: Model | None,
    models: Sequence[Model | RecipeModel],
    objectives: Sequence[Objective],
    *,
    trials: int = 100,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    dtype: str | None = None,
    sampler: str | BaseSampler = "nsga2",
    storage: Storage = None,
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
        base: the common ancestor, a Hub id (`name@revision`) or a folder; None for methods that need none.
        models: the fine-tunes, likewise.
        objectives: what the merge should be good at.
        trials: distinct recipes to evaluate, those of earlier runs of the same search included.
        seed: of the sampler, of random merge methods and of the bootstrap.
        methods, ranges, dtype: what is searched; see `Space`.
        sampler: a name (`nsga2`, `nsga3`, `tpe`, `gp`, `random`) or any Optuna sampler.
        storage: an Optuna storage or URL in place of the journal in `folder`.
        folder: where the run is kept; None makes a name from what is searched, below `hf_merge_runs`.
        push_to: repository for the point that `preference` chooses; whether it can be written is checked first.
        private, consent: see `MergeResult.push_to_hub`.

    Raises `RecipeError`, `CheckpointError`, `MergeError`, `EvaluationError` or `PublishError` for anything that is wrong
    with the input, before a tensor is read.
    """
    api = hub_api(token)
    space = Space(
        base=None if base is None else ModelRef.parse(base),
        models=tuple(models),  # type: ignore[arg-type]
        ranges=ranges or {},
        dtype=dtype,
        seed=seed,
        **({"methods": tuple(methods)} if methods else {}),  # type: ignore[arg-type]
    )
    if push_to is not None:
        push_to = check_writable(push_to, api, private=private)
    space, opened = _pinned(space, api)
    primary = plan(Recipe(method="linear", models=space.models, base=space.base), opened).primary
    evaluator = Evaluator(
        objectives, tokenizer=load_tokenizer(primary), config=known_config(primary), seed=seed, device=device, progress=False
    )
    checked(space, evaluator.directions, trials=trials, sampler=sampler, seeds=_base(space))
    run = Path(folder) if folder is not None else RUNS / _name(space, evaluator)
    _claim(run, evaluator.fingerprint)
    live = LiveModel(Recipe(method="linear", models=(RecipeModel(ref=primary.ref),)), opened, device=evaluator.device)

    def score(recipe: Recipe, split: Split = "search") -> Scores:
        live.load(recipe)
        scores = evaluator.measure(live.model, split, replicates=REPLICATES if split == "held_out" else 0)
        save_scores(scores_path(run, split, recipe.digest), scores)
        return scores

    study = search(
        score,
        space,
        evaluator.directions,
        trials=trials,
        sampler=sampler,
        seed=seed,
        storage=storage if storage is not None else run / "study.log",
        fingerprint={"data": evaluator.fingerprint, "seed": seed},
        seeds=_base(space),
        progress=progress,
    )
    rescored = _rescored(study, space, run, partial(score, split="held_out"), progress)
    result = MergeResult(
        **rescored,
        objectives=tuple(evaluator.describe()),
        search=SearchFacts(
            evaluated=study.evaluated,
            failed=sum(trial.error is not None for trial in study.trials),
            sampler=sampler if isinstance(sampler, str) else type(sampler).__name__,
            seed=seed,
            seconds=sum(trial.seconds for trial in study.trials),
        ),
    )
    result.save(run)
    if push_to is not None:
        result.push_to_hub(push_to, preference=preference, private=private, consent=consent, token=token, progress=progress)
    return result


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
        if not isinstance(entry, Mapping) or "name" not in entry or "dataset" not in entry:
            raise RecipeError(f"An objective is a mapping with at least 'name' and 'dataset', got {entry!r}.")
        for key in entry:
            if key not in fields_of_objective:
                raise RecipeError(unknown(f"key of objective {entry['name']!r}", key, fields_of_objective))
        objectives.append(Objective(**entry))
    ranges = {name: tuple(bounds) for name, bounds in (study.get("ranges") or {}).items()}
    return {"base": None, **study, "objectives": objectives, "ranges": ranges}


def _pinned(space: Space, api: HfApi) -> tuple[Space, dict[ModelRef, Checkpoint]]:
    """The space with every model at the commit that it has now, and the models, opened once each."""
    refs = dict.fromkeys([*([space.base] if space.base else []), *(model.ref for model in space.models)])
    opened = {ref: Checkpoint(ref, api) for ref in refs}
    models = tuple(replace(model, ref=opened[model.ref].ref) for model in space.models)
    pinned = replace(space, base=opened[space.base].ref if space.base else None, models=models)
    return pinned, {checkpoint.ref: checkpoint for checkpoint in opened.values()}


def _name(space: Space, evaluator: Evaluator) -> str:
    """A name for a run that is the same whenever the same search is asked for."""
    content = json.dumps([space.description, evaluator.fingerprint, dict(evaluator.directions)], sort_keys=True)
    stem = space.base.name if space.base else space.models[0].name
    return f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _base(space: Space) -> dict[str, Recipe]:
    if space.base is None:
        return {}
    return {"base": Recipe(method="linear", models=(RecipeModel(ref=space.base),), dtype=space.dtype, seed=space.seed)}


def _rescored(study: Study, space: Space, run: Path, score: Callable[[Recipe], Scores], progress: bool) -> dict[str, Any]:
    """The trials, the front, the parents and what else they are compared with; all but the first with held-out scores."""
    trials = [replace(t, scores=load_scores(scores_path(run, "search", t.recipe.digest)) or t.scores) for t in study.trials]
    front = Front.of(trials, study.directions, study.reference)
    by_digest = {trial.recipe.digest: trial for trial in trials if trial.scores}

    def named(recipes: Mapping[str, Recipe]) -> list[Trial]:
        found = {label: by_digest.get(recipe.digest) for label, recipe in recipes.items()}
        return [replace(trial, label=label) for label, trial in found.items() if trial]

    parents = named(space.parents())
    others = named({k: v for k, v in {**space.seeds(), **_base(space)}.items() if k not in space.parents()})
    wanted = {trial.recipe.digest: trial.recipe for trial in (*front, *parents, *others)}
    held_out = {}
    for digest, recipe in tqdm(wanted.items(), desc="Re-scoring on held-out data", unit="model", disable=not progress):
        held_out[digest] = load_scores(scores_path(run, "held_out", digest)) or score(recipe)

    def measured(trials: Iterable[Trial]) -> tuple[Trial, ...]:
        return tuple(replace(trial, held_out=held_out.get(trial.recipe.digest, {})) for trial in trials)

    return {
        "front": replace(front, trials=measured(front)),
        "trials": measured(trials),
        "parents": measured(parents),
        "others": measured(others),
    }


def _claim(run: Path, fingerprint: str) -> None:
    """Make the run's folder, or see that it is of the same data: scores kept there would be taken for this run's."""
    mark = run / "data"
    run.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and mark.read_text() != fingerprint:
        raise RecipeError(f"{run} keeps a run on other data or metrics. Give another folder.")
    mark.write_text(fingerprint)
