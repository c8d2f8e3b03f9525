"""HM3 and plain searches over paths on real models, at equal example-evaluations, judged on rows that no search saw.

Three generative specialists of one small Llama (translation: chrF; math and code: exact match). For each seed `--merges`
trials search the parameters; then every search has `--paths` evaluations more, on all search rows: paths through the layers of
the models and of the best merge for the same `--preferences`, or as many more merges ("parameters"; "merges" has none more).
All searches over paths begin with the models and the merge as they are.

A row shows, on held-out rows and as mean ± standard error over the seeds, the scores of the front's knee, which was chosen on
search rows, the front's hypervolume above the reference point of the parents' search scores, and by how much it is more than
HM3's of the same seed. Where the intervals overlap nothing is better.

    --gains     what is won for single preferences, on search rows and on held-out rows
    --online    how many evaluations trained networks need for preferences that they never saw, in parts of what a search from
                nothing for that preference takes to what it ends with
    --prefixes  HM3's paths of the first seed once more, scored with and without the hidden states of shared beginnings:
                layer-evaluations, seconds, and whether all scores are equal; and the same where answers are not generated but
                their likelihood is measured

    python benchmarks/hm3.py [--seeds 3] [--first 0] [--merges 40] [--paths 100] [--arms hm3 de …] [--rows 64] [--folder DIR]
"""

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path as Folder
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from datasets import DatasetDict

from hf_merge import pareto
from hf_merge.demo.generator_objectives import objectives
from hf_merge.demo.generators import GENERATORS
from hf_merge.demo.specialists import build_family
from hf_merge.evaluation.objective import Objective
from hf_merge.hierarchical import EPISODES, Architecture, architecture
from hf_merge.recipes.path import path_of
from hf_merge.search.layers.baselines import BASELINES, baseline
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.paths import PathSearch, Settings, refine, search_paths
from hf_merge.search.layers.rewards import drawn
from hf_merge.search.trial import Front, Trial, to_corner, to_points
from hf_merge.wiring import Searched, searched

HM3, PARAMETERS, MERGES = "hm3", "parameters", "merges"
ALL = [MERGES, PARAMETERS, *BASELINES, HM3]
UNSEEN = 3
"""Preferences for each seed that the networks have not been trained on."""

Row = Mapping[str, Any]


def likely(objective: Objective) -> Objective:
    """The same rows, judged by how likely the model finds them with their answers: one pass, nothing generated."""
    assert isinstance(objective.dataset, DatasetDict)
    rows = objective.dataset.map(lambda row: {"text": row["text"] + row["label"]}, remove_columns="label")
    return Objective(name=objective.name, dataset=rows, task="language-modeling")


class Family:
    """The specialists, and the searches that go before those over paths."""

    def __init__(self, options: argparse.Namespace, likelihood: bool = False) -> None:
        self.built, self.options = build_family(GENERATORS, progress=False), options
        self.folder: Folder = (
            options.folder / f"{'likelihood-' if likelihood else ''}{options.merges}-{options.paths}-{options.rows}"
        )
        self.objectives = objectives(self.built, rows=options.rows)
        if likelihood:
            self.objectives = [likely(each) for each in self.objectives]

    @lru_cache(maxsize=2)  # noqa: B019 (one object, as long as the program)
    def merges(self, seed: int, trials: int) -> Searched:
        """So many trials of a search among merges; kept, and never done twice."""
        return searched(
            self.built.base,
            list(self.built.models.values()),
            self.objectives,
            trials=trials,
            seed=seed,
            folder=self.folder / f"{seed}-{trials}",
            device="cpu",
            progress=False,
        )

    def architecture(self, seed: int, share: bool = True) -> Architecture:
        """A search over paths that has not begun. What others of this seed have scored is kept, and counted all the same."""
        found, options = self.merges(seed, self.options.merges), self.options
        return architecture(found, seed=seed, share=share, merges=options.pool, preferences=self.wanted(seed))

    def wanted(self, seed: int) -> np.ndarray:
        """The preferences `(N, K)` of all searches."""
        return drawn(3, self.options.preferences, np.random.default_rng(seed))

    def row(self, arm: str, seed: int) -> Row:
        """What a search has found, on held-out rows; from the folder, if it is there."""
        path = self.folder / f"{arm}-{seed}{f'-{self.options.pool}' if self.options.pool > 1 else ''}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._row(arm, seed)))
        found: Row = json.loads(path.read_text())
        return found

    def run(self, arm: str, seed: int) -> tuple[Architecture, Sequence[Trial], Sequence[Trial]]:
        """A search: what scores its recipes, its merges and its paths."""
        options, made = self.options, self.architecture(seed)
        if arm == PARAMETERS:
            return made, self.merges(seed, options.merges + options.paths).study.trials, ()
        if arm == HM3:
            made.train(self.wanted(seed), options.paths, progress=False)
        elif arm != MERGES:
            ledger = Ledger(made.values, limit=options.paths, length_cost=Settings().cost(made.pool))
            baseline(arm, ledger, made.pool, self.wanted(seed), longest=Settings().reach(made.pool), seed=seed)
        return made, made.study.trials, made.trials

    def _row(self, arm: str, seed: int) -> Row:
        start = time.perf_counter()
        made, merges, paths = self.run(arm, seed)
        directions, reference = made.study.directions, made.study.reference
        front = Front.of([*merges, *paths], directions, reference)
        held_out = {t.recipe.digest: made.score(t.recipe, "held_out") for t in front}
        points = np.array([[score.value for score in scores.values()] for scores in held_out.values()])
        taken = [path_of(t.recipe.layers) for t in front if t.recipe.layers is not None]
        return {
            "tasks": {name: score.value for name, score in held_out[front.choose().recipe.digest].items()},
            "hypervolume": pareto.hypervolume(points, to_corner(reference, directions)),
            "search": front.hypervolume(),
            "front": len(front),
            "paths": len(taken),
            "other depths": sum(len(path) not in made.pool.depths.values() for path in taken),
            "scored": len(merges) + len(paths) - self.options.merges,
            "seconds": time.perf_counter() - start,
        }

    def gains(self, arm: str, seed: int) -> tuple[float, float]:
        """By how much the best for a preference, as search rows have it, is better than the best of the merges, mean over the
        preferences, in shares of the way from the base to the best specialist: on search rows and on held-out rows."""
        made, merges, paths = self.run(arm, seed)
        before = [t for t in made.study.trials if t.scores]
        every = [*before, *(t for t in (*merges, *paths) if t.scores)]
        worth = self.wanted(seed) @ made.normalized(to_points(every, made.study.directions)).T
        pairs = [(every[int(row.argmax())], before[int(row[: len(before)].argmax())]) for row in worth]

        def reward(trial: Trial, preference: np.ndarray) -> float:
            scores = made.score(trial.recipe, "held_out")
            return float(preference @ made.normalized([score.value for score in scores.values()]))

        held_out = [reward(new, row) - reward(old, row) for (new, old), row in zip(pairs, self.wanted(seed), strict=True)]
        return float((worth.max(1) - worth[:, : len(before)].max(1)).mean()), float(np.mean(held_out))

    def models(self, seed: int) -> dict[str, Mapping[str, float]]:
        """The specialists' and the average's held-out scores, for comparison."""
        found = self.merges(seed, self.options.merges)
        made = self.architecture(seed)
        return {
            label: {name: score.value for name, score in made.score(recipe, "held_out").items()}
            for label, recipe in found.space.seeds().items()
        }


def mean(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def show(rows: Mapping[str, Sequence[Row]]) -> None:
    """The table."""
    tasks = list(next(iter(rows.values()))[0]["tasks"])
    print(f"| | {' | '.join(tasks)} | hypervolume × 1000 | less HM3's | front, of it paths | scored |")
    print("|---" * (len(tasks) + 5) + "|")
    for arm, found in rows.items():
        cells = [mean([row["tasks"][task] for row in found]) for task in tasks]
        cells.append(mean([1000 * row["hypervolume"] for row in found], 2))
        pairs = list(zip(found, rows.get(HM3, found), strict=True))
        cells.append(mean([1000 * (row["hypervolume"] - hm3["hypervolume"]) for row, hm3 in pairs], 2, "+"))
        cells.append(f"{np.mean([row['front'] for row in found]):.0f}, {np.mean([row['paths'] for row in found]):.0f}")
        cells.append(f"{np.mean([row['scored'] for row in found]):.0f}")
        print(f"| {arm} | {' | '.join(cells)} |")


def climb(run: Callable[..., PathSearch], row: np.ndarray, cost: float, **settings: Any) -> np.ndarray:
    """The best reward for a preference after each evaluation of a search."""
    seen: list[float] = []
    run(on_path=lambda path, values: seen.append(float(row @ values - cost * len(path))), **settings)
    return np.maximum.accumulate(seen) if seen else np.full(1, -np.inf)


def online(family: Family, seed: int) -> list[tuple[float, float, float]]:
    """For each unseen preference: evaluations that a search from nothing took to its final reward, and the trained networks
    for the same; without and with what their training has scored."""
    made, limit, found = family.architecture(seed), family.options.paths // 2, []
    made.train(family.wanted(seed), family.options.paths, progress=False)
    assert made.found is not None
    nets, known, cost = made.found.nets, made.found.ledger.values, Settings().cost(made.pool)
    usual: dict[str, Any] = {"episodes": EPISODES * limit, "evaluations": limit, "seed": seed + 1}
    for row in np.random.default_rng([seed, 5]).dirichlet(np.ones(3), UNSEEN):
        cold = climb(partial(search_paths, made.values, made.pool, row), row, cost, **usual)
        warm = climb(partial(refine, nets, made.values, row), row, cost, **usual)
        taught = climb(partial(refine, nets, made.values, row, known=known), row, cost, **usual)
        before, level = max(float(row @ values - cost * len(path)) for path, values in known.items()), cold[-1] - 1e-9
        at = [float(np.flatnonzero(curve >= level)[0] + 1) if curve[-1] >= level else np.inf for curve in (cold, warm, taught)]
        found.append((at[0], at[1], 0.0 if before >= level else at[2]))
    return found


def show_prefixes(options: argparse.Namespace, likelihood: bool = False) -> None:
    """The same paths with and without shared beginnings, each without anything kept from before (nor answers to guess by)."""
    seed, family = options.first, Family(options, likelihood)
    made = family.architecture(seed)
    made.train(family.wanted(seed), options.paths, progress=False)
    paths, results = [path_of(t.recipe.layers) for t in made.trials if t.recipe.layers is not None], []
    for share in (True, False):
        fresh = Family(options, likelihood).architecture(seed, share).score
        model, start, scores = fresh.model, time.perf_counter(), []
        for path in paths:
            scores.append(fresh.merges.evaluator.measure(model.take(path)))
        results.append((scores, time.perf_counter() - start, model.prefixes))
    (shared, quick, prefixes), (plain, slow, _) = results
    assert prefixes is not None
    asked, done = prefixes.asked, prefixes.done
    same = all(
        a[name].value == b[name].value and np.array_equal(a[name].outcomes, b[name].outcomes)  # type: ignore[arg-type]
        for a, b in zip(shared, plain, strict=True)
        for name in a
    )
    print(
        f"{len(paths)} paths of one PPO run: {asked} layer-evaluations (tokens × layers) asked for, {done} done: "
        f"{asked / done:.2f} times fewer; {slow:.1f} s without and {quick:.1f} s with: {slow / quick:.2f} times; "
        f"all scores and outcomes equal: {same}"
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--merges", type=int, default=40)
    parser.add_argument("--paths", type=int, default=100)
    parser.add_argument("--preferences", type=int, default=16)
    parser.add_argument("--pool", type=int, default=1, help="merges whose layers a path may take")
    parser.add_argument("--rows", type=int, default=64, help="search rows of each task; all held-out rows are used")
    parser.add_argument("--arms", nargs="*", choices=ALL, default=ALL)
    parser.add_argument("--folder", type=Folder, default=Folder("hm3_runs"))
    parser.add_argument("--gains", action="store_true")
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--prefixes", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("hf_merge").setLevel(logging.ERROR)
    family, seeds = Family(options), range(options.first, options.first + options.seeds)
    rows: dict[str, list[Row]] = {arm: [] for arm in options.arms}
    for seed in seeds if options.arms else ():
        for arm in options.arms:
            rows[arm].append(family.row(arm, seed))
            print(f"seed {seed} {arm:<14} {json.dumps(rows[arm][-1])}", flush=True)
    if options.arms:
        for label, scores in family.models(options.first).items():
            print(f"{label}: {json.dumps(scores)}")
        show(rows)
    if options.gains:
        print(
            "\nthe best for a preference less the best merge for it, in shares of the way from the base to the best specialist"
        )
        print("| | on search rows | held out |\n|---|---|---|")
        for arm in options.arms:
            pairs = [family.gains(arm, seed) for seed in seeds]
            print(f"| {arm} | {' | '.join(mean(each, 4, '+') for each in zip(*pairs, strict=True))} |", flush=True)
    if options.online:
        found = np.array([online(family, seed) for seed in seeds]).reshape(-1, 3)
        print(f"\nonline, {len(found)} unseen preferences: evaluations to the final reward of a search from nothing")
        for name, values in zip(("from nothing", "trained networks", "and what they have seen"), found.T, strict=True):
            ratio = values / found[:, 0]
            print(f"{name:<24} median {np.median(values):g}, of the first {np.median(ratio):.2f}; {values.tolist()}")
    if options.prefixes:
        print("\nthe answers are generated:")
        show_prefixes(options)
        print("\ntheir likelihood is measured:")
        show_prefixes(options, likelihood=True)


if __name__ == "__main__":
    main()
