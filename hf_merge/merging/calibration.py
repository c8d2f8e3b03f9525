"""What a path delivers against what its layers are used to, from one batch of text: seams' maps, and how exact a fold is."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.merging.folding import EPS_BOUND, EPS_NAMES
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.seams import Kind, Seam, fitted
from hf_merge.recipes.path import Path, Step

_log = logging.getLogger(__name__)
Inputs = Mapping[str, Tensor]
Change = Callable[[int, Tensor], Tensor]
"""From a position of the path and the stream before it `(batch, tokens, d)` to the stream that its layer gets."""


def aligned(
    model: PathModel, path: Sequence[Step], inputs: Inputs, kind: Kind = "scalar", *, shrinkage: float = 0.1
) -> tuple[Path, dict[int, Seam]]:
    """The path with maps at its seams, fitted one after the other along the path: where a layer does not follow its
    predecessor, what arrives is mapped to what the layer meets in its own model.

    `inputs` is one batch of the model's keyword arguments, 64 to 256 short rows; padding is left out by `attention_mask`.
    Scalars become the steps' scales, other maps are returned by position, for `PathModel.take`. Scales that the path has are
    replaced.
    """
    steps = tuple(replace(step, scale=1.0) for step in path)
    seams = [i for i, step in enumerate(steps) if not _follows(steps[i - 1] if i else None, step)]
    real = _real(inputs)
    met = _met(model, {(steps[i].model, steps[i].layer) for i in seams}, inputs, real)
    found: dict[int, Seam] = {}

    def fit(position: int, stream: Tensor) -> Tensor:
        if position in seams:
            step = steps[position]
            found[position] = fitted(kind, stream[real], met[step.model, step.layer], shrinkage)
            return found[position](stream)
        return stream

    _run(model, steps, inputs, fit)
    if kind != "scalar":
        return steps, found
    return tuple(replace(step, scale=float(found[i].weight)) if i in found else step for i, step in enumerate(steps)), {}


def eps_bound(model: PathModel, path: Sequence[Step], inputs: Inputs) -> float:
    """The largest relative change of a layer's normed input when the path's scales are folded into weights, ½·eps·|1/c²-1|/ms.

    ms is the mean square (for a LayerNorm the variance) of a token in the folded stream before a layer, c the product of the
    scales up to it: the change comes of the norms' eps, which stays as it is. Logs a warning above `EPS_BOUND`. Models whose
    layers end in a norm (BERT) fold exactly, whatever this says.
    """
    real, products = _real(inputs), list(accumulate((step.scale for step in path), mul))
    found = [0.0]

    def look(position: int, stream: Tensor) -> Tensor:
        norm = next(m for m in model.block(path[position]).modules() if _eps(m) is not None)
        x = stream[real].double() * path[position].scale
        squares = x.var(-1, unbiased=False) if isinstance(norm, nn.LayerNorm) else x.square().mean(-1)
        found.append(float(0.5 * (_eps(norm) or 0.0) * abs(1 - products[position] ** 2) / squares.min()))
        return stream

    _run(model, path, inputs, look)
    if max(found) > EPS_BOUND:
        worst = found.index(max(found)) - 1
        _log.warning(
            "Folded scales change a norm's output by up to %.1e before position %d of the path: the stream is small there "
            "against the norm's eps. Keep the scales of the first steps at 1.",
            max(found),
            worst,
        )
    return max(found)


def _eps(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)


def _follows(before: Step | None, step: Step) -> bool:
    return step.layer == 0 if before is None else (before.model, before.layer + 1) == (step.model, step.layer)


def _real(inputs: Inputs) -> Tensor:
    """Which tokens are no padding, `(batch, tokens)`."""
    ids = next(iter(inputs.values()))
    return inputs.get("attention_mask", torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)).bool()


def _met(model: PathModel, wanted: set[tuple[str, int]], inputs: Inputs, real: Tensor) -> dict[tuple[str, int], Tensor]:
    """What layers meet in their own models, `(tokens, d)` each."""
    found: dict[tuple[str, int], Tensor] = {}
    for name in dict.fromkeys(name for name, _ in sorted(wanted)):

        def keep(position: int, stream: Tensor, name: str = name) -> Tensor:
            if (name, position) in wanted:
                found[name, position] = stream[real]
            return stream

        _run(model, tuple(Step(name, layer) for layer in range(model.depth_of(name))), inputs, keep)
    return found


def _run(model: PathModel, path: Sequence[Step], inputs: Inputs, change: Change) -> None:
    """One pass along the path; afterwards the model runs the path that it ran before."""
    before = model.path, model.seams
    paused = nullcontext() if model.prefixes is None else model.prefixes.paused()
    try:
        taken = model.take(path)
        with torch.no_grad(), paused, _changed(model, change):
            taken(**{name: tensor.to(taken.device) for name, tensor in inputs.items()})
    finally:
        model.take(*before)


@contextmanager
def _changed(model: PathModel, change: Change) -> Iterator[None]:
    def hook(position: int) -> Callable[..., Any]:
        def changed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (change(position, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(position, kwargs["hidden_states"])}

        return changed

    hooks = [b.register_forward_pre_hook(hook(i), with_kwargs=True) for i, b in enumerate(model.layers)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
