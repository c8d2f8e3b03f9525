"""What guessing answers saves: candidates of a search, measured with and without it, side by side.

The demo's generative family (a small Llama; chrF and exact matches of what it writes), candidates drawn at random as
`auto_merge` draws them. Every candidate is measured twice in turn: with `Objective.speculative`, where answers of the
candidates before it are checked first, and with every token generated. The first ones, of which there is little to guess by,
count as well.

    python benchmarks/speculation.py [--rows 64] [--candidates 60] [--seed 0] [--cpu]
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_merge.demo.generator_objectives import objectives
from hf_merge.demo.generators import GENERATORS
from hf_merge.demo.specialists import build_family
from hf_merge.evaluation.measure import Evaluator
from hf_merge.wiring import searched


def main() -> None:
    """Prints medians, the ratio of the sums, and whether all outcomes are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of each task")
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds in place of the wall's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    built, now = build_family(GENERATORS, progress=False), time.process_time if options.cpu else time.perf_counter
    wanted = objectives(built, rows=options.rows)
    with tempfile.TemporaryDirectory() as folder:
        found = searched(
            built.base,
            list(built.models.values()),
            wanted,
            sampler="random",
            trials=options.candidates,
            seed=options.seed,
            folder=Path(folder),
            device="cpu",
            progress=False,
        )
        live, tokenizer = found.score.live, AutoTokenizer.from_pretrained(built.base)
        evaluators = {
            speculative: Evaluator(
                [replace(each, speculative=speculative) for each in wanted],
                config=live.model.config,
                tokenizer=tokenizer,
                device="cpu",
                progress=False,
            )
            for speculative in (True, False)
        }
        seconds: dict[bool, list[float]] = {True: [], False: []}
        recipes, equal = [trial.recipe for trial in found.study.trials], True
        for recipe in recipes:
            live.load(recipe)
            scores = []
            for speculative, evaluator in evaluators.items():
                start = now()
                scores.append(evaluator.measure(live.model))
                seconds[speculative].append(now() - start)
            pairs = zip(*(each.values() for each in scores), strict=True)
            equal &= all(np.array_equal(first.outcomes, second.outcomes) for first, second in pairs)
    guessed, plain = (1000 * np.median(seconds[speculative]) for speculative in (True, False))
    print(
        f"{len(recipes)} candidates, {options.rows} rows a task: {plain:.0f} ms where each token is generated, "
        f"{guessed:.0f} ms where answers are guessed (medians); all in all "
        f"{sum(seconds[True]) / sum(seconds[False]):.2f} of the time; all outcomes equal: {equal}"
    )


if __name__ == "__main__":
    main()
