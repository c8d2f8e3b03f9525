"""What a few rows say of a merge: its accuracy, its smoothed accuracy, and models of either over the space of merges.

Uniform TIES merges of the real demo trio, each measured once on all rows (kept in `--folder`). First table: how far held-out
accuracies lie from the straight line through them that the accuracy, or the smoothed accuracy (`hf_merge.scores.smoothed`), on
so many search rows makes: the standard deviation about it. Second: a smoothed accuracy on `--rows` rows predicted from so many
other merges: the median error of a model of the margins behind it (`MarginSurrogate`) and of one of the values (`Surrogate`).
Both look at the better half of the merges, where a front is. Mean ± standard error over seeds; tasks and draws of rows are
averaged.

    python benchmarks/smoothing.py [--seeds 5] [--merges 80] [--rows 256] [--folder DIR]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from racing import Trio, mean

from hf_merge.pareto import Floats
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Scores, smoothed
from hf_merge.search.loop import search
from hf_merge.search.samplers.numbered import Cube
from hf_merge.search.samplers.surrogate import MarginSurrogate, Surrogate
from hf_merge.search.space import Space

ROWS, DRAWS, KNOWN = (64, 128, 192, 256, 512), 10, (20, 40)


def merges(trio: Trio, seed: int, count: int) -> tuple[list[Recipe], Floats]:
    """Uniform merges, and where they lie `(count, parameters)` in the unit cube."""
    space = Space(models=trio.models, base=trio.base, methods=("ties",), seed=seed)
    study = search(trio.scores, space, trio.evaluator.directions, trials=count, sampler="random", seed=seed, progress=False)
    cube = Cube({name: drawn for name, drawn in space.distributions.items() if not drawn.single()})
    params = {trial.number: trial.params for trial in study.optuna.trials}
    return [trial.recipe for trial in study.trials], np.array([cube.encode(params[t.number]) for t in study.trials])


def margins_of(scores: list[Scores], task: str) -> Floats:
    """By how much right answers lead `(merges, rows)`."""
    return np.array([each[task].margins for each in scores], dtype=np.float64)


def left(told: Floats, held_out: Floats) -> float:
    """The standard deviation of what a straight line through `told` leaves of `held_out`."""
    return float(np.std(held_out - np.polyval(np.polyfit(told, held_out, 1), told)))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--merges", type=int, default=80)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("racing_outcomes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    trio = Trio(options.folder)
    lines = np.zeros((options.seeds, len(ROWS), 2))
    models = np.zeros((options.seeds, len(KNOWN), 2))
    for seed in range(options.seeds):
        recipes, places = merges(trio, seed, options.merges)
        searched = [trio.scores(recipe) for recipe in recipes]
        held_out = [trio.scores(recipe, "held_out") for recipe in recipes]
        rng = np.random.default_rng(seed)
        for task in searched[0]:
            margins, kept = margins_of(searched, task), np.array([each[task].value for each in held_out])
            better = kept >= np.median(kept)
            for i, rows in enumerate(ROWS):
                for _ in range(DRAWS):
                    some = margins[:, rng.permutation(margins.shape[1])[:rows]]
                    both = [left(told[better], kept[better]) for told in ((some > 0).mean(1), smoothed(some).mean(1))]
                    lines[seed, i] += np.array(both) / DRAWS / len(searched[0])
            some = margins[:, rng.permutation(margins.shape[1])[: options.rows]]
            truth = smoothed(some).mean(1)
            for i, known in enumerate(KNOWN):
                unseen = np.arange(known, len(recipes))[truth[known:] >= np.median(truth)]
                made: tuple[Surrogate | MarginSurrogate, ...] = (
                    Surrogate(places[:known], truth[:known]),
                    MarginSurrogate(places[:known], some[:known], truth[:known]),
                )
                for j, model in enumerate(made):
                    missed = np.abs(model.predict(places[unseen]) - truth[unseen])
                    models[seed, i, j] += np.median(missed) / len(searched[0])
        print(f"seed {seed}", flush=True)
    print("\n| search rows | held-out accuracy about the accuracy's line | about the smoothed accuracy's |\n|---|---|---|")
    for i, rows in enumerate(ROWS):
        print(f"| {rows} | {mean(lines[:, i, 0])} | {mean(lines[:, i, 1])} |")
    print("\n| merges known | error of a model of the values | of the margins |\n|---|---|---|")
    for i, known in enumerate(KNOWN):
        print(f"| {known} | {mean(models[:, i, 0])} | {mean(models[:, i, 1])} |")


if __name__ == "__main__":
    main()
