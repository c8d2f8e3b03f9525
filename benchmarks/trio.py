"""A front of a real trio for what it costs: ours, Mergenetic's procedure and random search, on rows that no search saw.

Three specialists of one model and three metrics: BERT-tiny and accuracies (`--family classifiers`), or a small Llama, chrF and
exact matches of what it writes (`generators`). One space: TIES with a weight and a density for each model, and a scaling.
Per seed:

    mergenetic  pymoo's NSGA-II with its defaults, as Mergenetic runs it: every candidate is merged to disk, loaded with
                `from_pretrained` and measured on all search rows; nothing is kept. Our merger writes it, so that mergekit's
                speed does not count
    mergekit    the same with mergekit as the merger, as Mergenetic has it: in a process that was started before
    random      uniform points, merged in place, measured on all search rows
    <sampler>   `auto_merge`'s search with that sampler; with "+smoothed" on smoothed search rows (`Objective.smoothed`: its
                hypervolume on search rows is then one of smoothed accuracies), with "+racing" after that a candidate stops when
                it adds nothing to the front

Where answers are generated, ours checks those of earlier candidates first (`Objective.speculative`), and Mergenetic generates
each token, as it does.

All but Mergenetic's start with the parents, their average and the base, as every search of ours does, and pay for them. The
peer is spared what it does besides: it reads and tokenizes all rows anew for each candidate, and it reports the last
population only, where here the front of all that it evaluated counts.

The front of the first n evaluations is the one on search rows; its quality is the hypervolume of its held-out scores above
the reference point that the parents' search scores make. Held-out scores are measured afterwards and cost nothing. A run
reaches a level at the first n, of every fifth, whose front does ("for good": from which on all do). Seconds are the wall's,
from the first trial's start, with the sampler, the storage and the race, without reading data and models; `--cpu` takes the
process's CPU seconds, which other processes do not disturb.

Every run's evaluations are kept as JSON lines in `--folder`; the same call again goes on after the last whole run.

    pip install pymoo
    python benchmarks/trio.py --mergekit ANOTHER_VENV/bin/python [--seeds 5] [--arms map+smoothed+racing map …] [--rows 192]
    python benchmarks/trio.py --no-peer --seeds 20 --every 1 --rows 512 --raced-trials 140 --arms random random+racing
    python benchmarks/trio.py --anatomy --rows 512 --trials 40 --arms nsga2 map
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import torch
from datasets import DatasetDict
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_merge import pareto
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.generator_objectives import objectives
from hf_merge.demo.generators import GENERATORS
from hf_merge.demo.specialists import build_family
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.merging.architecture import without_bars
from hf_merge.merging.live import LiveModel
from hf_merge.pareto import Floats
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.yaml import dumps, from_dict, to_dict
from hf_merge.scores import Scores
from hf_merge.search.samplers.names import sampler
from hf_merge.search.space import Space
from hf_merge.search.trial import reference_point
from hf_merge.single import merge
from hf_merge.wiring import Searched, searched

FAMILIES = {
    "classifiers": CLASSIFIERS,
    "reseeded": replace(CLASSIFIERS, name="classifiers-reseeded", base="bert-tiny-reseeded-base", seed=1),
    "generators": GENERATORS,
}
"""The second one has other rows in each split, other heads and other training."""

MERGENETIC, MERGEKIT, OWN_GENES = "mergenetic", "mergekit", "mergenetic-own"
"""The second one's runs, or without mergekit the first one's, are what the others are measured by; the third has Mergenetic's
own genes in place of our space: weights in [0, 1] that are not divided by their sum, densities, no scaling."""

FIRST = 5
"""Recipes that every search of ours tries first: three parents, their average and the base."""

RACED = 0.4
"""Of the full search's example-evaluations: what a raced search may take for the same front."""

AT = (10, 20, 30, 40, 60, 80, 100, 150, 200)
"""Evaluations at which hypervolumes are shown."""

SPENT = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Shares of the peer's example-evaluations at which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation of a run: all maximized values, the rows it looked at, and where the clocks stood when it ended."""

    recipe: Mapping[str, Any]
    values: Sequence[float]
    examples: int
    seconds: float
    cpu: float
    stopped: bool = False

    @cached_property
    def digest(self) -> str:
        return from_dict(self.recipe).digest


Run = Sequence[Evaluated]


class Clocked(BaseSampler):
    """A sampler that looks at the clocks (wall, CPU) whenever a trial begins, which is when the one before has been stored."""

    def __init__(self, inner: BaseSampler) -> None:
        self.inner, self.looks = inner, list[tuple[float, float]]()

    def look(self) -> None:
        self.looks.append((time.perf_counter(), time.process_time()))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.look()
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)


class Trio:
    """A family, its rows, and everything that was found out about it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.family, self.options = build_family(FAMILIES[options.family], progress=False), options
        self.folder: Path = options.folder / f"{options.family}-{'-'.join(options.methods)}-{options.rows}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model_class: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]
        if self.family.family is GENERATORS:
            self.model_class, self.objectives = AutoModelForCausalLM, objectives(self.family, rows=options.rows)
            return
        self.model_class = AutoModelForSequenceClassification
        self.objectives = [
            Objective(
                name=task.name,
                dataset=DatasetDict({"search": self._rows(task.name, "search"), "held_out": self._rows(task.name, "held_out")}),
                labels=task.labels,
            )
            for task in self.family.family.tasks
        ]

    def _rows(self, task: str, split: str) -> Any:
        rows = self.family.dataset(task, split)
        return rows.select(range(min(len(rows), self.options.rows * (2 if split == "held_out" else 1))))

    def held_out(self, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Sequence[float]]:
        """The held-out values of recipes by digest, measured once each."""
        path = self.folder / "held_out.jsonl"
        known = dict(json.loads(line) for line in path.read_text().splitlines()) if path.is_file() else {}
        with path.open("a") as lines:
            for digest in recipes.keys() - known.keys():
                self.opened.score.live.load(from_dict(recipes[digest]))
                known[digest] = values(self.opened.evaluator.measure(self.opened.score.live.model, "held_out"))
                print(json.dumps([digest, known[digest]]), file=lines, flush=True)
        return known

    def search(self, folder: Path, speculative: bool = True, smoothed: bool = False, **settings: Any) -> Searched:
        """A search of ours; `speculative` and `smoothed` as in `Objective`."""
        models = list(self.family.models.values())
        objectives = [replace(each, speculative=speculative, smoothed=smoothed) for each in self.objectives]
        usual: dict[str, Any] = {"methods": self.options.methods, "folder": folder, "device": "cpu", "progress": False}
        return searched(self.family.base, models, objectives, **usual | settings)

    @cached_property
    def opened(self) -> Searched:
        """The parents, their average and the base; and what it takes to measure any other recipe, with nothing kept."""
        return self.search(self.folder / "first", speculative=False, trials=FIRST)

    @cached_property
    def mergekit(self) -> "Mergekit":
        """Started, and warm: its first merge takes longer."""
        found = Mergekit(self.options.mergekit)
        with tempfile.TemporaryDirectory() as folder:
            space = self.opened.space
            found.merge(decoded(space, np.full(len(genes(space, False)), 0.5), False), Path(folder) / "first")
        return found

    @cached_property
    def reference(self) -> Floats:
        """Of all hypervolumes."""
        parents = {recipe.digest for recipe in self.opened.space.parents().values()}
        scores = [trial.scores for trial in self.opened.study.trials if trial.recipe.digest in parents]
        return np.array(list(reference_point(scores, self.opened.evaluator.directions).values()))

    def run(self, arm: str, seed: int) -> Run:
        """The run's evaluations; from the folder, if they are there."""
        path = self.folder / f"{arm}-{seed}.jsonl"
        if not path.is_file():
            found = self._mergenetic(arm, seed) if arm in (MERGENETIC, MERGEKIT, OWN_GENES) else self._ours(arm, seed)
            unfinished = path.with_suffix(".part")
            unfinished.write_text("".join(json.dumps(asdict(each)) + "\n" for each in found))
            unfinished.replace(path)
        return [Evaluated(**json.loads(line)) for line in path.read_text().splitlines()]

    def _ours(self, arm: str, seed: int) -> Run:
        name, *with_ = arm.split("+")
        racing = "racing" in with_
        trials = (racing and self.options.raced_trials) or self.options.trials
        clocked = Clocked(sampler(name, seed=seed, trials=trials, existing=0))
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, Any] = {"trials": trials, "sampler": clocked, "seed": seed, "racing": racing}
            study = self.search(Path(folder), smoothed="smoothed" in with_, **settings).study
            clocked.look()
            tried = study.trials
        looks = np.array(clocked.looks) - clocked.looks[0]
        return [
            Evaluated(
                recipe=to_dict(trial.recipe),
                values=values(trial.scores),
                examples=examples(trial.scores),
                seconds=looks[trial.number + 1][0],
                cpu=looks[trial.number + 1][1],
                stopped=trial.stopped,
            )
            for trial in tried
        ]

    def _mergenetic(self, arm: str, seed: int) -> Run:
        evaluator, space, own, model_class = self.opened.evaluator, self.opened.space, arm == OWN_GENES, self.model_class
        kit = self.mergekit if arm == MERGEKIT else None
        elsewhere: list[float] = []
        found: list[Evaluated] = []
        start, begun = time.perf_counter(), time.process_time()

        class Candidates(ElementwiseProblem):
            def __init__(self) -> None:
                super().__init__(n_var=len(genes(space, own)), n_obj=len(evaluator.directions), xl=0.0, xu=1.0)

            def _evaluate(self, x: Floats, out: dict[str, Floats]) -> None:
                recipe = decoded(space, x, own)
                shutil.rmtree(folder, ignore_errors=True)
                if kit is None:
                    merge(recipe, folder, progress=False)
                else:
                    elsewhere.append(kit.merge(recipe, folder))
                with without_bars():
                    model = model_class.from_pretrained(folder)
                scores = evaluator.measure(model, "search")
                out["F"] = -np.array(values(scores))
                found.append(
                    Evaluated(
                        recipe=to_dict(recipe),
                        values=values(scores),
                        examples=examples(scores),
                        seconds=time.perf_counter() - start,
                        cpu=time.process_time() - begun + sum(elsewhere),
                    )
                )

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "merged"
            algorithm = NSGA2(pop_size=self.options.population)
            minimize(Candidates(), algorithm, ("n_eval", self.options.evaluations), seed=seed)
        return found[: self.options.evaluations]


class Mergekit:
    """mergekit in a process of its own that is ready to merge."""

    def __init__(self, python: Path) -> None:
        server = [str(python), str(Path(__file__).with_name("mergekit_server.py"))]
        self._process = subprocess.Popen(
            server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def merge(self, recipe: Recipe, folder: Path) -> float:
        """Merges into a folder; the CPU seconds of its process. Raises `RuntimeError` if mergekit does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        file = folder.with_suffix(".yaml")
        file.write_text(dumps(recipe))
        print(json.dumps([str(file), str(folder)]), file=self._process.stdin, flush=True)
        error, seconds = json.loads(self._process.stdout.readline())
        if error is not None:
            raise RuntimeError(error)
        return float(seconds)


def genes(space: Space, own: bool) -> list[str]:
    """What pymoo searches."""
    return [name for name, drawn in space.distributions.items() if not drawn.single() and not (own and name == "scaling")]


def decoded(space: Space, x: Floats, own: bool) -> Recipe:
    """The recipe at a point of the unit cube. Weights of Mergenetic's own genes are not divided by their sum."""
    params: dict[str, Any] = {"method": space.methods[0]}
    for name, value in zip(genes(space, own), x, strict=True):
        drawn = space.distributions[name]
        if isinstance(drawn, CategoricalDistribution):
            params[name] = drawn.choices[min(int(value * len(drawn.choices)), len(drawn.choices) - 1)]
        else:
            params[name] = drawn.low + value * (drawn.high - drawn.low)  # type: ignore[attr-defined]
    if own:
        params["scaling"] = sum(value for name, value in params.items() if name.startswith("weight."))
    return space.recipe(params)


def values(scores: Scores) -> list[float]:
    """The scores' values."""
    return [score.value for score in scores.values()]


def examples(scores: Scores) -> int:
    """Example-evaluations behind scores."""
    return sum(score.examples for score in scores.values())


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run as it went, after every few of its `evaluations` `(n,)`: hypervolume on each split, example-evaluations, wall and
    CPU seconds."""

    evaluations: Floats
    search: Floats
    held_out: Floats
    examples: Floats
    seconds: Floats
    cpu: Floats

    def reached(self, level: float, for_good: bool = False) -> int | None:
        """The place where the held-out hypervolume is at this level for the first time; None if it never is."""
        above = self.held_out >= level - 1e-12
        if for_good:
            above = np.logical_and.accumulate(above[::-1])[::-1]
        return int(above.argmax()) if above.any() else None


def front(run: Run) -> list[Evaluated]:
    """Of what was measured whole what nothing dominates."""
    whole = [each for each in run if not each.stopped]
    kept = pareto.non_dominated([each.values for each in whole])
    return [each for each, keep in zip(whole, kept, strict=True) if keep]


def curve(trio: Trio, run: Run) -> Curve:
    """Measures on held-out rows what was on the front after every few evaluations."""
    evaluations = range(trio.options.every, len(run) + 1, trio.options.every)
    found = [front(run[:n]) for n in evaluations]
    held_out = trio.held_out({each.digest: each.recipe for each in chain.from_iterable(found)})
    return Curve(
        evaluations=np.array(evaluations),
        search=np.array([pareto.hypervolume([each.values for each in kept], trio.reference) for kept in found]),
        held_out=np.array([pareto.hypervolume([held_out[each.digest] for each in kept], trio.reference) for kept in found]),
        examples=np.array([sum(each.examples for each in run[:n]) for n in evaluations]),
        seconds=np.array([run[n - 1].seconds for n in evaluations]),
        cpu=np.array([run[n - 1].cpu for n in evaluations]),
    )


Curves = Mapping[str, Sequence[Curve]]
"""By arm, one for each seed."""


def mean(found: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error."""
    error = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.nan
    return f"{np.mean(found):.{digits}f} ± {error:.{digits}f}"


def show_curves(curves: Curves, peer: str) -> None:
    """Hypervolumes after so many evaluations, as a share of the peer's last one of the same seed, mean ± s.e."""
    last = [each.held_out[-1] for each in curves[peer]]
    print(f"\nheld-out hypervolume over that of {peer}'s whole run of the same seed, after so many evaluations")
    print("| run | " + " | ".join(map(str, AT)) + " |\n" + "|---" * (len(AT) + 1) + "|")
    for arm, found in curves.items():
        cells = [
            mean([each.held_out[each.evaluations == n][0] / level for each, level in zip(found, last, strict=True)])
            if all(n in each.evaluations for each in found)
            else ""
            for n in AT
        ]
        print(f"| {arm} | {' | '.join(cells)} |")


def show_spent(curves: Curves, peer: str) -> None:
    """Hypervolumes when so much of the peer's example-evaluations has been spent, as a share of its last one of the same seed,
    mean ± s.e."""
    print(f"\nthe same after so much of {peer}'s example-evaluations")
    print("| run | " + " | ".join(f"{share:.0%}" for share in SPENT) + " |\n" + "|---" * (len(SPENT) + 1) + "|")
    for arm, found in curves.items():
        cells = []
        for share in SPENT:
            pairs = [(each, other, share * other.examples[-1]) for each, other in zip(found, curves[peer], strict=True)]
            enough = all(each.examples[0] <= spent <= each.examples[-1] for each, _, spent in pairs)
            levels = [each.held_out[(each.examples <= spent).sum() - 1] / other.held_out[-1] for each, other, spent in pairs]
            cells.append(mean(levels) if enough else "")
        print(f"| {arm} | {' | '.join(cells)} |")


def show_reached(curves: Curves, peer: str, for_good: bool, clock: str) -> None:
    """What each run took to the peer's last held-out hypervolume of the same seed, and the ratios, one by one."""
    print(f"\nuntil {peer}'s held-out hypervolume is reached{' for good' if for_good else ''}, seed by seed (- never)")
    print("| run | evaluations | example-evaluations over its | mean ± s.e. | seconds over its | mean ± s.e. |")
    print("|---|---|---|---|---|---|")
    for arm, found in curves.items():
        at, shares, times = [], list[float](), list[float]()
        for each, other in zip(found, curves[peer], strict=True):
            n = each.reached(other.held_out[-1], for_good)
            at.append("-" if n is None else str(each.evaluations[n]))
            shares.append(np.inf if n is None else float(each.examples[n] / other.examples[-1]))
            times.append(np.inf if n is None else float(getattr(each, clock)[n] / getattr(other, clock)[-1]))
        cells = [
            f"{' '.join(f'{v:.2f}' for v in row)} | {mean(row) if np.isfinite(row).all() else '-'}" for row in (shares, times)
        ]
        print(f"| {arm} | {' '.join(at)} | {' | '.join(cells)} |")


def show_racing(curves: Curves) -> None:
    """Racing alone: the same sampler with it and without it, after the same number of candidates, and where the raced search
    has gone on until `RACED` of the full one's example-evaluations are spent."""
    print("\nhypervolume of the raced search over that of the full one, less 1; costs of the raced over the full one's")
    print("| racing alone | until | held out | on search rows | evaluations | example-evaluations | seconds | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in [arm for arm in curves if f"{arm}+racing" in curves]:
        pairs = list(zip(curves[arm], curves[f"{arm}+racing"], strict=True))
        same = [int(np.flatnonzero(raced.evaluations == full.evaluations[-1])[0]) for full, raced in pairs]
        spent = [int((raced.examples <= RACED * full.examples[-1]).sum()) - 1 for full, raced in pairs]
        for until, places in (("as many candidates", same), (f"{RACED:.0%} of its examples", spent)):
            cells = []
            for what in ("held_out", "search", "evaluations", "examples", "seconds", "cpu"):
                ratios = [
                    getattr(raced, what)[n] / getattr(full, what)[-1] for (full, raced), n in zip(pairs, places, strict=True)
                ]
                less = what in ("held_out", "search")
                cells.append(mean([ratio - 1 if less else ratio for ratio in ratios], 4 if less else 3))
            print(f"| {arm} | {until} | {' | '.join(cells)} |")


def show_costs(curves: Curves, peer: str) -> None:
    """What an evaluation takes."""
    print("\n| run | evaluations | ms an evaluation | CPU ms | share of rows looked at | search hypervolume | held out |")
    print("|---|---|---|---|---|---|---|")
    for arm, found in curves.items():
        n, first = found[0].evaluations[-1], curves[peer][0]
        whole = first.examples[-1] / first.evaluations[-1]
        cells = [mean([1000 * getattr(each, clock)[-1] / n for each in found], 0) for clock in ("seconds", "cpu")]
        cells += [mean([each.examples[-1] / n / whole for each in found])]
        cells += [mean([getattr(each, split)[-1] for each in found], 4) for split in ("search", "held_out")]
        print(f"| {arm} | {n} | {' | '.join(cells)} |")


@contextmanager
def timed(owner: type, method: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """The seconds of each call of a class's method meanwhile."""
    found, plain = list[float](), getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return plain(*args, **kwargs)
        finally:
            found.append(clock() - start)

    setattr(owner, method, call)
    try:
        yield found
    finally:
        setattr(owner, method, plain)


def anatomy(trio: Trio) -> None:
    """Where the time of a trial that is measured whole goes: the merge in place, the evaluation, and all the rest (sampler,
    storage, files). The first recipes, which no sampler draws, are left out."""
    now, clock = (time.process_time, 1) if trio.options.cpu else (time.perf_counter, 0)
    print(f"{trio.options.rows} rows a task, {', '.join(trio.options.methods)}")
    print("| sampler | trials | ms a trial | merge | evaluate | bookkeeping |\n|---|---|---|---|---|---|")
    for arm in trio.options.arms:
        trials = trio.options.trials
        clocked = Clocked(sampler(arm, seed=0, trials=trials, existing=0))
        with (
            tempfile.TemporaryDirectory() as folder,
            timed(LiveModel, "load", now) as merges,
            timed(Evaluator, "measure", now) as measurements,
        ):
            trio.search(Path(folder), speculative=False, trials=trials, sampler=clocked)
            clocked.look()
        merged, measured = sum(merges[FIRST:]), sum(measurements[FIRST:])
        whole = clocked.looks[-1][clock] - clocked.looks[FIRST][clock]
        parts = [part / whole for part in (merged, measured, whole - merged - measured)]
        cells = " | ".join(f"{part:.1%}" for part in parts)
        print(f"| {arm} | {trials} | {1000 * whole / (trials - FIRST):.0f} | {cells} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=["nsga2+racing", "nsga2", "map+racing", "random"])
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment with mergekit")
    parser.add_argument("--rows", type=int, default=192, help="search rows of each task; twice as many are held out")
    parser.add_argument("--population", type=int, default=10, help="pymoo's; Mergenetic's examples have 7 to 20")
    parser.add_argument("--evaluations", type=int, default=200, help="of mergenetic")
    parser.add_argument("--trials", type=int, default=100, help="of each other run")
    parser.add_argument("--raced-trials", type=int, help="of each run with racing, if they are more")
    parser.add_argument("--no-peer", action="store_true", help="racing alone: no runs of Mergenetic's")
    parser.add_argument("--every", type=int, default=5, help="evaluations between two looks at a front")
    parser.add_argument("--methods", nargs="+", default=["ties"])
    parser.add_argument("--family", choices=FAMILIES, default="classifiers")
    parser.add_argument("--folder", type=Path, default=Path("trio_runs"))
    parser.add_argument("--cpu", action="store_true", help="CPU seconds in place of the wall's")
    parser.add_argument("--anatomy", action="store_true", help="where a trial's time goes, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("hf_merge").setLevel(logging.ERROR)
    trio = Trio(options)
    if options.anatomy:
        anatomy(trio)
        return
    peer = MERGEKIT if options.mergekit else MERGENETIC
    arms = list(dict.fromkeys([*([] if options.no_peer else [peer]), *options.arms]))
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in range(options.first, options.first + options.seeds):
        for arm in arms:
            start = time.perf_counter()
            curves[arm].append(curve(trio, trio.run(arm, seed)))
            last = curves[arm][-1]
            print(
                f"seed {seed} {arm:<18} {last.search[-1]:.4f} on search rows, {last.held_out[-1]:.4f} held out, "
                f"{last.examples[-1]:.0f} examples, {last.seconds[-1]:.0f} s ({time.perf_counter() - start:.0f} s in all)",
                flush=True,
            )
    show_racing(curves)
    if options.no_peer:
        return
    show_curves(curves, peer)
    show_spent(curves, peer)
    for for_good in (False, True):
        show_reached(curves, peer, for_good, "cpu" if options.cpu else "seconds")
    show_costs(curves, peer)


if __name__ == "__main__":
    main()
