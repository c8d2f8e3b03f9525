"""The blocks that a path may take, and paths through them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hf_merge.errors import MergeError, RecipeError, unknown
from hf_merge.recipes.path import Path, Step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """Block `layer` of `model`, and the widths of the residual stream that it reads and writes."""

    model: str
    layer: int
    width_in: int = 1
    width_out: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """All blocks; action i of the search is block i, action `stop` ends the path.

    `statistics` `(blocks, features)` tells the policy what a block is like (zeros if not given). `width_in` is what the
    embeddings write and `width_out` what the head reads; by default what the first block reads and the last one writes.
    A path takes blocks of one of the models `alternatives` at most.
    """

    blocks: tuple[Block, ...]
    statistics: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    width_in: int = 0
    width_out: int = 0
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise RecipeError("A pool needs blocks, got none.")
        if len(self.index) < len(self.blocks):
            raise RecipeError("A pool has each (model, layer) once; some are given twice.")
        given = np.asarray(self.statistics, dtype=np.float64)
        statistics = given if given.size else np.zeros((len(self.blocks), 1))
        if statistics.ndim != 2 or len(statistics) != len(self.blocks) or not np.isfinite(statistics).all():
            raise RecipeError(f"Statistics are finite and (blocks, features) = ({len(self.blocks)}, …), got {given.shape}.")
        object.__setattr__(self, "statistics", statistics)
        object.__setattr__(self, "width_in", self.width_in or self.blocks[0].width_in)
        object.__setattr__(self, "width_out", self.width_out or self.blocks[-1].width_out)
        object.__setattr__(self, "alternatives", tuple(self.alternatives))

    @classmethod
    def of(cls, depths: Mapping[str, int], statistics: Floats | None = None, *, alternatives: Sequence[str] = ()) -> "Pool":
        """Models of one width, by their numbers of layers."""
        blocks = tuple(Block(model, layer) for model, depth in depths.items() for layer in range(depth))
        known = np.zeros((0, 0)) if statistics is None else statistics
        return cls(blocks=blocks, statistics=known, alternatives=tuple(alternatives))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order of their first blocks."""
        return tuple(dict.fromkeys(block.model for block in self.blocks))

    @cached_property
    def depths(self) -> dict[str, int]:
        """Each model's number of layers."""
        return {model: 1 + max(b.layer for b in self.blocks if b.model == model) for model in self.models}

    @cached_property
    def index(self) -> dict[tuple[str, int], int]:
        """The action that takes a (model, layer)."""
        return {(block.model, block.layer): i for i, block in enumerate(self.blocks)}

    @property
    def stop(self) -> int:
        """The action that ends a path."""
        return len(self.blocks)

    @property
    def actions(self) -> int:
        """How many actions there are, with `stop`."""
        return len(self.blocks) + 1

    @cached_property
    def follows(self) -> NDArray[np.bool_]:
        """`(blocks, blocks)`: whether the second may come right after the first, by their widths."""
        out, into = (np.array([getattr(b, side) for b in self.blocks]) for side in ("width_out", "width_in"))
        return out[:, None] == into[None, :]

    @cached_property
    def to_end(self) -> NDArray[np.int64]:
        """`(blocks,)`: how many more blocks a path that stands behind this one needs before it may stop; -1 if it never may."""
        needed = np.array([0 if b.width_out == self.width_out else -1 for b in self.blocks])
        for more in range(1, len(self.blocks)):
            reaches = (self.follows & (needed == more - 1)[None, :]).any(1)
            needed = np.where((needed < 0) & reaches, more, needed)
        return needed

    @cached_property
    def excludes(self) -> NDArray[np.bool_]:
        """`(blocks, blocks)`: whether a path that has the first may not have the second, being another of the alternatives."""
        which = np.array([self.alternatives.index(b.model) if b.model in self.alternatives else -1 for b in self.blocks])
        return (which[:, None] >= 0) & (which[None, :] >= 0) & (which[:, None] != which[None, :])

    def mask(self, taken: Sequence[int], longest: int) -> NDArray[np.bool_]:
        """`(actions,)`: what may come after the blocks `taken`, if `longest` are the most.

        Widths fit at every seam, and a path can always be ended in time.
        """
        last = taken[-1] if taken else None
        fits = np.array([b.width_in == self.width_in for b in self.blocks]) if last is None else self.follows[last]
        blocks = fits & (self.to_end >= 0) & (len(taken) + 1 + self.to_end <= longest)
        if self.alternatives and taken:
            blocks &= ~self.excludes[list(taken)].any(0)
        return np.append(blocks, last is not None and self.to_end[last] == 0)

    def identity(self, model: str) -> Path:
        """The path that is `model` as it is."""
        if model not in self.models:
            raise RecipeError(unknown("model", model, self.models))
        return tuple(Step(model, block.layer) for block in self.blocks if block.model == model)

    def identities(self, longest: int) -> tuple[Path, ...]:
        """The identity path of every model that has one of at most `longest` blocks."""
        return tuple(p for p in map(self.identity, self.models) if self.allowed(p, longest))

    def allowed(self, path: Path, longest: int) -> bool:
        """Whether the search may take `path`."""
        actions = self.encode(path)
        return all(self.mask(actions[:i], longest)[action] for i, action in enumerate((*actions, self.stop)))

    def encode(self, path: Path) -> tuple[int, ...]:
        """The actions of a path, without `stop`."""
        missing = [str(step) for step in path if (step.model, step.layer) not in self.index]
        if missing:
            raise MergeError(f"The pool has no block {missing[0]}; it has the layers of {self.depths}.")
        return tuple(self.index[step.model, step.layer] for step in path)

    def decode(self, actions: Sequence[int], scales: Sequence[float] | None = None) -> Path:
        """The path of these actions (without `stop`), each with a scale (1 by default)."""
        chosen = [self.blocks[a] for a in actions]
        return tuple(Step(b.model, b.layer, s) for b, s in zip(chosen, scales or [1.0] * len(chosen), strict=True))
