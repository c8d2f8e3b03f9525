"""MM-MO against random search and others at the budget of its paper: 30 evaluations.

The problem is a merge in closed form, another one for each seed, with the numbers that MM-MO searches: a weight and a density
for each of three models. Two are specialists of one task each and the third is of some use for both; trimming weakens a model,
and stacked deltas disturb. The third objective is the merge's distance from the base, to be small. Accuracies are in
percent, as `--rows` rows would show them, and the distance is in the millions, so that the units differ as they do for real.
What is compared is the hypervolume of the front that a search reports, measured without noise, above the base's accuracies and
all models' distances added up, as a share of what 4,000 random points reach together: instances count alike then. All searches
of a problem start with the same 10 random points, and MM-MO is told what the hypervolume is above.

    python benchmarks/mmmo.py [--seeds 20] [--first 0] [--trials 30] [--rows 500] [--samplers random mmmo ...]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler

from hf_merge import pareto
from hf_merge.search.samplers.mmmo import mmmo
from hf_merge.search.samplers.nsga2 import NSGA2Sampler

LIGHT: dict[str, Any] = {"samples": 32, "restarts": 2, "raw_samples": 64, "iterations": 50}
"""What the acquisition may spend here: half of the defaults."""

SAMPLERS: dict[str, Callable[[int, tuple[float, ...]], BaseSampler]] = {
    "random": lambda seed, reference: RandomSampler(seed=seed),
    "qmc": lambda seed, reference: QMCSampler(seed=seed, scramble=True),
    "nsga2": lambda seed, reference: NSGA2Sampler(seed=seed),
    "gp": lambda seed, reference: GPSampler(seed=seed),
    "mmmo": lambda seed, reference: mmmo(seed=seed, reference=reference, **LIGHT),
    "mmmo, one by one": lambda seed, reference: mmmo(seed=seed, reference=reference, batch=1, candidates=1, **LIGHT),
    "mmmo, 5 of 10": lambda seed, reference: mmmo(seed=seed, reference=reference, batch=5, candidates=10, sure=4, **LIGHT),
    "mmmo, filter alone": lambda seed, reference: mmmo(seed=seed, reference=reference, sure=0, **LIGHT),
    "mmmo, high information": lambda seed, reference: mmmo(seed=seed, reference=reference, fisher_order="high", **LIGHT),
    "mmmo, no filter": lambda seed, reference: mmmo(seed=seed, reference=reference, fisher_order=None, **LIGHT),
    "mmmo, as published": lambda seed, reference: mmmo(paper=True, seed=seed, **LIGHT),
}

START = 10
"""Uniform random points that every search of a problem starts with, the same for all."""

FARTHEST = 3e7
"""The distance from the base of all three models added up."""


class Problem:
    """Two accuracies in percent and minus a distance, from three weights and three densities."""

    def __init__(self, seed: int, rows: int) -> None:
        rng = np.random.default_rng(seed)
        self.wanted = np.concatenate([rng.uniform(0.0, 0.3, (2, 2)), rng.uniform(0.2, 0.6, (2, 1))], 1)
        self.wanted[[0, 1], [0, 1]] = rng.uniform(0.7, 1.0, 2)
        self.cares = rng.uniform(0.5, 2.0, (2, 3))
        self.clash = rng.uniform(0.1, 0.6, 2)
        self.rows, self.noise = rows, np.random.default_rng([seed, 1])
        models = np.array([self.values(np.append(own, np.ones(3))) for own in np.eye(3)])
        self.worst = self.values(np.zeros(6)) - [0, 0, FARTHEST]
        self.best = np.append(models[:, :2].max(0), 0)
        many = np.random.default_rng([seed, 3]).random((4000, 6))
        many[::2, :3] **= 2  # half of them with small weights, where the front is
        self.whole = self.hypervolume(list(many))

    def values(self, x: np.ndarray) -> np.ndarray:
        """The three objectives `(3,)`, all maximized, of weights and densities `(6,)`."""
        weights, densities = x[:3], x[3:]
        strengths = weights * (1 - (1 - densities) ** 2)
        stacked = (strengths.sum() ** 2 - (strengths**2).sum()) / 2
        missed = (self.cares * (strengths - self.wanted) ** 2).sum(1) + self.clash * stacked
        return np.append(25 + 60 * np.exp(-missed), -FARTHEST * (weights * densities).mean())

    def hypervolume(self, points: list[np.ndarray]) -> float:
        """What these weights and densities dominate, each objective in units of its range."""
        values = np.array([self.values(x) for x in points])
        scaled = (values - self.worst) / (self.best - self.worst)
        return pareto.hypervolume(scaled[pareto.non_dominated(scaled)], np.zeros(3))

    def seen(self, x: np.ndarray) -> list[float]:
        """The objectives as a search sees them."""
        values = self.values(x)
        if self.rows:
            values[:2] = 100 * self.noise.binomial(self.rows, values[:2] / 100) / self.rows
        return values.tolist()


def measure(name: str, seed: int, rows: int, trials: int) -> float:
    """True hypervolume of the reported front, as a share of the whole."""
    problem = Problem(seed, rows)
    sampler = SAMPLERS[name](seed, tuple(problem.worst.tolist()))
    study = optuna.create_study(directions=["maximize"] * 3, sampler=sampler)
    names = [f"{what}.{i}" for what in ("weight", "density") for i in range(3)]
    for row in np.random.default_rng([seed, 2]).random((START, len(names))):
        study.enqueue_trial(dict(zip(names, row.tolist(), strict=True)))
    points = []
    for _ in range(trials):
        trial = study.ask()
        points.append(np.array([trial.suggest_float(name, 0, 1) for name in names]))
        study.tell(trial, problem.seen(points[-1]))
    return problem.hypervolume([points[t.number] for t in study.best_trials]) / problem.whole


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first problem's seed")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--rows", type=int, default=500, help="0: without noise")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=["random", "mmmo"])
    given = parser.parse_args()
    warnings.simplefilter("ignore", ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    print(f"share of the hypervolume at {given.trials} evaluations, mean ± s.e. of {given.seeds}; less the first one's")
    found: dict[str, np.ndarray] = {}
    for name in given.samplers:
        start = time.process_time()
        seeds = range(given.first, given.first + given.seeds)
        found[name] = np.array([measure(name, s, given.rows, given.trials) for s in seeds])
        less = found[name] - found[given.samplers[0]]
        seconds = time.process_time() - start
        cells = "{:.3f} ± {:.3f} ({:+.3f} ± {:.3f})".format(*_mean(found[name]), *_mean(less))
        print(f"{name:<24}{cells}   {seconds:.0f} s of CPU", flush=True)


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
