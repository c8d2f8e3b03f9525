"""Plain searches over paths, to compare with: the same score, the same counting of evaluations, the same start."""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from cmaes import CMA
from numpy.typing import ArrayLike

from hf_merge.errors import RecipeError, unknown
from hf_merge.recipes.path import Path
from hf_merge.search.layers.edits import edited
from hf_merge.search.layers.env import rounded_scale
from hf_merge.search.layers.ledger import BudgetSpentError, Ledger
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.rewards import Floats, checked

Search = Callable[[Ledger, Pool, Floats, int, np.random.Generator], Iterator[None]]
"""Scores paths of at most so many blocks for one preference, and yields after each generation."""

PATIENCE, STALE = 50, 5
"""Generations in a row that bring no new path, after which a search is done, or begins anew."""

POPULATION, DIFFERENCE, CROSSOVER = 10, 0.5, 0.9
"""Of DE: the best of 18 settings on other toy pools than those that benchmarks/paths.py reports."""


def baseline(name: str, ledger: Ledger, pool: Pool, preferences: ArrayLike, *, longest: int, seed: int) -> Ledger:
    """Runs the search `name` of `BASELINES` until the ledger's limit, the preferences (`(N, K)`) taking turns by generations.

    Every search begins with the identity paths, as HM3's does.
    """
    if name not in BASELINES:
        raise RecipeError(unknown("search over paths", name, BASELINES))
    if ledger.limit is None:
        raise RecipeError("A baseline runs until its evaluations are spent; give its ledger a limit.")
    rows = checked(preferences)
    try:
        for path in pool.identities(longest):
            ledger(path)
        turns = [
            _turns(name, ledger, pool, row, longest, rng)
            for row, rng in zip(rows, np.random.default_rng(seed).spawn(len(rows)), strict=True)
        ]
        while turns:
            turns = [one for one in turns if next(one, one) is None]
    except BudgetSpentError:
        pass
    return ledger


def _turns(name: str, ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """The generations of a search, which begins anew when it has settled, until even that brings nothing new."""
    running, idle = BASELINES[name](ledger, pool, preference, longest, rng), 0
    while idle < PATIENCE:
        before = ledger.evaluations
        if next(running, running) is not None:
            return
        yield
        idle = 0 if ledger.evaluations > before else idle + 1
        if name in SETTLING and idle % STALE == STALE - 1:
            running = BASELINES[name](ledger, pool, preference, longest, rng)


def random_paths(ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """Paths with uniform lengths, then uniform blocks among those that fit."""
    while True:
        ledger(random_path(pool, longest, rng))
        yield


def random_path(pool: Pool, longest: int, rng: np.random.Generator) -> Path:
    """One of them."""
    length, taken = int(rng.integers(1, longest + 1)), list[int]()
    while True:
        mask = pool.mask(taken, longest)
        if mask[pool.stop] and (len(taken) >= length or not mask[:-1].any()):
            return pool.decode(taken)
        taken.append(int(rng.choice(np.flatnonzero(mask[:-1]))))


def local_search(ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """One edit after the other of the best paths so far: HM3's search without its policy."""
    while (path := edited(pool, ledger, preference, longest=longest, scales=False, rng=rng)) is not None:
        ledger(path)
        yield


def passthrough_grid(ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """The first layers of one model, then the last ones of another or the same: those first that repeat and leave out least."""
    cuts = [
        (abs(end - start), a, b, end, start)
        for a, b in product(pool.models, repeat=2)
        for end, start in product(range(1, pool.depths[a] + 1), range(pool.depths[b]))
    ]
    for _, a, b, end, start in sorted(cuts):
        path = pool.identity(a)[:end] + pool.identity(b)[start:]
        if pool.allowed(path, longest):
            ledger(path)
            yield


def differential_evolution(
    ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator
) -> Iterator[None]:
    """DE/rand/1/bin over `longest` positions, each with a gene for its block and one for whether it is there.

    Blocks lie side by side by layer, then by model, so that a small difference is a near layer. The identity paths are in the
    first population.
    """
    order = sorted(range(len(pool.blocks)), key=lambda i: (pool.blocks[i].layer, pool.models.index(pool.blocks[i].model)))
    rank = np.argsort(order)
    genes = rng.random((POPULATION, 2, longest))
    for row, path in zip(genes, pool.identities(longest), strict=False):
        row[0, : len(path)] = (rank[list(pool.encode(path))] + 0.5) / len(order)
        row[1] = np.where(np.arange(longest) < len(path), 0.75, 0.25)
    paths = [_grown(pool, order, row, longest) for row in genes]
    worth = [ledger.reward(path, preference) for path in paths]
    while True:
        yield
        for i in range(POPULATION):
            a, b, c = genes[rng.choice(np.delete(np.arange(POPULATION), i), 3, replace=False)]
            mixed = rng.random(genes[i].shape) < CROSSOVER
            trial = np.where(mixed, np.clip(a + DIFFERENCE * (b - c), 0, 1), genes[i])
            reward = ledger.reward(_grown(pool, order, trial, longest), preference)
            if reward >= worth[i]:
                genes[i], worth[i] = trial, reward


def _grown(pool: Pool, order: list[int], genes: Floats, longest: int) -> Path:
    """The path of genes `(2, longest)`: at each position that is there, the fitting block nearest to the gene."""
    taken: list[int] = []
    blocks = genes[0] * len(order) - 0.5
    for block, there in zip(blocks, genes[1] > 0.5, strict=True):
        mask = pool.mask(taken, longest)
        if there and mask[:-1].any():
            distance = np.where(mask[:-1][order], np.abs(np.arange(len(order)) - block), np.inf)
            taken.append(order[int(distance.argmin())])
    return _ended(pool, taken, longest)


def _ended(pool: Pool, taken: list[int], longest: int) -> Path:
    """The path, with the blocks that it needs to end at the right width: the first ones that fit."""
    while not (mask := pool.mask(taken, longest))[pool.stop]:
        taken = [*taken, int(np.flatnonzero(mask[:-1])[0])]
    return pool.decode(taken)


def cma_es(
    ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator, scales: bool = False
) -> Iterator[None]:
    """Sakana's data-flow search (arXiv 2403.13187): all blocks in order, three times, each with an indicator (in if > 0).

    With `scales`, one more number for each: the log of its scale. Indicators begin at 0, those of the first model's first
    repetition at 2σ, and all a draw of σ beside that, so that no two beginnings are the same. A path ends where it would grow
    too long.
    """
    blocks = np.tile(np.arange(len(pool.blocks)), 3)
    mean, sigma = np.zeros(len(blocks) * (1 + scales)), 0.5
    mean[[i for i, block in enumerate(pool.blocks) if block.model == pool.models[0]]] = 2 * sigma
    mean += sigma * rng.normal(size=mean.shape)
    state = CMA(mean=mean, sigma=sigma, seed=int(rng.integers(2**31)))
    while True:
        told = []
        for _ in range(state.population_size):
            x = state.ask()
            told.append((x, -ledger.reward(_included(pool, blocks, x, longest), preference)))
        state.tell(told)
        yield


def _included(pool: Pool, blocks: "np.ndarray[tuple[int], np.dtype[np.int64]]", x: Floats, longest: int) -> Path:
    taken: list[int] = []
    factors: list[float] = []
    for i in np.flatnonzero(x[: len(blocks)] > 0):
        if pool.mask(taken, longest)[blocks[i]]:
            taken.append(int(blocks[i]))
            factors.append(rounded_scale(0.1 * x[len(blocks) + i]) if len(x) > len(blocks) else 1.0)
    path = _ended(pool, taken, longest)
    return pool.decode(pool.encode(path), factors + [1.0] * (len(path) - len(factors)))


def scaled_cma_es(ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """`cma_es` with a scale for each block."""
    return cma_es(ledger, pool, preference, longest, rng, scales=True)


def beam(ledger: Ledger, pool: Pool, preference: Floats, longest: int, rng: np.random.Generator) -> Iterator[None]:
    """Grows the best few beginnings block by block, each scored with the rest of its last block's model behind it.

    Begins anew with twice as many beginnings when the longest ones are reached.
    """
    width = 2
    while True:
        beginnings: list[tuple[int, ...]] = [()]
        while beginnings:
            grown = []
            for one in beginnings:
                mask = pool.mask(one, longest)
                for block in rng.permutation(np.flatnonzero(mask[:-1])).tolist():
                    path = _completed(pool, (*one, block), longest)
                    grown.append((ledger.reward(path, preference), (*one, block)))
            yield
            grown.sort(key=lambda pair: -pair[0])
            beginnings = [one for _, one in grown[:width]]
        width *= 2


def _completed(pool: Pool, beginning: tuple[int, ...], longest: int) -> Path:
    taken, last = list(beginning), pool.blocks[beginning[-1]]
    for layer in range(last.layer + 1, pool.depths[last.model]):
        follower = pool.index.get((last.model, layer), pool.stop)
        if follower == pool.stop or not pool.mask(taken, longest)[follower]:
            break
        taken.append(follower)
    return _ended(pool, taken, longest)


BASELINES: dict[str, Search] = {
    "random": random_paths,
    "edits": local_search,
    "grid": passthrough_grid,
    "de": differential_evolution,
    "cmaes": cma_es,
    "cmaes-scales": scaled_cma_es,
    "beam": beam,
}

SETTLING = ("de", "cmaes", "cmaes-scales")
"""Searches whose population narrows."""
