"""Hypervolume for evaluations spent, on problems whose fronts are known: every sampler, pymoo's NSGA-II and plain random.

Each seed is another instance of four problems, all of them searched through the library's own `search` and `Space`:

    zdt1, zdt2   two objectives of six weights; the curve of ZDT1 (convex) or ZDT2 (concave), its distance variables best at
                 points of the instance's own instead of at 0, where the parents would lie
    dtlz2        three objectives of seven weights; DTLZ2 (a part of a sphere), its distance variables moved in the same way
    merge        a merge in formulas: three tasks and three models; a task's accuracy falls with a quadratic loss around the
                 weights that it wants; models interfere, less so where they are trimmed; each has a density of its own that is
                 best; which of three methods is best is the instance's. 8 numbers and the method

The share is the hypervolume of what was evaluated over that of the true front. pymoo's NSGA-II (its defaults, no parents, the
method as one more number cut into bins) runs with populations of 10 and 20; plain random is uniform and has no parents
either. All other rows start with the parents and their average, as every search does.

    pip install pymoo
    python benchmarks/search.py [--seeds 20] [--first 0] [--samplers nsga2 map …] [--problems …] [--budgets …] [--processes 2]
"""

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import moocore
import numpy as np
import torch
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize

from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import MAXIMIZE, MINIMIZE, Score, Scores
from hf_merge.search.loop import search
from hf_merge.search.space import Space

Floats = NDArray[np.float64]

BUDGETS = (30, 60, 100, 200)

SAMPLERS = ("nsga2", "nsga3", "map", "gp", "tpe", "cmaes", "qmc", "random")

AT_MOST = {"gp": 30, "mmmo": 30, "map": 100, "tpe": 100}
"""Budgets beyond these would take most of the benchmark's time."""

PEERS = {"pymoo nsga2, 10": 10, "pymoo nsga2, 20": 20}

PLAIN = "plain random"


@dataclass
class Problem:
    """Values of a point (all minimized), where the true front is, and the space that is searched."""

    space: Space
    values: Callable[[Recipe], Floats]
    front: Floats
    reference: Floats
    direction: str = MINIMIZE

    def share(self, values: Floats) -> float:
        """Their hypervolume as a share of the true front's."""
        whole = moocore.hypervolume(self.front, ref=self.reference)
        return float(moocore.hypervolume(values, ref=self.reference) / whole)

    @property
    def directions(self) -> dict[str, str]:
        return {f"f{k}": self.direction for k in range(len(self.reference))}

    def score(self, recipe: Recipe) -> Scores:
        sign = -1 if self.direction == MAXIMIZE else 1
        return {
            name: Score(value=sign * float(v), examples=1) for name, v in zip(self.directions, self.values(recipe), strict=True)
        }


def _space(models: int, methods: tuple[str, ...]) -> Space:
    return Space(
        models=tuple(RecipeModel(ref=ModelRef(f"toy/m{i}")) for i in range(models)), base=ModelRef("toy/base"), methods=methods
    )


def _by_model(recipe: Recipe, values: Sequence[float], missing: float, size: int) -> Floats:
    found = np.full(size, missing)
    for model, value in zip(recipe.models, values, strict=True):
        if model.name != "base":
            found[int(model.name[1:])] = value
    return found


def _weights(recipe: Recipe, size: int) -> Floats:
    return _by_model(recipe, recipe.arguments()["weights"], 0.0, size)


def zdt(curve: Callable[[Floats], Floats], seed: int, size: int = 6) -> Problem:
    """ZDT1 or ZDT2 (Zitzler, Deb and Thiele, 2000) with g = 1 + 9 mean|x - c| and c drawn by the seed."""
    best = np.random.default_rng((seed, 1)).uniform(0.1, 0.9, size - 1)

    def values(recipe: Recipe) -> Floats:
        x = _weights(recipe, size)
        g = 1 + 9 * np.abs(x[1:] - best).mean()
        return np.array([x[0], g * curve(x[0] / g)])

    grid = np.linspace(0, 1, 2001)
    return Problem(_space(size, ("task_arithmetic",)), values, np.stack([grid, curve(grid)], 1), np.array([1.1, 3.0]))


def dtlz2(seed: int, size: int = 7) -> Problem:
    """DTLZ2 (Deb, Thiele, Laumanns and Zitzler, 2002) with three objectives; g = Σ (x - c)² and c drawn by the seed."""
    best = np.random.default_rng((seed, 2)).uniform(0.1, 0.9, size - 2)

    def on_sphere(a: Floats, b: Floats) -> Floats:
        a, b = a * np.pi / 2, b * np.pi / 2
        return np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], -1)

    def values(recipe: Recipe) -> Floats:
        x = _weights(recipe, size)
        return (1 + ((x[2:] - best) ** 2).sum()) * on_sphere(x[0], x[1])

    a, b = np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 60))
    return Problem(_space(size, ("task_arithmetic",)), values, on_sphere(a.ravel(), b.ravel()), np.full(3, 1.25))


@dataclass
class Tasks:
    """Three tasks, three models, three methods (see the top): accuracy_k = 0.3 + 0.6 exp(-loss_k).

    loss_k = ½ (u - c_k)ᵀ A_k (u - c_k) + ½ γ uᵀ P u + Σ_j u_j² (d_j - δ_j)² + offset, with u the weights times the scaling, γ
    and the offset by method (a plain sum trims nothing and has no densities). It is convex in u, so the front is where the
    weighted sums of the losses are least, with every density at δ.
    """

    rng: np.random.Generator
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    size: int = 3

    def __post_init__(self) -> None:
        rng, size = self.rng, self.size
        self.wanted = 0.7 * np.eye(size) + rng.uniform(0.05, 0.2, (size, size))
        half = rng.normal(size=(size, size, size)) * 0.4
        self.cares = 3 * (np.eye(size) + half @ half.transpose(0, 2, 1))
        self.density = rng.uniform(0.2, 0.7, size)
        self.gammas = dict(zip(self.methods, rng.permutation([0.1, 0.2, 0.4]), strict=True))
        self.offsets = dict(zip(self.methods, rng.permutation([0.0, 0.03, 0.1]), strict=True))
        self.pairs = 1.0 - np.eye(size)

    def losses(self, u: Floats, method: str) -> Floats:
        """Each task's loss with the best densities."""
        far = u - self.wanted
        own = 0.5 * np.einsum("ki,kij,kj->k", far, self.cares, far)
        return own + self.gammas[method] * (u @ self.pairs @ u) / 2 + self.offsets[method]

    def values(self, recipe: Recipe) -> Floats:
        """Each task's accuracy, negated."""
        u, arguments = _weights(recipe, self.size), recipe.arguments()
        method = "task_arithmetic" if recipe.method == "linear" else recipe.method
        spoilt = 0.0
        if "density" in arguments:
            kept = _by_model(recipe, arguments["density"], 1.0, self.size)
            u = u / u.sum() * arguments["scaling"]
            spoilt = float((u**2 * (kept - self.density) ** 2).sum())
        return -(0.3 + 0.6 * np.exp(-self.losses(u, method) - spoilt))

    def optima(self) -> list[tuple[Floats, str]]:
        """Where the weighted sums of the losses are least, by method."""
        shares = np.array([(i, j, 60 - i - j) for i in range(61) for j in range(61 - i)]) / 60
        found = []
        for method in self.methods:
            curvature = np.einsum("sk,kij->sij", shares, self.cares) + self.gammas[method] * self.pairs
            slope = np.einsum("sk,kij,kj->si", shares, self.cares, self.wanted)
            found += [(u, method) for u in np.linalg.solve(curvature, slope[..., None])[..., 0]]
        return found


def merge(seed: int) -> Problem:
    """The first instance of `Tasks` whose front lies in the space."""
    rng = np.random.default_rng((seed, 3))
    while True:
        tasks = Tasks(rng)
        optima = tasks.optima()
        if all(u.min() >= 0 and u.max() <= 1 and 0.3 <= u.sum() <= 1.5 for u, _ in optima):
            break
    front = np.array([-(0.3 + 0.6 * np.exp(-tasks.losses(u, method))) for u, method in optima])
    return Problem(_space(tasks.size, tasks.methods), tasks.values, front, np.full(3, -0.35), direction=MAXIMIZE)


PROBLEMS: Mapping[str, Callable[[int], Problem]] = {
    "zdt1": lambda seed: zdt(lambda x: 1 - np.sqrt(x), seed),
    "zdt2": lambda seed: zdt(lambda x: 1 - x**2, seed),
    "dtlz2": dtlz2,
    "merge": merge,
}


@dataclass
class Run:
    """Shares by budget; how many evaluations were of a recipe evaluated before; seconds."""

    shares: dict[int, float]
    duplicates: int
    seconds: float


def ours(problem: Problem, sampler: str, seed: int, budgets: Sequence[int]) -> Run:
    """A search with one of the library's samplers."""
    recipes: list[Recipe] = []

    def score(recipe: Recipe) -> Scores:
        recipes.append(recipe)
        return problem.score(recipe)

    start, trials = time.perf_counter(), min(budgets[-1], AT_MOST.get(sampler, budgets[-1]))
    search(score, problem.space, problem.directions, trials=trials, sampler=sampler, seed=seed, progress=False)
    return _cut(problem, recipes, budgets, time.perf_counter() - start)


def decoded(problem: Problem, x: Floats) -> Recipe:
    """The recipe at a point of the unit cube."""
    params = {}
    for (name, d), value in zip(problem.space.distributions.items(), x, strict=True):
        if isinstance(d, CategoricalDistribution):
            params[name] = d.choices[min(int(value * len(d.choices)), len(d.choices) - 1)]
        else:
            params[name] = d.low + value * (d.high - d.low)  # type: ignore[attr-defined]
    return problem.space.recipe(params)


def theirs(problem: Problem, population: int, seed: int, budgets: Sequence[int]) -> Run:
    """pymoo's NSGA-II."""
    recipes: list[Recipe] = []

    class Wrapped(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(n_var=len(problem.space.distributions), n_obj=len(problem.reference), xl=0.0, xu=1.0)

        def _evaluate(self, x: Floats, out: dict[str, Floats]) -> None:
            recipes.append(decoded(problem, x))
            out["F"] = problem.values(recipes[-1])

    start = time.perf_counter()
    minimize(Wrapped(), NSGA2(pop_size=population), ("n_eval", budgets[-1]), seed=seed)
    return _cut(problem, recipes, budgets, time.perf_counter() - start)


def plain(problem: Problem, seed: int, budgets: Sequence[int]) -> Run:
    """Uniform points."""
    start = time.perf_counter()
    points = np.random.default_rng((seed, 4)).random((budgets[-1], len(problem.space.distributions)))
    return _cut(problem, [decoded(problem, x) for x in points], budgets, time.perf_counter() - start)


def _cut(problem: Problem, recipes: list[Recipe], budgets: Sequence[int], seconds: float) -> Run:
    values = np.array([problem.values(r) for r in recipes])
    duplicates = len(recipes) - len({r.digest for r in recipes})
    return Run({b: problem.share(values[:b]) for b in budgets if b <= len(values)}, duplicates, seconds)


Job = tuple[str, str, int]


def measure(job: Job, budgets: Sequence[int] = BUDGETS) -> tuple[Job, Run]:
    """One row's run on one instance of a problem."""
    name, row, seed = job
    problem = PROBLEMS[name](seed)
    if row in PEERS:
        return job, theirs(problem, PEERS[row], seed, budgets)
    return job, plain(problem, seed, budgets) if row == PLAIN else ours(problem, row, seed, budgets)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("hf_merge").setLevel(logging.ERROR)


def table(name: str, rows: Sequence[str], seeds: Sequence[int], budgets: Sequence[int], found: Mapping[Job, Run]) -> None:
    """Prints one problem's table."""
    print(f"\n| {name} | " + " | ".join(str(b) for b in budgets) + " | duplicates | s a run |")
    print("|---" * (len(budgets) + 3) + "|")
    for row in rows:
        runs = [found[name, row, seed] for seed in seeds]
        cells = []
        for budget in budgets:
            values = np.array([run.shares.get(budget, np.nan) for run in runs])
            error = values.std(ddof=1) / np.sqrt(len(values))
            cells.append("" if np.isnan(values).any() else f"{values.mean():.3f} ± {error:.3f}")
        print(f"| {row} | {' | '.join(cells)} | {sum(r.duplicates for r in runs)} | {np.mean([r.seconds for r in runs]):.1f} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed: samplers were tuned on 1000 and up")
    parser.add_argument("--samplers", nargs="+", default=[*SAMPLERS, *PEERS, PLAIN])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    jobs = [(name, row, seed) for row in given.samplers for seed in seeds for name in given.problems]
    start = time.perf_counter()
    with multiprocessing.Pool(given.processes, initializer=_start) as pool:
        found = dict(pool.imap_unordered(partial(measure, budgets=given.budgets), jobs))
    print(f"share of the true hypervolume, mean ± s.e. over {given.seeds} instances ({time.perf_counter() - start:.0f} s)")
    for name in given.problems:
        table(name, given.samplers, seeds, given.budgets, found)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
