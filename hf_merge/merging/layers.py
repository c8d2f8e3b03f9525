"""Which tensors make up which layer, read from their names alone."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hf_merge.recipes.value import relative

_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.]*[^.0-9][^.]*)\.(?P<layer>\d+)\.(?P<rest>.+)")
_BEFORE = re.compile(r"(^|[._])(embed(?!_out)|embeddings?|wte|wpe|shared|patch|position|stem|word|token|conv1|pre(?!diction))")
MAIN = 0.2
"""A numbered group of tensors is a stack of layers if it has at least this share of the largest one's tensors."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a stack of layers: its name is `stack.layer.rest`."""

    stack: str
    layer: int
    rest: str


class Layers:
    """The stacks of layers among tensors of these `names`.

    A stack is a group of names that differ by a number, 0, 1, 2 … without a gap, and is large; an encoder-decoder has two. What
    is numbered inside of a layer (experts) or is small (a head of two numbered parts) is none.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places: dict[str, Place] = {}
        numbers, sizes = defaultdict(set), Counter[str]()
        for name in names:
            if found := _NUMBERED.fullmatch(name):
                place = Place(found["stack"], int(found["layer"]), found["rest"])
                self._places[name] = place
                numbers[place.stack].add(place.layer)
                sizes[place.stack] += 1
        largest = max(sizes.values(), default=0)
        self.depths = {
            stack: len(found)
            for stack, found in numbers.items()
            if max(found) == len(found) - 1 and sizes[stack] >= MAIN * largest
        }

    def place(self, name: str) -> Place | None:
        """A tensor's place; None for one that is not in a layer."""
        found = self._places.get(name)
        return found if found and found.stack in self.depths else None

    def depth(self, name: str) -> float:
        """How deep a tensor's layer lies, from 0 for the first to 1 for the last; 0 for what is in no layer."""
        place = self.place(name)
        return 0.0 if place is None else relative(place.layer, self.depths[place.stack])

    @cached_property
    def rests(self) -> dict[tuple[str, int], list[str]]:
        """What each layer of each stack holds."""
        found: dict[tuple[str, int], list[str]] = defaultdict(list)
        for place in self._places.values():
            if place.stack in self.depths:
                found[place.stack, place.layer].append(place.rest)
        return found


def comes_before_layers(name: str) -> bool:
    """Whether a tensor that is in no layer stands before the layers (embeddings) and not after them (norm, head)."""
    return _BEFORE.search(name) is not None
