"""How much faster several workers search one study than one: evaluations per second of single-threaded trials.

    OMP_NUM_THREADS=1 python benchmarks/workers.py --workers 1 2
    OMP_NUM_THREADS=1 python benchmarks/workers.py --workers 1 2 4 --storage postgresql://user@host/name

A trial multiplies matrices on one thread until it has had `--seconds` of processor time; the rest is what the search and its
storage cost. Throughput counts from the first evaluation's start to the last one's end, in repeats that alternate, so that
another load on the machine hits all alike. Perfect scaling is the number of workers, up to the number of free cores.
"""

import argparse
import multiprocessing
import multiprocessing.synchronize
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import torch

from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score, Scores
from hf_merge.search.loop import search
from hf_merge.search.space import Space
from hf_merge.search.study import Study


def score(recipe: Recipe, seconds: float) -> Scores:
    """Two tasks, each solved by one of two models, after some honest work."""
    matrix = torch.rand(256, 256)
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        matrix = torch.tanh(matrix @ matrix)
    weights = dict(zip((m.name for m in recipe.models), recipe.arguments()["weights"], strict=True))
    x, y = weights.get("x", 0.0), weights.get("y", 0.0)
    values = {"x": 1 - ((1 - x) ** 2 + y**2) / 2, "y": 1 - (x**2 + (1 - y) ** 2) / 2}
    return {name: Score(value=value, examples=1) for name, value in values.items()}


def work(storage: str, study: str, trials: int, seconds: float, ready: "multiprocessing.synchronize.Barrier") -> None:
    """One worker, once all of them have started."""
    torch.set_num_threads(1)
    space = Space(models=("lab/x", "lab/y"), base="lab/base")  # type: ignore[arg-type]
    directions = {"x": "maximize", "y": "maximize"}
    ready.wait()
    search(
        lambda recipe: score(recipe, seconds),
        space,
        directions,
        trials=trials,
        storage=storage,
        study_name=study,
        shared=True,
        progress=False,
    )


def throughput(workers: int, storage: str, trials: int, seconds: float) -> float:
    """Evaluations per second."""
    context = multiprocessing.get_context("spawn")
    study, ready = uuid.uuid4().hex, context.Barrier(workers)
    processes = [context.Process(target=work, args=(storage, study, trials, seconds, ready)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = Study.load(storage, study)
    assert found.evaluated == trials
    ran = [t for t in found.optuna.trials if t.user_attrs.get("seconds")]
    began = [t.datetime_start.timestamp() for t in ran if t.datetime_start is not None]
    ended = [t.datetime_complete.timestamp() for t in ran if t.datetime_complete is not None]
    return trials / (max(ended) - min(began))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options.add_argument("--storage", help="a database's URL (default: SQLite in a temporary folder)")
    options.add_argument("--trials", type=int, default=24)
    options.add_argument("--seconds", type=float, default=1.0, help="of processor time for each trial (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = given.storage or f"sqlite:///{Path(folder) / 'study.db'}"
        found: dict[int, list[float]] = {workers: [] for workers in given.workers}
        for _ in range(given.repeats):
            for workers, rates in found.items():
                rates.append(throughput(workers, storage, given.trials, given.seconds))
    alone = statistics.median(found[given.workers[0]])
    print("| workers | evaluations per second | times one |\n|---|---|---|")
    for workers, rates in found.items():
        median = statistics.median(rates)
        print(f"| {workers} | {median:.2f} ({min(rates):.2f} to {max(rates):.2f}) | {median / alone:.2f} |")


if __name__ == "__main__":
    main()
