"""A search, wired: models opened, data read, a live model and a scorer, all checked before a tensor is read."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi

from hf_merge.checkpoints.adapters import is_adapter
from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.errors import RecipeError
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.runners.embeddings import stated_pooling
from hf_merge.evaluation.runners.images import load_image_processor
from hf_merge.merging.apart import Apart
from hf_merge.merging.architecture import known_config
from hf_merge.merging.live import LiveModel, load_tokenizer
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.plan import Opened, plan
from hf_merge.merging.pool import depth_of
from hf_merge.merging.prefixes import Prefixes
from hf_merge.merging.tokenizer import has_tokenizer
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scoring import Live, Scorer
from hf_merge.search.loop import checked, search
from hf_merge.search.racing import WORTH
from hf_merge.search.samplers.names import BaseSampler
from hf_merge.search.space import Space
from hf_merge.search.storage import Storage
from hf_merge.search.study import Study

log = logging.getLogger(__name__)

RUNS = Path("hf_merge_runs")
"""Where runs are kept unless a folder is given; each has a name of its own, made from what it searches."""

WITHOUT_BASE = ("linear",)
"""The methods that are searched where there is no base, unless others are named."""

Model = str | os.PathLike[str] | ModelRef


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A search that is done, and what it takes to measure more of its recipes."""

    study: Study
    space: Space
    evaluator: Evaluator
    run: Path
    score: Scorer
    opened: Opened


@dataclass(frozen=True, kw_only=True)
class ModelsApart(Space):
    """A space of models that cannot be merged, because their depths differ: each alone, and nothing else."""

    def seeds(self) -> dict[str, Recipe]:
        """The models."""
        return self.parents()


def searched(
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
    storage: Storage = None,
    study_name: str = "hf_merge",
    folder: Path | str | None = None,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    shared: bool | None = None,
    for_paths: bool = False,
) -> Searched:
    """Run the search of `auto_merge`, which says what the arguments are and what is raised.

    If it is `for_paths`, models may differ in depth: then they are tried as they are, without the base, and nothing else is.
    """
    api = hub_api(token)
    methods = methods or (WITHOUT_BASE if base is None else None)
    space = Space(
        base=None if base is None else ModelRef.parse(base),
        models=tuple(models),  # type: ignore[arg-type]
        ranges=ranges or {},
        layer_groups=layer_groups,
        module_groups=module_groups or {},
        dtype=dtype,
        seed=seed,
        **({"methods": tuple(methods)} if methods else {}),  # type: ignore[arg-type]
    )
    space, opened = _pinned(space, api)
    whole = [opened[model.ref] for model in space.models if not is_adapter(opened[model.ref].files)]
    apart = for_paths and len({depth_of(known_config(checkpoint)) for checkpoint in whole}) > 1
    if apart:
        log.warning("The models have different depths: no merge of them is tried, only paths through their layers.")
        space = ModelsApart(models=space.models, methods=WITHOUT_BASE, dtype=dtype, seed=seed)
        trials, primary = len(space.models), opened[space.models[0].ref]
    else:
        primary = plan(Recipe(method="linear", models=space.models, base=space.base), opened).primary
        _check_depth(layer_groups, primary)
    processor = load_image_processor(primary)
    evaluator = Evaluator(
        objectives,
        tokenizer=None if processor is not None and not has_tokenizer(primary) else load_tokenizer(primary),
        processor=processor,
        pooling=stated_pooling(primary.json("1_Pooling/config.json")),
        config=known_config(primary),
        seed=seed,
        device=device,
        progress=False,
    )
    origin = _measured_from(space, objectives)
    checked(space, evaluator.directions, trials=trials, sampler=sampler, seeds=base_of(space), constraints=constraints)
    run = Path(folder) if folder is not None else RUNS / _name(space, evaluator)
    _claim(run, evaluator.fingerprint)
    live: Live
    if apart:
        pool = PathModel(Recipe(method="linear", models=space.models), opened, device=evaluator.device, prefixes=Prefixes())
        live = Apart(pool)
    else:
        live = LiveModel(Recipe(method="linear", models=(RecipeModel(ref=primary.ref),)), opened, device=evaluator.device)
    score = Scorer(
        evaluator=evaluator,
        live=live,
        run=run,
        base=origin,
        racing=racing,
        parents={recipe.digest for recipe in space.parents().values()},
        whole={recipe.digest for recipe in (space.seeds() | base_of(space)).values()},
    )
    study = search(
        score,
        space,
        evaluator.directions,
        trials=trials,
        sampler=sampler,
        seed=seed,
        storage=storage if storage is not None else run / "study.log",
        study_name=study_name,
        fingerprint={"data": evaluator.fingerprint, "seed": seed} | ({"racing": WORTH} if racing else {}),
        seeds=base_of(space),
        constraints=constraints,
        shared=shared,
        progress=progress,
    )
    return Searched(study=study, space=space, evaluator=evaluator, run=run, score=score, opened=opened)


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


def _measured_from(space: Space, objectives: Sequence[Objective]) -> Recipe | None:
    """The recipe that distances are measured from, if an objective is one: the base's."""
    if not any(objective.metric == "delta_norm" for objective in objectives):
        return None
    if space.base is None:
        raise RecipeError("The objective delta_norm is the distance from the base: give a `base`.")
    return base_of(space)["base"]


def _check_depth(layer_groups: int, primary: Checkpoint) -> None:
    layers = getattr(known_config(primary).get_text_config(), "num_hidden_layers", None)
    if layers is not None and layer_groups > layers:
        raise RecipeError(f"layer_groups={layer_groups} is more than the {layers} layers of {primary.label}.")


def base_of(space: Space) -> dict[str, Recipe]:
    """The recipe of the base alone, by its label; nothing without a base."""
    if space.base is None:
        return {}
    return {"base": Recipe(method="linear", models=(RecipeModel(ref=space.base),), dtype=space.dtype, seed=space.seed)}


def _claim(run: Path, fingerprint: str) -> None:
    """Make the run's folder, or see that it is of the same data: scores kept there would be taken for this run's."""
    mark = run / "data"
    run.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        whole = mark.with_name(f"{mark.name}.{os.getpid()}")  # other workers never see half of it
        whole.write_text(fingerprint)
        whole.replace(mark)
    if mark.read_text() != fingerprint:
        raise RecipeError(f"{run} keeps a run on other data or metrics. Give another folder.")
