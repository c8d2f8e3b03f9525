"""Which layers of which models the result is made of."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hf_merge.recipes.value import Value, parsed


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Layers [start, stop) of the recipe's model `model` (its name; "" is the base); `stop` None is the last one.

    `parameters` are the model's own in this slice.
    """

    model: str
    start: int = 0
    stop: int | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", {k: parsed(v) for k, v in self.parameters.items()})

    @property
    def length(self) -> int | None:
        """Number of layers, None if that is up to the model."""
        return None if self.stop is None else self.stop - self.start

    def problems(self) -> Iterable[str]:
        """What is wrong with it."""
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.start, 0 if self.stop is None else self.stop))
        if not whole or self.start < 0 or (self.stop is not None and self.stop <= self.start):
            given = f"Layers [{self.start}, {self.stop}) of {self.model or 'the base'!r}"
            yield f"{given}: a range [start, stop) has whole numbers 0 <= start < stop."


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the result: layer i is the merge of the i-th layers of all `sources`.

    Layers whose only source is the base are the base's. `parameters` hold for this slice. `module` names the part of the model
    that it belongs to, in models of several parts (`encoder`, `vision_tower`); "" is all of a model of one part.

    A slice that is `copied` is its only source as it is, without the method. The residual stream is multiplied by
    `residual_scale` before the slice's first layer. `depth` says where a gradient is read for the first and for the last of the
    slice's layers; None is from its start to its end, (0, 1).
    """

    sources: tuple[LayerRange, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    module: str = ""
    copied: bool = False
    residual_scale: float = 1.0
    depth: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "parameters", {k: parsed(v) for k, v in self.parameters.items()})
        object.__setattr__(self, "depth", None if self.depth is None else tuple(self.depth))

    def at(self, i: int, length: int) -> float:
        """Where a gradient is read for the slice's layer `i` of `length`, in [0, 1]."""
        first, last = self.depth or (0.0, 1.0)
        share = i / (length - 1) if length > 1 else 1.0
        return last if share == 1.0 else first + (last - first) * share

    def __str__(self) -> str:
        lasts = ["" if source.stop is None else source.stop for source in self.sources]
        ranges = [f"{s.model or 'base'}[{s.start}:{stop}]" for s, stop in zip(self.sources, lasts, strict=True)]
        return ("" if self.residual_scale == 1.0 else f"{self.residual_scale:g}×") + "+".join(ranges)

    def problems(self) -> Iterable[str]:
        """What is wrong with it."""
        wrong = [problem for source in self.sources for problem in source.problems()]
        yield from wrong
        lengths = set() if wrong else {source.length for source in self.sources}
        if len(lengths) > 1:
            shown = ", ".join(f"{s.model or 'the base'} [{s.start}, {s.stop})" for s in self.sources)
            yield f"The sources of a slice have equally many layers, got {shown}."
        if not isinstance(self.copied, bool):
            yield f"`copied` of a slice is true or false, got {self.copied!r}."
        elif self.copied and (len(self.sources) > 1 or self.parameters or any(source.parameters for source in self.sources)):
            yield f"A slice that is copied has one source and no parameters, got {self}."
        if not _is_number(self.residual_scale) or self.residual_scale <= 0:
            yield f"`residual_scale` of a slice is a positive number, got {self.residual_scale!r}."
        if self.depth is not None and not (len(self.depth) == 2 and all(_is_number(d) and 0 <= d <= 1 for d in self.depth)):
            yield f"`depth` of a slice is [first, last], two numbers between 0 and 1, got {list(self.depth)}."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class LayerMap:
    """The result's layers, slice after slice. The tensors before the layers are merged as the first slice, those after them
    as the last one (of their module)."""

    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(self.slices))

    @property
    def modules(self) -> tuple[str, ...]:
        """The parts that have slices, in order."""
        return tuple(dict.fromkeys(part.module for part in self.slices))

    @property
    def scaled(self) -> bool:
        """Whether the residual stream is multiplied anywhere."""
        return any(part.residual_scale != 1.0 for part in self.slices)

    def __str__(self) -> str:
        return " → ".join(map(str, self.slices))

    def problems(self, models: Iterable[str]) -> Iterable[str]:
        """What is wrong with it, for models of these names."""
        known = {*models, ""}
        if not self.slices:
            yield "A layer map needs slices, got none."
        for part in self.slices:
            if not part.sources:
                yield "A slice needs a source, got none."
            yield from part.problems()
            for source in part.sources:
                if source.model not in known:
                    yield f"A slice takes layers of {source.model!r}, which is not a model of the recipe."
