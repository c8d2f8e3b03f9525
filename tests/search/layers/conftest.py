"""A small pool whose best path everyone can see."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from hf_merge.recipes.path import Path
from hf_merge.search.layers.pool import Pool


@dataclass
class Toy:
    """Two models of three layers: layers in their order are worth something, those of "a" to task 1, of "b" to task 2."""

    pool: Pool = field(default_factory=lambda: Pool.of({"a": 3, "b": 3}))
    asked: list[Path] = field(default_factory=list)

    def __call__(self, path: Path) -> np.ndarray:
        self.asked.append(path)
        order = [after.layer == before.layer + 1 for before, after in pairwise(path)]
        base = (sum(order) + (path[0].layer == 0) + (path[-1].layer == 2)) / 4 - 0.2 * (len(path) - 1 - sum(order))
        share = np.mean([step.model == "a" for step in path])
        scale = sum(abs(np.log(step.scale)) for step in path)
        return np.array([base + share, base + 1 - share]) - 0.1 * scale


@pytest.fixture
def toy() -> Toy:
    return Toy()
