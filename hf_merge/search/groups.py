"""A number of its own for each part of the layers and each kind of module, in a search."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_merge.recipes.value import Filtered, Value

REST = "rest"
"""The group of all tensors that no filter matches."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """`layers` points of a gradient over the depth (1: one number for all layers), for each of the `modules` (filters by
    name) and the rest; without modules, for the whole model."""

    layers: int
    modules: Mapping[str, Sequence[str]]

    @property
    def suffixes(self) -> list[str]:
        """What tells the groups' parameters apart: one empty text if there is one group."""
        points = [f".{point}" for point in range(1, self.layers + 1)] if self.layers > 1 else [""]
        return [f".{module}{point}" for module in (*self.modules, REST) for point in points] if self.modules else points

    @property
    def places(self) -> list[tuple[str, float]]:
        """For each group a tensor's name and a depth that lie in it."""
        depths = [point / (self.layers - 1) for point in range(self.layers)] if self.layers > 1 else [0.5]
        return [(name, depth) for name in (*(f[0] for f in self.modules.values()), "") for depth in depths]

    def value(self, numbers: Sequence[float]) -> Value:
        """A recipe's value from one number for each group; one number if they are equal."""
        if len(set(numbers)) == 1:
            return numbers[0]
        values = [_gradient(numbers[i : i + self.layers]) for i in range(0, len(numbers), self.layers)]
        if not self.modules:
            return values[0]
        by_filter = zip(self.modules.values(), values, strict=False)
        return (*(Filtered(name, value) for names, value in by_filter for name in names), Filtered(None, values[-1]))


def wrong_groups(layers: Any, modules: Any) -> Iterable[str]:
    """What is wrong with the `layer_groups` and `module_groups` that are given for a space."""
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        yield f"`layer_groups` is a whole number of at least 1, got {layers!r}."
    wanted = "`module_groups` has parts of tensors' names by a name for them, such as {'attention': 'self_attn', 'mlp': 'mlp'}"
    if not isinstance(modules, Mapping):
        yield f"{wanted}, got {modules!r}."
        return
    earlier: list[str] = []
    for name, filters in modules.items():
        if not isinstance(name, str) or not name or "." in name or name == REST:
            yield f"A name in `module_groups` is a text without dots other than {REST!r}, got {name!r}."
        if not filters or not all(isinstance(f, str) and f and f != "*" for f in filters):
            yield f"{wanted}, got {filters!r} for {name!r}."
            continue
        for given in filters:
            yield from (f"{given!r} in `module_groups` never matches: {f!r} stands before it." for f in earlier if f in given)
            earlier.append(given)


def _gradient(numbers: Sequence[float]) -> float | tuple[float, ...]:
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)
