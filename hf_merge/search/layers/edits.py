"""Paths that differ in one block from a good one: what a policy that builds from the beginning finds last."""

import numpy as np
from numpy.typing import ArrayLike

from hf_merge.recipes.path import Path, Step
from hf_merge.search.layers.env import WIDEST, rounded_scale
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.pool import Pool

TRIES = 50
"""Edits that may turn out to be forbidden or known before a neighborhood counts as seen."""


def edited(
    pool: Pool, ledger: Ledger, preference: ArrayLike, *, longest: int, scales: bool, rng: np.random.Generator
) -> Path | None:
    """A path that was not scored yet: a good one with a block exchanged, put in or taken out, or another scale (`scales`).

    The good one is the best known for `preference` or, each with half the chance of the one before, the second, the third and
    so on. None if no new path was met.
    """
    known = list(ledger.values)
    if not known:
        return None
    ranked = np.argsort(-ledger.rewards(preference), kind="stable")
    for _ in range(TRIES):
        path = known[ranked[min(int(rng.geometric(0.5)), len(known)) - 1]]
        other = _edit(path, pool, scales, rng)
        if other and other not in ledger.values and pool.allowed(other, longest):
            return other
    return None


def _edit(path: Path, pool: Pool, scales: bool, rng: np.random.Generator) -> Path:
    at, block = int(rng.integers(len(path))), pool.blocks[rng.integers(len(pool.blocks))]
    new = (Step(block.model, block.layer),)
    kind = rng.choice(["exchange", "insert", "remove", "scale"][: 3 + scales])
    if kind == "exchange":
        return path[:at] + new + path[at + 1 :]
    if kind == "insert":
        at = int(rng.integers(len(path) + 1))
        return path[:at] + new + path[at:]
    if kind == "remove":
        return path[:at] + path[at + 1 :]
    old = path[at]
    scale = rounded_scale(np.log(old.scale) + rng.normal() * np.log(WIDEST) / 4)
    return (*path[:at], Step(old.model, old.layer, scale), *path[at + 1 :])
