"""Whether the same recipe gives the same model here and in mergekit 0.1.5: a table, and the stored results of the tests.

    python benchmarks/parity.py --mergekit /path/to/another/venv/bin/mergekit-yaml --out benchmarks/PARITY.md
    python benchmarks/parity.py --mergekit /path/to/another/venv/bin/mergekit-yaml --golden

The inputs are real models (from packages of PyPI, and the demo's, which are trained once) and generated ones with odd shapes,
in float32. Each recipe is one file in mergekit's YAML, merged by `mergekit-yaml` and by `hf_merge.merge`. `--golden` writes
what tests/parity compares with. Both sides use one thread of torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parity_models
import parity_random
import parity_report
import torch
import yaml
from parity_recipes import METHODS, RANDOM, exact, golden, recipe
from parity_values import TOLERANCE, deltas, relative, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_merge.merging.merger import Merger
from hf_merge.merging.plan import MergePlan, TensorJob
from hf_merge.single import merge

GOLDEN = Path(__file__).parents[1] / "tests" / "parity" / "golden"
SAMPLED = 1_000_000
"""Elements of a tensor above which mergekit's arcee_fusion estimates its quartiles on a random part."""
CUTS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


@dataclass
class Row:
    """One recipe on both sides: sizes, the largest difference, elements beyond the tolerance and their causes."""

    family: str
    method: str
    tensors: int = 0
    elements: int = 0
    largest: float = 0.0
    beyond: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    doubtful: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    error: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def unexplained(self) -> int:
        """Elements beyond the tolerance without a cause."""
        return self.beyond - self.causes.total()


class Mergekit:
    """mergekit in its own environment: many requests in one process, one answer to each."""

    def __init__(self, command: Path, work: Path) -> None:
        self.python, self.work = command.parent / "python", work

    def __call__(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if not requests:
            return []
        asked, answered = self.work / "requests.json", self.work / "answers.json"
        asked.write_text(json.dumps(list(requests)))
        script = Path(__file__).with_name("parity_mergekit.py")
        with open(self.work / "mergekit.log", "a") as log:
            command = [str(self.python), str(script), str(asked), str(answered)]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return list(json.loads(answered.read_text()))

    def version(self, package: str) -> str:
        """Of a package in mergekit's environment."""
        code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def at_a_cut(job: TensorJob) -> Tensor:
    """Elements `(n,)` whose magnitude in some model's delta is exactly the one at a cut: of several, any may stay."""
    n, found = job.elements, torch.zeros(job.elements, dtype=torch.bool)
    if job.method is None or job.method.name == "sce":
        return found
    densities = job.arguments["density"]
    gammas = job.arguments.get("gamma", [0.0] * len(densities))
    for row, density, gamma in zip(deltas(job).abs(), densities, gammas, strict=True):
        top = int(gamma * n)
        for count in {top, top + int(density * n)}:
            if 0 < count <= n:
                found |= row == row.kthvalue(n - count + 1).values
    return found


def results(ours: Path, theirs: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both results' tensors, with experts as mergekit has them."""
    mine, its = weights(ours), weights(theirs)
    experts = any(".block_sparse_moe." in name for name in mine)
    return (parity_models.fused(mine, list(its)) if experts else mine), its


def compare(row: Row, compiled: MergePlan, ours: Path, theirs: Path) -> None:
    """Fill in a row from both results, with the causes that can be told without merging again."""
    mine, its = results(ours, theirs)
    row.missing, row.surplus = sorted(its.keys() - mine.keys()), sorted(mine.keys() - its.keys())
    merger = Merger(compiled, torch.device("cpu"))
    for name in sorted(mine.keys() & its.keys()):
        a, b = mine[name].flatten(), its[name].flatten()
        row.tensors, row.elements = row.tensors + 1, row.elements + a.numel()
        off = relative(a, b)
        row.largest = max(row.largest, float(off.max()) if len(off) else 0.0)
        beyond = off > TOLERANCE
        row.beyond += int(beyond.sum())
        job = compiled.jobs.get(name) or compiled.jobs.get(name.replace(".mlp.gate.", ".block_sparse_moe.gate."))
        for cause, elements in causes(row.method, merger, job, b, beyond) if beyond.any() else ():
            row.causes[cause] += int((beyond & elements).sum())
            beyond &= ~elements
        if beyond.any():
            row.doubtful[name] = beyond
    row.causes = +row.causes


def causes(method: str, merger: Merger, job: TensorJob | None, theirs: Tensor, beyond: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Why a tensor may differ, and at which elements."""
    everything = torch.ones_like(beyond)
    if job is None:
        yield "fused", everything
        return
    if method in CUTS:
        yield "tie", at_a_cut(job)
    norms = deltas(job).double().norm(dim=1)
    if method == "slerp" and float(norms.min()) == 0:
        yield "zero", everything
    if method == "model_stock" and float(norms.sort().values[:2].prod()) < 1e-6:
        yield "norms", everything


def table(mergekit: Mergekit, work: Path, inputs: dict[str, list[Path]], methods: Sequence[str]) -> list[Row]:
    """Every deterministic recipe on both sides. Where something is left to explain, mergekit merges again in float64."""
    rows: list[tuple[Row, Path]] = []
    for family, method in ((f, m) for f in inputs for m in methods if m not in RANDOM):
        place, row = work / "runs" / f"{family}-{method}", Row(family, method)
        place.mkdir(parents=True)
        for name, content in (("recipe", recipe(method, inputs[family])), ("exact", exact(method, inputs[family]))):
            (place / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            row.error = "" if content else "needs two fine-tunes"
        rows.append((row, place))
    started = [(row, place) for row, place in rows if not row.error]
    asked = [{"file": str(place / "recipe.yaml"), "out": str(place / "theirs")} for _, place in started]
    for (row, place), answer in zip(started, mergekit(asked), strict=True):
        done = merge(place / "recipe.yaml", place / "ours", progress=False)
        row.seconds = (answer["seconds"], done.seconds)
        if answer["error"]:
            row.error = f"mergekit: {answer['error']}"
        else:
            compare(row, done.plan, place / "ours", place / "theirs")
        if not row.doubtful:
            shutil.rmtree(place)
        print(f"{row.family} {row.method}: {row.largest:.1e} {row.beyond} {dict(row.causes)} {row.error}", file=sys.stderr)
    doubtful = [(row, place) for row, place in started if row.doubtful]
    asked = [{"file": str(place / "exact.yaml"), "out": str(place / "exact")} for _, place in doubtful]
    for (row, place), answer in zip(doubtful, mergekit(asked), strict=True):
        if answer["error"]:
            continue
        mine, correct = results(place / "ours", place / "exact")
        for name, beyond in row.doubtful.items():
            same = relative(mine[name], correct[name]).flatten() <= TOLERANCE
            row.causes["rounding"] += int((beyond & same).sum())
            sampled = row.method == "arcee_fusion" and len(beyond) > SAMPLED
            row.causes["sampled"] += int((beyond & ~same).sum()) if sampled else 0
        row.causes = +row.causes
        print(f"{row.family} {row.method}: {dict(row.causes)}, unexplained {row.unexplained}", file=sys.stderr)
    return [row for row, _ in rows]


def write_golden(mergekit: Mergekit) -> None:
    """The inputs, the recipes and mergekit's results that tests/parity reads."""
    shutil.rmtree(GOLDEN / "inputs", ignore_errors=True)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=12,
        intermediate_size=11,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    inputs = parity_models.generate(lambda: LlamaForCausalLM(config), GOLDEN / "inputs", 4)
    with tempfile.TemporaryDirectory() as scratch:
        mergekit.work = Path(scratch)
        requests = []
        for file in (*GOLDEN.glob("*.yaml"), *GOLDEN.glob("*.safetensors")):
            file.unlink()
        for name, content in golden(GOLDEN / "inputs").items():
            text = yaml.safe_dump(content, sort_keys=False)
            # In float32 mergekit's rounding decides on which elements arcee_fusion takes.
            double = {"dtype": "float64", "out_dtype": "float32"} if name == "arcee_fusion" else {}
            Path(scratch, f"{name}.yaml").write_text(yaml.safe_dump(content | double, sort_keys=False))
            # Paths that hold wherever the tests run.
            (GOLDEN / f"{name}.yaml").write_text(text.replace(str(GOLDEN / "inputs"), "INPUTS"))
            requests.append({"file": str(Path(scratch, f"{name}.yaml")), "out": str(Path(scratch, name))})
        names = [Path(request["out"]).name for request in requests]
        for method in RANDOM:
            text = yaml.safe_dump(recipe(method, inputs), sort_keys=False)
            (GOLDEN / f"masked-{method}.yaml").write_text(text.replace(str(GOLDEN / "inputs"), "INPUTS"))
        requests += parity_random.requests(inputs, Path(scratch))
        for request, answer in zip(requests, mergekit(requests), strict=True):
            if answer["error"]:
                raise SystemExit(f"{request}: {answer['error']}")
        for name in names:
            save_file(weights(Path(scratch, name)), GOLDEN / f"{name}.safetensors")
        for method in RANDOM:
            recorded = load_file(Path(scratch, f"{method}.safetensors"))
            kept = {name: value for name, value in recorded.items() if "|chances|" not in name}
            save_file(kept, GOLDEN / f"masked-{method}.safetensors")


def main() -> None:
    """Print and write the tables, or write the tests' files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml of an environment of its own")
    parser.add_argument("--families", nargs="+", default=parity_models.FAMILIES, choices=parity_models.FAMILIES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hf_merge-parity")
    parser.add_argument("--out", type=Path, help="where the tables are written")
    parser.add_argument("--golden", action="store_true", help="write the files of tests/parity and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    mergekit = Mergekit(given.mergekit, given.work)
    if given.golden:
        write_golden(mergekit)
        return
    shutil.rmtree(given.work / "runs", ignore_errors=True)
    inputs = {family: parity_models.folders(family, given.work) for family in given.families}
    started = time.monotonic()
    rows = table(mergekit, given.work, inputs, given.methods)
    drawn = parity_random.table(mergekit, given.work, inputs, given.methods)
    versions = {"mergekit": mergekit.version("mergekit"), "transformers": mergekit.version("transformers")}
    text = parity_report.report(rows, drawn, time.monotonic() - started, versions)
    print(text)
    if given.out:
        given.out.write_text(text)
    shutil.rmtree(given.work / "runs")
    if any(row.unexplained for row in rows):
        sys.exit("There are differences without a cause.")


if __name__ == "__main__":
    main()
