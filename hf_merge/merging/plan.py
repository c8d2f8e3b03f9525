"""From a recipe and the indices of its models to a plan: what is read, merged and written, before a tensor is touched."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_merge.checkpoints.adapters import is_adapter
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.source import Source
from hf_merge.checkpoints.tensors import tensors
from hf_merge.checkpoints.writer import Shard, TensorSpec, plan_shards
from hf_merge.errors import MergeError
from hf_merge.merging.align import Alignment, align
from hf_merge.merging.bodies import adapter_of, bodies_of, by_token, heads_of_adapters
from hf_merge.merging.folding import UNCHANGED, Gain, gains_of
from hf_merge.merging.targets import Target, aligned_targets, composed_targets
from hf_merge.merging.vocabulary import VocabularyPlan, align_vocabularies
from hf_merge.methods import METHODS
from hf_merge.methods.method import WHOLE_MODEL, Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.shown import as_printed

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Threads that merge on a CPU."""
IN_FLIGHT = 64 * 2**20
"""Bytes of source tensors from the network that are in memory at once; a piece that is larger by itself is read alone."""
HELD = 2**30
"""Bytes of one tensor's sources up to which what has to be seen twice is kept and not fetched twice."""
NETWORK, DISK = 50e6, 1e9
"""Bytes a second that an estimate expects of them."""
_COSTS = {"elements": 2e-9, "measured": 8e-9, "rows": 3e-8, "tensor": 5e-7}
"""Seconds for an element of a model, by what the method works on (measured on one core)."""
_COPIES = 4
_ADDED, _ONCE = METHODS["task_arithmetic"], {"weights": [1.0]}
"""How a difference is added to its base as it is."""
BLOCKS = 16
"""Blocks of a large tensor that are merged as one piece of work, where the method does not have to measure the whole first."""

Opened = Mapping[ModelRef, Checkpoint]
Inputs = tuple[Checkpoint, ...]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result: what it will be, what it is made of, and with which method and numbers.

    `base` is there for what is merged as differences from it. Without a `method` the only source is carried over. `offset` is
    the number of elements that are merged before it, in the plan's order. Random numbers are keyed by `key`, the tensor's name
    in the models, so that a layer is merged alike wherever it goes. In the end comes the `gain`.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Source, ...]
    base: Source | None = None
    method: Method | None = None
    models: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    offset: int = 0
    key: str = ""
    gain: Gain = UNCHANGED

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
        return self.method is not None and self.method.measures(self.arguments) and not self.whole_model

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

    `config` is the result's config.json, `vocabulary` its tokens if they are not the primary's, `licenses` what the models
    declare, by id, if that was asked.
    """

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    adapters: tuple[Checkpoint, ...] = ()
    primary: Checkpoint
    jobs: Mapping[str, TensorJob]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: VocabularyPlan | None = None
    licenses: Mapping[str, Any] = field(default_factory=dict)
    _repr_pretty_ = as_printed

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

    @property
    def memory(self) -> int:
        """Bytes of tensors that a merge holds at once, about: blocks and their copies, and what is read ahead from the Hub.

        A method that needs whole tensors holds the largest one of every source.
        """
        blocks = max((len(job.inputs) + _COPIES) * min(job.block, job.elements) * 4 for job in self.jobs.values())
        far = max(sum(s.nbytes for s in job.inputs if not s.near) for job in self.jobs.values())
        measures = any(job.measures for job in self.jobs.values())
        return THREADS * blocks + min(far if measures else IN_FLIGHT, HELD if measures else far) + (IN_FLIGHT if far else 0)

    @property
    def seconds(self) -> float:
        """How long the merge takes, roughly: what the network and the disk give, or what a core computes if that is longer."""
        far = sum(s.nbytes for job in self.jobs.values() for s in job.inputs if not s.near)
        moved = far / NETWORK + (self.bytes_read - far + self.bytes_written) / DISK
        kind = self.method.block if self.method.measure is None or self.method.block != "elements" else "measured"
        work = sum(job.elements * len(job.sources) for job in self.jobs.values() if job.method)
        return max(moved, work * _COSTS[kind] / THREADS)

    def to_dict(self) -> dict[str, Any]:
        """The plan's figures, for machines."""
        return {
            "recipe": str(self.recipe),
            "models": [str(c.ref) for c in (*self.inputs, *self.adapters)],
            "tensors": len(self.jobs),
            "parameters": self.parameters,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "shards": [shard.name for shard in self.shards],
            "memory": self.memory,
            "seconds": round(self.seconds, 1),
            "licenses": dict(self.licenses),
        }

    def __str__(self) -> str:
        lines = [str(self.recipe)]
        for checkpoint in (*self.inputs, *self.adapters):
            license = f", license: {self.licenses[checkpoint.ref.id] or 'not declared'}" if self.licenses else ""
            size = f"{len(checkpoint.index.tensors)} tensors, {checkpoint.index.nbytes / 1e6:,.1f} MB"
            lines.append(f"  {checkpoint.label}: {size}{license}")
        carried = sum(job.method is None for job in self.jobs.values())
        shards = f"{len(self.shards)} shard{'s' if len(self.shards) > 1 else ''}"
        lines.append(
            f"Result: {len(self.jobs)} tensors{f' ({carried} carried over)' if carried else ''}, "
            f"{self.parameters:,} parameters, {self.bytes_written / 1e6:,.1f} MB in {shards}; "
            f"reads {self.bytes_read / 1e6:,.1f} MB."
        )
        cost = f"About {self.seconds:,.0f} s and {self.memory / 1e6:,.0f} MB of memory for tensors on this machine."
        return "\n".join([*lines, *([str(self.vocabulary)] if self.vocabulary else []), cost])


def open_inputs(recipe: Recipe, api: HfApi | None = None, *, pickles: bool = False) -> dict[ModelRef, Checkpoint]:
    """The checkpoints of a recipe's models, each opened (and pinned) once. `pickles` allows those that are only pickles."""
    opened = {ref: Checkpoint(ref, api, pickles=pickles) for ref in recipe.inputs}
    for checkpoint in opened.values():
        if is_adapter(checkpoint.files):
            adapter_of(checkpoint)  # from here on the checkpoint's tensors are those of the adapter's file
    return opened


def plan(
    recipe: Recipe,
    opened: Opened,
    *,
    max_shard_size: int | str = "5GB",
    align: Callable[[Inputs, str, tuple[str, ...] | None], Alignment] = align,
) -> MergePlan:
    """Compile a recipe. Raises `CheckpointError` and `MergeError` for all that headers can tell; reads no tensor."""
    bodies = bodies_of(recipe, opened)
    anchor = opened[recipe.base] if recipe.base and recipe.deltas else None
    read = [opened[recipe.primary], *([anchor] if anchor else []), *(body.checkpoint for body in bodies.values())]
    inputs = tuple(dict.fromkeys(read))
    models = {name: inputs.index(body.checkpoint) for name, body in bodies.items()}
    base = inputs.index(anchor) if anchor else None
    pinned = recipe.pinned({ref: checkpoint.commit for ref, checkpoint in opened.items()})
    asked = pinned.tokenizer
    vocabulary = align_vocabularies(asked, inputs, opened[recipe.base] if recipe.base else None) if asked else None
    if recipe.layers is None:
        by_token = vocabulary.tensors if vocabulary and asked and asked.source is not None else None
        targets = tuple(aligned_targets(align(inputs, recipe.private, by_token), models, base))
        config: Mapping[str, Any] = inputs[0].config
        gains: dict[str, Gain] = {}
    else:
        composition = composed_targets(recipe.layers, inputs, models, base)
        targets, config = composition.targets, composition.config
        gains = gains_of(composition, inputs[0]) if composition.scales else {}
    views = {name: body.sources(anchor, recipe.private != "refuse") for name, body in bodies.items()}
    stored = [dict(tensors(checkpoint)) for checkpoint in inputs]
    if recipe.private == "owner" and recipe.layers is None:
        targets += tuple(heads_of_adapters(targets, views, models, stored))
    jobs = _jobs(recipe, targets, stored, views, vocabulary)
    jobs |= {name: replace(jobs[name], gain=gain) for name, gain in gains.items()}
    return MergePlan(
        recipe=pinned,
        inputs=inputs,
        adapters=tuple(dict.fromkeys(body.adapter for body in bodies.values() if body.adapter)),
        primary=inputs[0],
        jobs=jobs,
        shards=tuple(plan_shards({name: job.spec for name, job in jobs.items()}, max_shard_size)),
        config=vocabulary.configured(config) if vocabulary else config,
        vocabulary=vocabulary,
    )


def _jobs(
    recipe: Recipe,
    targets: tuple[Target, ...],
    stored: Sequence[Mapping[str, Source]],
    views: Mapping[str, Mapping[str, Source]],
    vocabulary: VocabularyPlan | None,
) -> dict[str, TensorJob]:
    method, dtype = METHODS[recipe.method], getattr(torch, recipe.dtype) if recipe.dtype else None
    shared = recipe.arguments() if recipe.constant else None
    if shared is None and recipe.arguments().get(WHOLE_MODEL):
        raise MergeError(f"{WHOLE_MODEL} measures all tensors as one, so it cannot be had with numbers that differ by tensor.")
    jobs, offset = {}, 0
    for target in targets:
        first, name = target.base or target.sources[0]
        sources = [views[model][at] for model, (_, at) in zip(target.models, target.sources, strict=bool(target.models))]
        base = stored[target.base[0]][target.base[1]] if target.base else None
        like = stored[0].get(target.name, stored[first][name]) if recipe.layers is None else stored[first][name]
        if vocabulary and target.name in vocabulary.tensors:
            sources, base, like = by_token(target, sources, base, like, vocabulary, stored)
        floating = like.dtype.is_floating_point
        spec = TensorSpec(like.shape, dtype if dtype and floating else like.dtype)
        if not target.models or not floating:
            i, at = target.sources[0]
            if target.copied and floating and (view := views[target.copied][at]).delta:  # of an adapter
                jobs[target.name] = TensorJob(target.name, spec, (view,), stored[i][at], _ADDED, (target.copied,), _ONCE)
                continue
            carried = like if recipe.layers is None and target.models else views.get(target.copied, stored[i])[at]
            jobs[target.name] = TensorJob(target.name, spec, (carried,))
            continue
        if wrong := [source for source in sources if source.shape != like.shape]:
            shapes = f"{list(wrong[0].shape)}, and {target.name!r} of the result has {list(like.shape)}"
            raise MergeError(f"{wrong[0].label} has shape {shapes}.")
        jobs[target.name] = TensorJob(
            target.name,
            spec,
            tuple(sources),
            base,
            method,
            target.models,
            shared or recipe.arguments(target.name, target.depth, target.part, [at for _, at in target.sources]),
            offset,
            target.name if recipe.layers is None else name,
        )
        offset += prod(like.shape)
    return jobs
