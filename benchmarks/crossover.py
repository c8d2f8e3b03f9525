"""Which crossover the default sampler should use: the true hypervolume of the front that a search of each kind reports.

The problem is a merge in miniature, another one for each seed: three specialists of one base, each a sparse change that its
task needs plus small changes that it does not. Task i's accuracy falls with the squared distance from what it needs, and
`--elsewhere` says how much it minds changes where it needs none: the conflict between the tasks. The recipes are merged
with the library's own methods. Searches see accuracies as 500 rows would show them; the front that they report is then
measured without noise, as a share of the hypervolume of all points that any of them tried.

    python benchmarks/crossover.py [--seeds 20] [--budgets 60 100] [--rows 500] [--elsewhere 0.3]     # --rows 0: without noise
"""

import argparse
import time
import warnings
from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler
from optuna.samplers.nsgaii import BLXAlphaCrossover, PolynomialMutation, SBXCrossover, UniformCrossover

from hf_merge import pareto
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import MAXIMIZE, Score, Scores
from hf_merge.search.loop import search
from hf_merge.search.samplers.nsga2 import SeededNSGAIISampler, population
from hf_merge.search.space import Space

MODELS = ("chat", "code", "math")
DIRECTIONS = dict.fromkeys(MODELS, MAXIMIZE)

VARIANTS: dict[str, Callable[[int, int], BaseSampler]] = {
    "random": lambda seed, size: RandomSampler(seed=seed),
    "uniform": lambda seed, size: SeededNSGAIISampler(seed=seed, population_size=size, crossover=UniformCrossover()),
    "uniform + polynomial": lambda seed, size: SeededNSGAIISampler(
        seed=seed, population_size=size, crossover=UniformCrossover(), mutation=PolynomialMutation(eta=20)
    ),
    "SBX": lambda seed, size: SeededNSGAIISampler(seed=seed, population_size=size, crossover=SBXCrossover()),
    "SBX + polynomial": lambda seed, size: SeededNSGAIISampler(
        seed=seed, population_size=size, crossover=SBXCrossover(), mutation=PolynomialMutation(eta=20)
    ),
    "BLX-alpha": lambda seed, size: SeededNSGAIISampler(seed=seed, population_size=size, crossover=BLXAlphaCrossover()),
}


class Miniature:
    """Three specialists of `size` parameters and their tasks; the base is 0."""

    def __init__(self, seed: int, rows: int, elsewhere: float, size: int = 600) -> None:
        rng = np.random.default_rng(seed)
        needs = rng.random((3, size)) < 0.35
        self.wanted = np.where(needs, rng.standard_t(4, (3, size)), 0.0)
        self.cares = np.where(needs, 1.0, elsewhere)
        self.deltas = torch.tensor(self.wanted + 0.3 * rng.normal(size=(3, size)), dtype=torch.float32)
        self.rows, self.seed = rows, seed
        self.true: dict[str, np.ndarray] = {}

    def accuracies(self, recipe: Recipe) -> np.ndarray:
        """Each task's accuracy, without noise."""
        if recipe.digest not in self.true:
            merged = self._merged(recipe).double().numpy()
            far = (self.cares * (merged - self.wanted) ** 2).sum(1) / (self.cares * self.wanted**2).sum(1)
            self.true[recipe.digest] = 0.25 + 0.6 * np.exp(-1.5 * far)
        return self.true[recipe.digest]

    def _merged(self, recipe: Recipe) -> torch.Tensor:
        names = [m.name for m in recipe.models]
        if names == ["base"]:
            return torch.zeros_like(self.deltas[0])
        arguments = recipe.arguments()
        scaling = arguments.pop("scaling", 1.0)
        stack = self.deltas[[MODELS.index(name) for name in names]]
        return METHODS[recipe.method](stack, seed=recipe.seed, models=tuple(names), tensor="w", **arguments) * scaling

    def score(self, recipe: Recipe) -> Scores:
        """The accuracies on `rows` rows, the same for the same recipe."""
        values = self.accuracies(recipe)
        if self.rows:
            key = blake2b(f"{self.seed} {recipe.digest}".encode(), digest_size=8).digest()
            values = np.random.default_rng(int.from_bytes(key, "little")).binomial(self.rows, values) / self.rows
        return {name: Score(value=float(v), examples=self.rows or 1) for name, v in zip(MODELS, values, strict=True)}


def measure(seed: int, budgets: list[int], rows: int, elsewhere: float) -> dict[tuple[str, int], float]:
    """Share of the known hypervolume that each variant's reported front truly has, by variant and budget."""
    problem = Miniature(seed, rows, elsewhere)
    models = tuple(RecipeModel(ref=ModelRef(f"mini/{name}")) for name in MODELS)
    space = Space(models=models, base=ModelRef("mini/base"))
    parents = np.array([problem.accuracies(r) for r in space.parents().values()])
    reference = parents.min(0) - 0.1 * (parents.max(0) - parents.min(0))
    found = {}
    for name, make in VARIANTS.items():
        for budget in budgets:
            sampler = make(1000 * seed + budget, population(budget))
            study = search(problem.score, space, DIRECTIONS, trials=budget, sampler=sampler, progress=False)
            found[name, budget] = pareto.hypervolume([problem.accuracies(t.recipe) for t in study.front], reference)
    known = np.array(list(problem.true.values()))
    whole = pareto.hypervolume(known[pareto.non_dominated(known)], reference)
    return {key: value / whole for key, value in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 100])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--elsewhere", type=float, default=0.3)
    given = parser.parse_args()
    warnings.simplefilter("ignore", ExperimentalWarning)
    torch.set_num_threads(1)
    start = time.perf_counter()
    runs = [measure(seed, given.budgets, given.rows, given.elsewhere) for seed in range(given.seeds)]
    print(
        f"share of the known hypervolume, mean ± s.e. over {given.seeds} problems ({given.rows or 'all'} rows); less uniform's"
    )
    for name in VARIANTS:
        cells = []
        for budget in given.budgets:
            shares = np.array([run[name, budget] for run in runs])
            less = shares - np.array([run["uniform", budget] for run in runs])
            cells.append("{:.3f} ± {:.3f} ({:+.3f} ± {:.3f})".format(*_mean(shares), *_mean(less)))
        print(f"{name:<22}" + "   ".join(cells))
    print(f"budgets {given.budgets}, {time.perf_counter() - start:.0f} s")


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
