"""The command line: thin over the public functions, each command importing only what it needs."""

import argparse
import gc
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_merge.errors import HfMergeError, RecipeError
from hf_merge.version import __version__

EPILOG = """\
A recipe is a YAML file as mergekit writes them:

  merge_method: ties
  base_model: org/base
  models:
    - model: org/math
      parameters: {weight: 0.6, density: 0.3}
    - model: org/code@v2
      parameters: {weight: 0.4, density: 0.3}
  dtype: bfloat16

A study is a YAML file with what `auto_merge` takes:

  base: org/base
  models: [org/math, org/code]
  objectives:
    - {name: math, task: text-generation, dataset: org/sums, metric: exact_match, input: question, target: answer}
    - {name: text, task: language-modeling, dataset: notes.jsonl}
  trials: 100

Exit codes: 0 done, 1 something is wrong with what was given or found (the message says what), 2 wrong usage, 130 interrupted.
"""


def run() -> int:
    """`main` as a process of its own, which spends no time on looking for garbage among what lives as long as it does: the
    modules that it imports, at the start and once more at the end."""
    gc.set_threshold(100_000)
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        answer = options.run(options)
    except HfMergeError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    print(json.dumps(answer[1], indent=1) if options.json else answer[0])
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    top = argparse.ArgumentParser(
        prog="hf-merge",
        description="Merge fine-tunes of one base model, find the Pareto front of the merges, publish any point of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"hf_merge {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], tuple[str, Any]], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.add_argument("--json", action="store_true", help="print the answer as JSON, for machines")
        added.add_argument("--quiet", action="store_true", help="no progress bars")
        added.set_defaults(run=run)
        return added

    checked = command("check", _check, "Say from headers alone what a recipe would merge, and every mismatch.")
    checked.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    _pickles(checked)

    merged = command("merge", _merge, "Merge a recipe into a folder, or straight to a repository on the Hub.")
    merged.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    merged.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for the result")
    merged.add_argument("--push-to", metavar="ID", help="repository on the Hub, in place of OUT")
    merged.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    merged.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 2GB (default: %(default)s)")
    merged.add_argument("--max-memory", metavar="SIZE", help="bound of the source tensors in memory at once, such as 500MB")
    _pickles(merged)
    merged.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    _consent(merged)

    adapters = command("adapters", _adapters, "Merge a recipe of LoRA adapters into one adapter.")
    adapters.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    adapters.add_argument("out", type=Path, metavar="OUT", help="folder for the result")
    adapters.add_argument("--rank", type=int, metavar="R", help="truncate to this rank (default: exact, the sum of the ranks)")

    auto = command("auto", _auto, "Search the merges of a study's models for the Pareto front of its objectives.")
    auto.add_argument("study", type=Path, metavar="STUDY.yaml")
    auto.add_argument("--trials", type=int, metavar="N", help="recipes to evaluate, in place of the study's number")
    auto.add_argument("--folder", type=Path, metavar="DIR", help="where the run is kept, in place of the study's folder")
    auto.add_argument("--push-to", metavar="ID", help="publish the chosen point to this repository at the end")
    _shared(auto)

    worker = command("worker", _worker, "Work on a study together with other processes, until its recipes are evaluated.")
    worker.add_argument("study", type=Path, metavar="STUDY.yaml", help="the same for all workers")
    worker.add_argument("--trials", type=int, metavar="N", help="recipes to evaluate, in place of the study's number")
    worker.add_argument("--folder", type=Path, metavar="DIR", help="where this worker keeps its scores")
    worker.add_argument("--device", metavar="NAME", help="this worker's device, such as cuda:1")
    _shared(worker)

    shown = command("front", _front, "Show the front of a finished run.")
    shown.add_argument("folder", type=Path, metavar="DIR")
    shown.add_argument("--plot", type=Path, metavar="FILE.png", help="write the picture to this file as well")

    pushed = command("push", _push, "Publish a point of a run's front, with its card.")
    pushed.add_argument("folder", type=Path, metavar="DIR")
    pushed.add_argument("repo_id", metavar="ID")
    pushed.add_argument("--trial", type=int, metavar="N", help="this trial")
    pushed.add_argument("--objective", metavar="NAME", help="the point that is best in this objective")
    pushed.add_argument("--prefer", nargs="+", metavar="NAME=WEIGHT", help="the point for these weights; default: the knee")
    pushed.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    _consent(pushed)

    demo = command("demo", _demo, "Everything once, for real, against a Hub of its own on this machine (needs hf_merge[demo]).")
    demo.add_argument("--trials", type=int, default=30, metavar="N", help="recipes to evaluate (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default: %(default)s)")
    demo.add_argument(
        "--folder", type=Path, default=Path("demo_run"), metavar="DIR", help="where all is kept (default: %(default)s)"
    )
    demo.add_argument("--cards", type=Path, metavar="DIR", help="copy the card and its picture into this folder")
    return top


def _shared(to: argparse.ArgumentParser) -> None:
    to.add_argument("--storage", metavar="URL", help="where the study is, such as postgresql://user@host/name")
    to.add_argument("--study", metavar="NAME", dest="study_name", help="its name there (default: hf_merge)")


def _pickles(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--pickles", action="store_true", help="read pickled weights, without running code, if a model has no others"
    )


def _consent(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--consent",
        action="store_true",
        help="agree to publish under parents' licenses that forbid commercial use or derived works",
    )


def _check(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.single import check

    compiled = check(options.recipe, pickles=options.pickles)
    return str(compiled), compiled.to_dict()


def _merge(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.single import merge

    done = merge(
        options.recipe,
        options.out,
        push_to=options.push_to,
        private=options.private,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        max_memory=options.max_memory,
        pickles=options.pickles,
        consent=options.consent,
        progress=not options.quiet,
    )
    return f"{done.plan}\nDone in {done.seconds:.1f} s: {done.where}", {**done.plan.to_dict(), "where": done.where}


def _adapters(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.adapters import merge_adapters

    report = merge_adapters(options.recipe, options.out, rank=options.rank)
    return str(report), {"where": str(report.folder), "modules": len(report.modules), "error": report.error}


def _auto(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.auto import auto_merge, study_arguments

    study = _study(options, "trials", "folder", "push_to", "storage", "study_name")
    result = auto_merge(**study_arguments(study), progress=not options.quiet)
    return repr(result), result.to_dict()


def _worker(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.auto import join

    study = _study(options, "trials", "folder", "device", "storage", "study_name")
    if "storage" not in study:
        raise RecipeError("Workers need a storage that all of them reach: give --storage, such as postgresql://user@host/name.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended hands its recipe back
    done = join(study, study["storage"], study.get("study_name", "hf_merge"), progress=not options.quiet)
    return repr(done), {"study": done.optuna.study_name, "evaluated": done.evaluated, "front": [t.number for t in done.front]}


def _study(options: argparse.Namespace, *over: str) -> dict[str, Any]:
    """What a study's file holds, but for what the command line says."""
    from hf_merge.recipes.yaml import load_mapping, read

    given = {name: getattr(options, name) for name in over}
    return load_mapping(read(options.study)) | {name: value for name, value in given.items() if value is not None}


def _front(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.result import MergeResult

    result = MergeResult.load(options.folder)
    if options.plot:
        result.plot().savefig(options.plot)
    return repr(result), result.to_dict()


def _push(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.result import MergeResult

    where = MergeResult.load(options.folder).push_to_hub(
        options.repo_id,
        trial=options.trial,
        preference=_weights(options.prefer) if options.prefer else "knee",
        objective=options.objective,
        private=options.private,
        consent=options.consent,
        progress=not options.quiet,
    )
    return f"Published: {where}", {"where": where}


def _demo(options: argparse.Namespace) -> tuple[str, Any]:
    from hf_merge.demo.walk import walk

    found = walk(
        options.folder,
        trials=options.trials,
        seed=options.seed,
        cards=options.cards,
        progress=not options.quiet,
        tell_to=sys.stderr if options.json else None,
    )
    return "The demo is done.", found


def _weights(given: Sequence[str]) -> dict[str, float]:
    pairs = [entry.rpartition("=") for entry in given]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError as error:
        raise RecipeError(f"A preference is given as NAME=WEIGHT …, got {' '.join(given)!r}.") from error


if __name__ == "__main__":
    sys.exit(run())
