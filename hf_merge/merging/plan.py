"""From a recipe and the indices of its models to a plan: what is read, merged and written, before a tensor is touched."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.writer import Shard, TensorSpec, plan_shards
from hf_merge.merging.align import Alignment, align
from hf_merge.methods import METHODS
from hf_merge.methods.method import BLOCK, Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe

PIECE = 16 * BLOCK
"""Elements of a large tensor that are read and merged at once, where the method does not have to measure the whole first."""

Opened = Mapping[ModelRef, Checkpoint]
Inputs = tuple[Checkpoint, ...]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result: what it will be, and its `sources` as (position in `MergePlan.inputs`, name there).

    The first source is the base for a delta method; a tensor that is not merged (an integer buffer) has one source.
    """

    name: str
    spec: TensorSpec
    sources: tuple[tuple[int, str], ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def merged(self) -> bool:
        """Whether there is anything to merge; else the tensor is carried over."""
        return self.spec.dtype.is_floating_point

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.pieces[-1][1]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A recipe made concrete: `recipe` pinned to commits, the models that are read, jobs by tensor and output shards."""

    recipe: Recipe
    inputs: tuple[Checkpoint, ...]
    primary: Checkpoint
    jobs: Mapping[str, TensorJob]
    shards: tuple[Shard, ...]

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.recipe.method]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that the merge reads."""
        return sum(self.inputs[i].index.tensors[name].nbytes for job in self.jobs.values() for i, name in job.sources)

    @property
    def bytes_written(self) -> int:
        """Bytes of the shards that the merge writes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(job.elements for job in self.jobs.values() if job.merged)

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


def open_inputs(recipe: Recipe, api: HfApi | None = None) -> dict[ModelRef, Checkpoint]:
    """The checkpoints of a recipe's models, each opened (and pinned) once."""
    return {ref: Checkpoint(ref, api) for ref in recipe.inputs}


def plan(
    recipe: Recipe, opened: Opened, *, max_shard_size: int | str = "5GB", align: Callable[[Inputs], Alignment] = align
) -> MergePlan:
    """Compile a recipe. Raises `CheckpointError` and `MergeError` for all that headers can tell; reads no tensor."""
    method = METHODS[recipe.method]
    read = [recipe.base] if recipe.base and method.space == "delta" else []
    read += [model.ref for model in recipe.models]
    inputs = tuple(opened[ref] for ref in dict.fromkeys([recipe.primary, *read]))
    order = [inputs.index(opened[ref]) for ref in read]
    primary, dtype = opened[recipe.primary], getattr(torch, recipe.dtype) if recipe.dtype else None
    jobs = {}
    for name, names in align(inputs).tensors.items():
        entry = primary.index.tensors[name]
        floating = entry.dtype.is_floating_point
        spec = TensorSpec(entry.shape, dtype if dtype and floating else entry.dtype)
        sources = tuple((i, names[i]) for i in order) if floating else ((0, name),)
        whole = method.measure is not None and floating
        jobs[name] = TensorJob(name, spec, sources, tuple(_pieces(entry.elements, entry.elements if whole else PIECE)))
    shards = tuple(plan_shards({name: job.spec for name, job in jobs.items()}, max_shard_size))
    pinned = recipe.pinned({ref: checkpoint.commit for ref, checkpoint in opened.items()})
    return MergePlan(recipe=pinned, inputs=inputs, primary=primary, jobs=jobs, shards=shards)


def _pieces(elements: int, size: int) -> Iterator[tuple[int, int]]:
    if elements == 0:
        yield 0, 0
    for start in range(0, elements, max(size, 1)):
        yield start, min(start + size, elements)
