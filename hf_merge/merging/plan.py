"""From a recipe and the indices of its models to a plan: what is read, merged and written, before a tensor is touched."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.source import Source
from hf_merge.checkpoints.tensors import tensors
from hf_merge.checkpoints.writer import Shard, TensorSpec, plan_shards
from hf_merge.errors import MergeError
from hf_merge.merging.align import Alignment, align
from hf_merge.merging.targets import Target, aligned_targets, composed_targets
from hf_merge.methods import METHODS
from hf_merge.methods.method import WHOLE_MODEL, Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe

BLOCKS = 16
"""Blocks of a large tensor that are merged as one piece of work, where the method does not have to measure the whole first."""

Opened = Mapping[ModelRef, Checkpoint]
Inputs = tuple[Checkpoint, ...]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result: what it will be, what it is made of, and with which method and numbers.

    `base` is there for what is merged as differences from it. Without a `method` the only source is carried over. `offset` is
    the number of elements that are merged before it, in the plan's order.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Source, ...]
    base: Source | None = None
    method: Method | None = None
    models: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    offset: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.spec.shape)

    @property
    def inputs(self) -> tuple[Source, ...]:
        """All that is read: the base first, then the sources."""
        return self.sources if self.base is None else (self.base, *self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(source.nbytes for source in self.inputs)

    @cached_property
    def block(self) -> int:
        """Elements of a block."""
        return self.method.block_size(self.spec.shape) if self.method else METHODS["linear"].block_size(self.spec.shape)

    @property
    def measures(self) -> bool:
        """Whether all of it has to be seen before any of it can be merged."""
        return self.method is not None and self.method.measure is not None and not self.whole_model

    @property
    def whole_model(self) -> bool:
        """Whether what is measured is the whole model."""
        return bool(self.arguments.get(WHOLE_MODEL))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of elements [start, stop) that can be merged by themselves; an empty tensor is one empty piece."""
        step = BLOCKS * self.block if self.method is None or self.method.block == "elements" else self.block
        for start in range(0, max(self.elements, 1), step):
            yield start, min(start + step, self.elements)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A recipe made concrete: `recipe` pinned to commits, the models that are read, jobs by tensor and output shards.

    `config` is the result's config.json.
    """

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    primary: Checkpoint
    jobs: Mapping[str, TensorJob]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.recipe.method]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that the merge reads."""
        return sum(job.nbytes for job in self.jobs.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of the shards that the merge writes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(job.elements for job in self.jobs.values() if job.spec.dtype.is_floating_point)

    @property
    def dtype(self) -> torch.dtype | None:
        """The recipe's dtype for the result; None keeps each tensor's."""
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else None

    def to_dict(self) -> dict[str, Any]:
        """The plan's figures, for machines."""
        return {
            "recipe": str(self.recipe),
            "models": [str(c.ref) for c in self.inputs],
            "tensors": len(self.jobs),
            "parameters": self.parameters,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "shards": [shard.name for shard in self.shards],
        }

    def __str__(self) -> str:
        models = "\n".join(f"  {c.label}: {len(c.index.tensors)} tensors, {c.index.nbytes / 1e6:,.1f} MB" for c in self.inputs)
        return (
            f"{self.recipe}\n{models}\n"
            f"Result: {len(self.jobs)} tensors, {self.parameters:,} parameters, {self.bytes_written / 1e6:,.1f} MB "
            f"in {len(self.shards)} shard{'s' if len(self.shards) > 1 else ''}; reads {self.bytes_read / 1e6:,.1f} MB."
        )


def open_inputs(recipe: Recipe, api: HfApi | None = None, *, pickles: bool = False) -> dict[ModelRef, Checkpoint]:
    """The checkpoints of a recipe's models, each opened (and pinned) once. `pickles` allows those that are only pickles."""
    return {ref: Checkpoint(ref, api, pickles=pickles) for ref in recipe.inputs}


def plan(
    recipe: Recipe,
    opened: Opened,
    *,
    max_shard_size: int | str = "5GB",
    align: Callable[[Inputs, str], Alignment] = align,
) -> MergePlan:
    """Compile a recipe. Raises `CheckpointError` and `MergeError` for all that headers can tell; reads no tensor."""
    read = [recipe.primary] + ([recipe.base] if recipe.base and recipe.deltas else []) + [m.ref for m in recipe.models]
    inputs = tuple(opened[ref] for ref in dict.fromkeys(read))
    models = {model.name: inputs.index(opened[model.ref]) for model in recipe.models}
    base = inputs.index(opened[recipe.base]) if recipe.base and recipe.deltas else None
    primary = opened[recipe.primary]
    if recipe.layers is None:
        targets, config = tuple(aligned_targets(align(inputs, recipe.private), models, base)), primary.config
    else:
        composition = composed_targets(recipe.layers, inputs, models, base)
        targets, config = composition.targets, composition.config
    jobs = _jobs(recipe, targets, inputs)
    shards = tuple(plan_shards({name: job.spec for name, job in jobs.items()}, max_shard_size))
    pinned = recipe.pinned({ref: checkpoint.commit for ref, checkpoint in opened.items()})
    return MergePlan(recipe=pinned, inputs=inputs, primary=primary, jobs=jobs, shards=shards, config=config)


def _jobs(recipe: Recipe, targets: tuple[Target, ...], inputs: Inputs) -> dict[str, TensorJob]:
    method, dtype = METHODS[recipe.method], getattr(torch, recipe.dtype) if recipe.dtype else None
    shared = recipe.arguments() if recipe.constant else None
    if shared is None and recipe.arguments().get(WHOLE_MODEL):
        raise MergeError(f"{WHOLE_MODEL} measures all tensors as one, so it cannot be had with numbers that differ by tensor.")
    jobs, offset, views = {}, 0, [tensors(checkpoint) for checkpoint in inputs]
    for target in targets:
        lender = target.base or target.sources[0]
        like = views[0].get(target.name) if recipe.layers is None else None
        like = like or views[lender[0]][lender[1]]
        floating = like.dtype.is_floating_point
        spec = TensorSpec(like.shape, dtype if dtype and floating else like.dtype)
        if not target.models or not floating:
            i, name = target.sources[0] if recipe.layers or not target.models else (0, target.name)
            jobs[target.name] = TensorJob(target.name, spec, (views[i][name],))
            continue
        names = tuple(name for _, name in target.sources)
        jobs[target.name] = TensorJob(
            target.name,
            spec,
            tuple(views[i][name] for i, name in target.sources),
            views[target.base[0]][target.base[1]] if target.base else None,
            method,
            target.models,
            shared or recipe.arguments(target.name, target.depth, target.part, names),
            offset,
        )
        offset += prod(like.shape)
    return jobs
