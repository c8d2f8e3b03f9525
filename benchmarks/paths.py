"""Searches over layer paths on toy pools whose best paths are known: how many evaluations until the best one is found.

A toy pool, another one for each seed, has some models of some layers. What a path is worth for a task is what each block
does for it (random), how well neighbors go together (worse the farther the next layer is from the one that should come, worse
between models, and random) and how well it begins and ends. Objectives are scaled so that the worst and the best model are 0
and 1, and a path costs 0.1 for as many blocks as a model has. Dynamic programming gives the best path for each of four
preferences, and all four are to be found. All searches begin with the models as they are and count distinct paths.

"no learning" is HM3's search with its start, ε and edits, but without updates; "edits" are its edits alone. The second table is
the online phase: how many evaluations the networks of a finished search need for preferences that they never saw, to reach what
a search from scratch for that preference ends with, in parts of what the latter needed.

    python benchmarks/paths.py [--seeds 20] [--first 0] [--models 3] [--depth 4] [--limit 1500] [--searches hm3 de …] [--online]
"""

import argparse
import time
from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from hf_merge.recipes.path import Path
from hf_merge.search.layers.baselines import BASELINES, baseline
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.paths import PathSearch, Settings, refine, search_paths
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.ppo import PPO

PREFERENCES = np.array([[1, 0], [0, 1], [0.5, 0.5], [0.25, 0.75]])
UNSEEN = np.array([[0.75, 0.25], [0.4, 0.6], [0.1, 0.9]])

HM3 = {
    "hm3": Settings(),
    "hm3, no edits": Settings(edits=0.0),
    "hm3, categorical": Settings(kind="categorical"),
    "no learning": Settings(ppo=PPO(epochs=0)),
}
ALL = [*HM3, *BASELINES]


class FoundError(Exception):
    """Nothing is left to be found."""


class Toy:
    """A pool, its two objectives and their best rewards."""

    def __init__(self, seed: int, models: int, depth: int, tasks: int = 2) -> None:
        rng = np.random.default_rng([seed, 77])
        self.pool = Pool.of({f"m{i}": depth for i in range(models)})
        self.longest, self.cost = Settings().reach(self.pool), Settings().cost(self.pool)
        size, layer, model = models * depth, np.tile(np.arange(depth), models), np.repeat(np.arange(models), depth)
        self.own = rng.normal(size=(tasks, size)) / 2
        seams = rng.uniform(0, 0.5, (models, models))[model][:, model] * (model[:, None] != model)
        self.pairs = -np.abs(layer - layer[:, None] - 1) - seams + 0.3 * rng.normal(size=(tasks, size, size))
        self.first = -layer + 0.3 * rng.normal(size=(tasks, size))
        self.last = layer - (depth - 1) + 0.3 * rng.normal(size=(tasks, size))
        own = np.array([self.raw(self.pool.identity(m)) for m in self.pool.models])
        self.low, self.span = own.min(0), np.maximum(np.ptp(own, axis=0), 0.5)

    def raw(self, path: Path) -> np.ndarray:
        """Each task's worth `(2,)` of a path."""
        a = list(self.pool.encode(path))
        return self.first[:, a[0]] + self.own[:, a].sum(1) + self.pairs[:, a[:-1], a[1:]].sum(1) + self.last[:, a[-1]]

    def score(self, path: Path) -> np.ndarray:
        """The same, scaled."""
        return (self.raw(path) - self.low) / self.span

    def best(self, preference: np.ndarray) -> float:
        """The highest reward of all paths."""
        weights = preference / self.span
        own, pairs = weights @ self.own - self.cost, np.tensordot(weights, self.pairs, 1)
        here = weights @ self.first + own
        highest = (here + weights @ self.last).max()
        for _ in range(self.longest - 1):
            here = (here[:, None] + pairs).max(0) + own
            highest = max(highest, (here + weights @ self.last).max())
        return float(highest - weights @ self.low)


def check() -> None:
    """Dynamic programming agrees with the enumeration of all paths."""
    toy = Toy(0, 2, 2)
    paths = [toy.pool.decode(a) for n in range(1, toy.longest + 1) for a in product(range(4), repeat=n)]
    ledger = Ledger(toy.score, length_cost=toy.cost)
    rewards = [max(ledger.reward(path, preference) for path in paths) for preference in PREFERENCES]
    assert np.allclose(rewards, [toy.best(preference) for preference in PREFERENCES])


def found(name: str, toy: Toy, seed: int, limit: int) -> list[float]:
    """For each preference the evaluations until its best path was found, infinite if it was not within the limit."""
    best = np.array([toy.best(preference) for preference in PREFERENCES])
    when, count = np.full(len(best), np.inf), 0

    def watch(path: Path, values: np.ndarray) -> None:
        nonlocal count
        count += 1
        rewards = PREFERENCES @ values - toy.cost * len(path)
        when[(rewards >= best - 1e-9) & np.isinf(when)] = count
        if np.isfinite(when).all():
            raise FoundError

    try:
        if name in HM3:
            search_paths(
                toy.score,
                toy.pool,
                PREFERENCES,
                episodes=6 * limit,
                evaluations=limit,
                seed=seed,
                settings=HM3[name],
                on_path=watch,
            )
        else:
            ledger = Ledger(toy.score, limit=limit, length_cost=toy.cost, on_path=watch)
            baseline(name, ledger, toy.pool, PREFERENCES, longest=toy.longest, seed=seed)
    except FoundError:
        pass
    return when.tolist()


def reached(run: Callable[[Callable[[Path, np.ndarray], None]], PathSearch], preference: np.ndarray, toy: Toy) -> np.ndarray:
    """The best reward after each evaluation."""
    rewards: list[float] = []
    run(lambda path, values: rewards.append(float(preference @ values - toy.cost * len(path))))
    return np.maximum.accumulate(rewards) if rewards else np.zeros(0)


def online(toy: Toy, seed: int, limit: int) -> list[tuple[float, float]]:
    """For each unseen preference: evaluations to the final reward from scratch, and from trained networks."""
    trained = search_paths(toy.score, toy.pool, PREFERENCES, episodes=6 * limit, evaluations=limit, seed=seed)
    pairs = []
    for row in UNSEEN:
        cold = reached(
            lambda watch, row=row: search_paths(  # type: ignore[misc]
                toy.score, toy.pool, row, episodes=limit, evaluations=limit // 4, seed=seed + 1, on_path=watch
            ),
            row,
            toy,
        )
        warm = reached(
            lambda watch, row=row: refine(  # type: ignore[misc]
                trained.nets, toy.score, row, episodes=limit, evaluations=limit // 4, seed=seed + 1, on_path=watch
            ),
            row,
            toy,
        )
        enough = [np.flatnonzero(curve >= cold[-1] - 1e-9) for curve in (cold, warm)]
        pairs.append((enough[0][0] + 1.0, enough[1][0] + 1.0 if enough[1].size else np.inf))
    return pairs


def median(values: np.ndarray, most: float) -> str:
    """Median with its bootstrap interval (95 %), `most` and above as such."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    shown = [float(np.median(values)), *np.quantile(np.median(draws, axis=1), (0.025, 0.975), method="nearest").tolist()]
    return "{} [{}, {}]".format(*(f"{x:.4g}" if x <= most else f"> {most:g}" for x in shown))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1500, help="evaluations")
    parser.add_argument("--searches", nargs="*", choices=ALL, default=ALL)
    parser.add_argument("--online", action="store_true", help="the second table as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    check()
    seeds = range(given.first, given.first + given.seeds)
    print(f"{given.models} models of {given.depth} layers, {given.seeds} pools, at most {given.limit} evaluations")
    print(f"{'':<18}{'pools solved':<14}{'preferences':<14}evaluations until all four are solved, median (95 %)")
    for name in given.searches:
        start = time.process_time()
        runs = np.array([found(name, Toy(s, given.models, given.depth), s, given.limit) for s in seeds])
        solved, all_of = f"{np.isfinite(runs).all(1).sum()}/{len(runs)}", f"{np.isfinite(runs).sum()}/{runs.size}"
        seconds = time.process_time() - start
        print(f"{name:<18}{solved:<14}{all_of:<14}{median(runs.max(1), given.limit)}   {seconds:.0f} s of CPU", flush=True)
    if given.online:
        runs = np.array([online(Toy(s, given.models, given.depth), s, given.limit) for s in seeds]).reshape(-1, 2)
        print(f"online, {len(runs)} unseen preferences: evaluations to the final reward of a search from scratch")
        for name, values in zip(("from scratch", "trained"), runs.T, strict=True):
            print(f"{name:<18}{median(values, given.limit // 4)}, reached {np.isfinite(values).sum()}/{len(values)}")
        print(f"{'ratio':<18}{median(runs[:, 1] / runs[:, 0], 1e9)}")


if __name__ == "__main__":
    main()
