"""A parameter's value: one number, a gradient over the layers, or one of them for each kind of tensor."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import RecipeError

Number = float | bool
Gradient = tuple[Number, ...]


@dataclass(frozen=True)
class Filtered:
    """A value for the tensors whose names contain `filter` ("*" or None: all of them)."""

    filter: str | None
    value: Number | Gradient

    def matches(self, tensor: str) -> bool:
        """Whether this value is meant for a tensor of that name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Value = Number | Gradient | tuple[Filtered, ...]


def parsed(given: Any) -> Any:
    """A value from what YAML or a caller writes: a number, a list of numbers, or a list of `{filter, value}` mappings.

    Raises `RecipeError` for mappings that are not `{filter, value}`. Anything else is returned as it is, to be refused by
    the check of the recipe that it stands in.
    """
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list | tuple):
        return _number(given)
    if not any(isinstance(part, Mapping | Filtered) for part in given):
        return tuple(_number(part) for part in given)
    return tuple(part if isinstance(part, Filtered) else _filtered(part) for part in given)


def _filtered(part: Any) -> Filtered:
    if not isinstance(part, Mapping):
        return Filtered(None, _number(part))
    surplus = sorted(str(key) for key in part if key not in ("filter", "value"))
    if surplus or "value" not in part:
        raise RecipeError(f"A value by tensor name is {{filter: text, value: number or gradient}}, got {dict(part)!r}.")
    name = part.get("filter")
    if name is not None and not isinstance(name, str):
        raise RecipeError(f"A filter is a part of tensor names such as 'self_attn', got {name!r}.")
    value = part["value"]
    return Filtered(name, tuple(_number(v) for v in value) if isinstance(value, list | tuple) else _number(value))


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a text; whoever writes it means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def plain(value: Value) -> Any:
    """A value as YAML and JSON write it."""
    if not isinstance(value, tuple):
        return value
    if any(isinstance(part, Filtered) for part in value):
        return [
            ({"filter": part.filter} if part.filter is not None else {}) | {"value": plain(part.value)}
            for part in value
            if isinstance(part, Filtered)
        ]
    return list(value)


def relative(layer: int, depth: int) -> float:
    """Position of a layer among `depth` of them, in [0, 1]; the only one is the last."""
    return layer / (depth - 1) if depth > 1 else 1.0


def graded(value: Value) -> bool:
    """Whether a value differs between layers."""
    return any(isinstance(part.value, tuple) for part in _parts(value))


def numbers(value: Any) -> Iterable[Any]:
    """Every number that a value can become."""
    if isinstance(value, Filtered):
        yield from numbers(value.value)
    elif isinstance(value, tuple):
        for part in value:
            yield from numbers(part)
    else:
        yield value


def layered(values: Iterable[Value], default: Number) -> Value:
    """The first of `values` that is meant for a tensor, and else the `default`, as one value; equal ones come out equal."""
    parts: list[Filtered] = []
    for value in (*values, default):
        for part in _filters(value):
            if not any(earlier.filter in part.filter for earlier in parts if earlier.filter and part.filter):
                parts.append(part)
            if part.filter is None:
                return tuple(parts) if len(parts) > 1 else part.value
    raise AssertionError("the default is meant for every tensor")


def _filters(value: Value) -> Iterable[Filtered]:
    """A value as filters, of which the last may be None."""
    for part in _parts(value):
        yield Filtered(None if part.filter == "*" else part.filter, _even(part.value))


def _parts(value: Value) -> tuple[Filtered, ...]:
    if isinstance(value, tuple) and any(isinstance(part, Filtered) for part in value):
        return tuple(part for part in value if isinstance(part, Filtered))
    return (Filtered(None, value),)  # type: ignore[arg-type]


def over(inner: Mapping[str, Value], outer: Mapping[str, Value]) -> dict[str, Value]:
    """The values of two levels as one: `inner`'s, and `outer`'s where `inner` has none or no filter of it matches."""

    def joined(value: Value, fallback: Value) -> Value:
        parts = _parts(value)
        return value if parts[-1].filter in (None, "*") else parts + _parts(fallback)

    return {**outer, **{name: joined(value, outer[name]) if name in outer else value for name, value in inner.items()}}


def _even(value: Any) -> Any:
    """Numbers as floats, and a gradient between equal numbers as that number."""
    if not isinstance(value, tuple):
        return value if isinstance(value, bool) else float(value)
    points = tuple(_even(point) for point in value)
    return points[0] if len(set(points)) == 1 else points


def resolved(value: Value, tensor: str, depth: float) -> Number | None:
    """The number for a tensor at `depth` in [0, 1] of its layers (0 outside of them); None where no filter matches.

    Between a gradient's points numbers are interpolated linearly; true and false hold up to half of the way.
    """
    if not isinstance(value, tuple):
        return value
    if any(isinstance(part, Filtered) for part in value):
        found = next((part for part in value if isinstance(part, Filtered) and part.matches(tensor)), None)
        return None if found is None else resolved(found.value, tensor, depth)
    points = [part for part in value if not isinstance(part, Filtered)]
    place = depth * (len(points) - 1)
    below = min(math.floor(place), len(points) - 1)
    above, share = min(below + 1, len(points) - 1), place - below
    if isinstance(points[below], bool):
        return points[above] if share > 0.5 else points[below]
    return points[below] if share == 0 else points[below] * (1 - share) + points[above] * share
