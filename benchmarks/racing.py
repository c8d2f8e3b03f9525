"""Racing alone, on the real demo trio: the front with it and without it, and the example-evaluations that each takes.

Three ways for each seed, with the same sampler and number of trials: every candidate on all search rows (full); the very same
candidates, raced (replayed); and a search of its own that is told the estimates of stopped candidates (raced). The parents,
their average and the base are always measured whole. Each recipe's outcomes on all rows are measured once and kept in
`--folder`; races are played on them and count the rows that they looked at, which are those that `Evaluator.rounds` would run.
So it is known as well what a stopped candidate would have gained.

Reported are the hypervolume of the front on search rows and on held-out rows, the share of example-evaluations, how many
candidates were stopped and what each would have gained then, summed, as a share of the front's hypervolume; the errors of the
estimates that a sampler is told against those of the plain mean of the same rows; and, for each share of the rows, the errors
of an item bank of the first half of each full search, of the regressions that racing uses (of right and wrong, of margins) and
of the plain mean on the second half.

    python benchmarks/racing.py [--seeds 5] [--first 0] [--trials 60] [--worth 1] [--folder DIR]
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from numpy.typing import NDArray

from hf_merge import pareto
from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.specialists import build_family
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.rounds import SHARES, race_order
from hf_merge.merging.architecture import known_config
from hf_merge.merging.live import LiveModel, load_tokenizer
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score, Scores, load_scores, save_scores
from hf_merge.search.item_bank import ItemBank
from hf_merge.search.loop import search
from hf_merge.search.racing import WORTH, Racing, predicted_mean, predicted_share, race
from hf_merge.search.space import Space
from hf_merge.search.trial import Split

Floats = NDArray[np.float64]

COLUMNS = (
    "full search",
    "full held out",
    *(f"{way} {what}" for way in ("replayed", "raced") for what in ("search", "held out", "examples", "stopped", "missed")),
)


class Trio:
    """The demo's three specialists, their base, and what any recipe of them scores."""

    def __init__(self, folder: Path) -> None:
        family = build_family(CLASSIFIERS, progress=False)
        splits: tuple[Split, Split] = ("search", "held_out")
        self.data = {
            task.name: DatasetDict({split: family.dataset(task.name, split) for split in splits})
            for task in family.family.tasks
        }
        self.base, self.folder = ModelRef(str(family.base)), folder
        self.models = tuple(RecipeModel(ref=ModelRef(str(path))) for path in family.models.values())
        api = hub_api(None)
        opened = {ref: Checkpoint(ref, api) for ref in (self.base, *(model.ref for model in self.models))}
        primary = opened[self.models[0].ref]
        self.live = LiveModel(Recipe(method="linear", models=self.models[:1]), opened)
        self.evaluator = Evaluator(
            [Objective(name=task.name, dataset=self.data[task.name], labels=task.labels) for task in family.family.tasks],
            tokenizer=load_tokenizer(primary),
            config=known_config(primary),
            progress=False,
        )

    def scores(self, recipe: Recipe, split: Split = "search") -> Scores:
        """All outcomes, measured once for each recipe."""
        path = self.folder / split / f"{recipe.digest}.npz"
        found: Scores = load_scores(path)
        if not found:
            self.live.load(recipe)
            found = self.evaluator.measure(self.live.model, split)
            save_scores(path, found)
        return found

    def rounds(self, recipe: Recipe, seed: int, priorities: Mapping[str, Floats]) -> Iterator[Scores]:
        """What `Evaluator.rounds` gives, played on the outcomes."""
        whole = self.scores(recipe)
        orders = {}
        for name, splits in self.data.items():
            _, classes = np.unique(splits["search"]["label"], return_inverse=True)
            orders[name] = race_order(classes, seed, priorities.get(name))
        for share in SHARES:
            yield {name: part(score, orders[name][: round(share * score.examples)]) for name, score in whole.items()}
        yield whole


def part(score: Score, rows: np.ndarray) -> Score:
    """An accuracy on some of the rows."""
    assert score.outcomes is not None
    assert score.margins is not None
    outcomes = score.outcomes[rows]
    return Score(value=float(outcomes.mean()), examples=len(rows), outcomes=outcomes, margins=score.margins[rows], rows=rows)


class Raced:
    """A scorer that races every recipe but the first ones against all that was measured whole."""

    def __init__(self, trio: Trio, racing: Racing, reference: Floats, always: set[str], seed: int) -> None:
        self.trio, self.racing, self.reference, self.always, self.seed = trio, racing, reference, always, seed
        self.whole: list[Scores] = []
        self.recipes: list[Recipe] = []
        self.stopped: list[tuple[Scores, Scores]] = []
        self.missed, self.examples = 0.0, 0

    def __call__(self, recipe: Recipe) -> Scores:
        rivals = [] if recipe.digest in self.always else self.whole
        rounds = self.trio.rounds(recipe, self.seed, self.racing.priorities(rivals))
        scores, stopped = race(rounds, self.racing, rivals, tried=len(self.whole) + len(self.stopped))
        self.examples += examples(scores)
        if not stopped:
            self.whole.append(scores)
            self.recipes.append(recipe)
            return scores
        truth = self.trio.scores(recipe)
        self.stopped.append((scores, truth))
        before, after = (pareto.hypervolume(points(whole), self.reference) for whole in (rivals, [*rivals, truth]))
        self.missed += after / before - 1
        return scores


def points(scores: Sequence[Scores]) -> Floats:
    """Values `(n, m)`, all maximized."""
    return np.array([[score.value for score in each.values()] for each in scores])


def examples(scores: Scores) -> int:
    """Example-evaluations behind scores."""
    return sum(score.examples for score in scores.values())


def volumes(trio: Trio, recipes: Sequence[Recipe], reference: Floats) -> list[float]:
    """Hypervolume of the front of some recipes, on search rows and on held-out rows."""
    found = points([trio.scores(recipe) for recipe in recipes])
    front = [recipe for recipe, kept in zip(recipes, pareto.non_dominated(found), strict=True) if kept]
    held_out = points([trio.scores(recipe, "held_out") for recipe in front])
    return [pareto.hypervolume(found, reference), pareto.hypervolume(held_out, reference)]


def compare(
    trio: Trio, seed: int, options: argparse.Namespace
) -> tuple[list[float], list[Scores], list[tuple[Scores, Scores]]]:
    """One seed: a row of the table, the full search's scores, and the stopped candidates' estimated and true scores."""
    space = Space(models=trio.models, base=trio.base, seed=seed)
    base = {"base": Recipe(method="linear", models=(RecipeModel(ref=trio.base),), dtype=space.dtype, seed=seed)}
    directions = trio.evaluator.directions
    full = search(trio.scores, space, directions, trials=options.trials, seed=seed, seeds=base, progress=False)
    measured = [trio.scores(trial.recipe) for trial in full.trials]
    first = {recipe.digest for recipe in (*space.seeds().values(), *base.values())}
    corner = np.array([full.reference[name] for name in directions])
    racing = Racing(directions, full.reference, worth=options.worth)
    replayed, raced = (Raced(trio, racing, corner, first, seed) for _ in range(2))
    for trial in full.trials:
        replayed(trial.recipe)
    search(raced, space, directions, trials=options.trials, seed=seed, seeds=base, progress=False)
    row = volumes(trio, [trial.recipe for trial in full.trials], corner)
    for way in (replayed, raced):
        row += [*volumes(trio, way.recipes, corner), way.examples / sum(map(examples, measured)), len(way.stopped), way.missed]
    return row, measured, replayed.stopped + raced.stopped


def estimates(measured: Sequence[Scores], share: float) -> Floats:
    """Errors of an item bank, of the regressions of outcomes and of margins, and of the plain mean, `(candidates x objectives,
    4)`, on a search's second half, from as many rows as `share` says; the first half is what they know."""
    half, errors = len(measured) // 2, []
    for name in measured[0]:
        outcomes = np.array([scores[name].outcomes for scores in measured], dtype=np.float64)
        margins = np.array([scores[name].margins for scores in measured], dtype=np.float64)
        drawn = race_order([""] * outcomes.shape[1], 0)[: round(share * outcomes.shape[1])]
        bank = ItemBank.fit(outcomes[:half])
        chosen = bank.choose(len(drawn))
        for each, leads in zip(outcomes[half:], margins[half:], strict=True):
            told = (
                bank.estimate(chosen, each[chosen]),
                predicted_mean(each[drawn], drawn, outcomes[:half])[0],
                predicted_share(each[drawn], leads[drawn], drawn, margins[:half])[0],
                each[drawn].mean(),
            )
            errors.append(np.array(told) - each.mean())
    return np.array(errors)


def mean(values: Floats) -> str:
    """Mean ± standard error."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def rms(values: Floats) -> str:
    """Root mean square."""
    return f"{np.sqrt(np.mean(np.square(values))):.4f}"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--worth", type=float, default=WORTH)
    parser.add_argument("--folder", type=Path, default=Path("racing_outcomes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, trio = time.perf_counter(), Trio(options.folder)
    rows, measured, stopped = [], [], []
    print("seed", *(f"{label:>18}" for label in COLUMNS), sep="", flush=True)
    for seed in range(options.first, options.first + options.seeds):
        row, scores, ended = compare(trio, seed, options)
        print(f"{seed:<4}", *(f"{value:18.4f}" for value in row), sep="", flush=True)
        rows.append(row)
        measured.append(scores)
        stopped += ended
    table = dict(zip(COLUMNS, np.array(rows).T, strict=True))
    for label, column in table.items():
        print(f"{label:<28}{mean(column)}")
    for way in ("replayed", "raced"):
        for split in ("search", "held out"):
            print(f"{f'{way} / full, {split}':<28}{mean(table[f'{way} {split}'] / table[f'full {split}'])}")
    told = np.array([[e[name].value - t[name].value for name in e] for e, t in stopped])
    plain = np.array([[np.mean(np.asarray(e[name].outcomes)) - t[name].value for name in e] for e, t in stopped])
    print(
        f"error of the estimates of {len(stopped)} stopped candidates {rms(told)}; of the plain mean of their rows {rms(plain)}"
    )
    for share in (1 / 32, *SHARES):
        found = np.concatenate([estimates(scores, share) for scores in measured])
        bank, regression, by_margins, average = map(rms, found.T)
        print(
            f"{share:.3f} of the rows: error of an item bank {bank}, of the regression {regression}, "
            f"of margins {by_margins}, of their mean {average}"
        )
    print(f"{options.seeds} seeds, {options.trials} trials, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
