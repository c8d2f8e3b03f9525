"""What a merge method is: a pure function, its name and title, and what its signature says."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import PerModel

BLOCK = 1 << 18
"""Elements of a block. Part of the definition of a merge: random streams and sums are per block of this size."""

RESERVED = frozenset({"rng", "measured", "start", "shape", "draws"})
"""Arguments that the executor provides; every other keyword-only argument is a hyperparameter."""

WHOLE_MODEL = "whole_model"
"""A hyperparameter of methods that measure: true makes `measure` fold over all tensors of the model as if they were one."""


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter: its default, and whether each model may have its own."""

    default: Any
    per_model: bool


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merge method.

    `merge(stack, *, …)` takes one block of the stacked deltas (`space="delta"`) or weights (`space="weight"`) of the models,
    `(models, b)` float32, and returns `(b,)`. `measure(blocks, n, *, …)`, if there is one, first folds over all blocks of the
    tensor; `merge` gets its result as `measured`. `models` is the least and greatest number of models; `ordered`
    says that their order matters. `space="any"` works on deltas if the recipe has a base, else on weights.

    `measures_if` says with which arguments there is anything to measure; else `measured` is None. `free` names hyperparameters
    that need not lie in [0, 1], as those of their name do elsewhere.

    What is a weighted sum of all models has `coefficients(models, *, …)` in place of `merge`: it takes their number and returns
    one factor for each, or None where `merge` has to do it after all (with those of the arguments that it asks for).

    `block` says what a block is: `"elements"`, `BLOCK` of them; `"rows"`, as many whole rows (the last axis) as fit into
    `BLOCK`, and at least one; `"tensor"`, the whole of it. `merge` and `measure` that ask for `shape` get the tensor's; a
    `measure` that asks for `draws` gets a function from a block's number to the `rng` that `merge` will have for it.
    """

    name: str
    title: str
    paper: str
    merge: Callable[..., Tensor] | None = None
    coefficients: Callable[..., Sequence[float] | None] | None = None
    space: Literal["delta", "weight", "any"] = "delta"
    measure: Callable[..., Any] | None = None
    measures_if: Callable[[Mapping[str, Any]], bool] = lambda arguments: True
    models: tuple[int, int | None] = (1, None)
    ordered: bool = False
    block: Literal["elements", "rows", "tensor"] = "elements"
    free: frozenset[str] = frozenset()

    @property
    def function(self) -> Callable[..., Any]:
        """What its signature and its docstring are read from."""
        function = self.coefficients or self.merge
        assert function is not None
        return function

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The hyperparameters by their name in a recipe (`weight`, `density`, …), read from the signature."""
        found = {
            "weight" if name == "weights" else name: Parameter(p.default, p.annotation == PerModel)
            for name, p in self._signature.items()
            if p.kind is p.KEYWORD_ONLY and name not in RESERVED
        }
        return found | ({"scaling": Parameter(1.0, False)} if self.space != "weight" else {})

    @property
    def random(self) -> bool:
        """Whether the result depends on the seed and on the models' names."""
        return "rng" in self._signature

    def deltas(self, base: bool) -> bool:
        """Whether it works on differences from the base, in a recipe with or without a `base`."""
        return self.space == "delta" or (self.space == "any" and base)

    def measures(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a tensor has to be seen as a whole before it can be merged with these arguments."""
        return self.measure is not None and self.measures_if(
            {k: p.default for k, p in self.parameters.items()} | dict(arguments)
        )

    def block_size(self, shape: tuple[int, ...]) -> int:
        """Elements of a block of a tensor of `shape`."""
        if self.block == "tensor":
            return max(1, math.prod(shape))
        if self.block == "rows":
            row = row_length(shape)
            return max(1, BLOCK // row) * row
        return BLOCK

    @cached_property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return _parameters(self.function)

    @cached_property
    def _takes(self) -> frozenset[str]:
        return frozenset(_parameters(self.merge)) if self.merge else frozenset()

    @cached_property
    def _measure_takes(self) -> frozenset[str]:
        return frozenset(_parameters(self.measure)) if self.measure else frozenset()

    def measured(
        self,
        blocks: Callable[[], Iterable[Tensor]],
        n: int,
        arguments: Mapping[str, Any],
        *,
        shape: tuple[int, ...] = (),
        draws: Callable[[int], Draws] | None = None,
    ) -> Any:
        """The state that `measure` folds from the blocks of a tensor of `n` elements; None if there is nothing to measure."""
        if self.measure is None or not self.measures(arguments):
            return None
        provided = {**arguments, "shape": shape, "draws": draws}
        return self.measure(blocks, n, **{k: v for k, v in provided.items() if k in self._measure_takes})

    def merge_block(
        self,
        stack: Tensor,
        arguments: Mapping[str, Any],
        *,
        rng: Draws,
        measured: Any,
        start: int,
        shape: tuple[int, ...] = (),
    ) -> Tensor:
        """One block merged: `stack` `(models, b)`, whose first column is element `start` of the tensor, to `(b,)`."""
        factors = self.factors(len(stack), arguments, measured)
        if factors is not None:
            return weighted_sum(stack, factors)
        assert self.merge is not None
        provided = {"rng": rng, "measured": measured, "start": start, "shape": shape}
        given = {k: v for k, v in arguments.items() if self.coefficients is None or k in self._takes}
        return self.merge(stack, **given, **{k: v for k, v in provided.items() if k in self._takes})

    def factors(self, models: int, arguments: Mapping[str, Any], measured: Any) -> Sequence[float] | None:
        """Each model's factor, if the merge is their weighted sum."""
        if self.coefficients is None:
            return None
        provided = {**arguments, "measured": measured} if "measured" in self._signature else arguments
        return self.coefficients(models, **provided)

    def __call__(
        self, stack: Tensor, *, seed: int = 0, models: tuple[str, ...] | None = None, tensor: str = "", **arguments: Any
    ) -> Tensor:
        """The method on one whole tensor in memory: `stack` `(models, *shape)` float32 to `shape`, block by block.

        `seed`, the `models`' names and the `tensor`'s name key the random methods. `scaling` is the executor's and not applied.
        """
        shape, flat = tuple(stack.shape[1:]), stack.reshape(stack.shape[0], -1)
        names, block = models or tuple(str(k) for k in range(len(flat))), self.block_size(shape)
        starts = range(0, max(flat.shape[1], 1), block)  # an empty tensor is one empty block
        state = self.measured(
            lambda: (flat[:, s : s + block].contiguous() for s in starts),
            flat.shape[1],
            arguments,
            shape=shape,
            draws=lambda number: Draws(seed, names, tensor, number),
        )
        merged = torch.empty_like(flat[0])
        for number, s in enumerate(starts):
            rng = Draws(seed, names, tensor, number)
            merged[s : s + block] = self.merge_block(
                flat[:, s : s + block].contiguous(), arguments, rng=rng, measured=state, start=s, shape=shape
            )
        return merged.reshape(shape)


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of a row: the last axis; a vector is one row."""
    return max(1, shape[-1]) if shape else 1


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
