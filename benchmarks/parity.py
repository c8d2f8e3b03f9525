"""Whether the same recipe gives the same model here and in mergekit 0.1.5: a table, and the stored results of the tests.

    python benchmarks/parity.py --mergekit /path/to/another/venv/bin/mergekit-yaml --out benchmarks/PARITY.md
    python benchmarks/parity.py --mergekit /path/to/another/venv/bin/mergekit-yaml --golden

The inputs are real models (from packages of PyPI, and the demo's, which are trained once) and generated ones with odd shapes, in
float32. Each recipe is one file in mergekit's YAML, merged by `mergekit-yaml` and by `hf_merge.merge`. `--golden` writes what
tests/parity compares with. Both sides use one thread of torch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import parity_models
import parity_random
import torch
import yaml
from parity_recipes import METHODS, RANDOM, golden, recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_merge.merging.merger import Merger, merge_tensor
from hf_merge.merging.plan import MergePlan, TensorJob
from hf_merge.single import merge

TOLERANCE = 1e-6
GOLDEN = Path(__file__).parents[1] / "tests" / "parity" / "golden"
CUTS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


@dataclass
class Row:
    """One recipe on both sides: sizes, the largest difference, and elements that differ by more than the tolerance, by cause."""

    family: str
    method: str
    tensors: int = 0
    elements: int = 0
    largest: float = 0.0
    beyond: int = 0
    counted: int = 0
    tied: int = 0
    rounded: int = 0
    other: int = 0
    where: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    error: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)


class Mergekit:
    """mergekit in its own environment: many requests in one process, one answer to each."""

    def __init__(self, command: Path, work: Path) -> None:
        self.python, self.work = command.parent / "python", work

    def __call__(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """|a - b| / max(|b|, RMS of b's tensor) by element, float64; 0 where both are equal, NaN included."""
    a, b = ours.double(), theirs.double()
    scale = torch.maximum(b.abs(), b.square().mean().sqrt())
    found = torch.where(a == b, 0.0, (a - b).abs() / scale)
    return torch.where(a.isnan() & b.isnan(), 0.0, found.nan_to_num(nan=torch.inf))


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def with_their_counts(job: TensorJob) -> TensorJob:
    """The job with densities that keep as many elements as mergekit: rounded down, of TIES at least one, of others perhaps none."""
    n, arguments = job.elements, dict(job.arguments)
    if job.method is not None and job.method.name == "sce":
        stack = deltas(job)
        differing = int((stack[1:] != stack[0]).any(0).sum())
        arguments["select_topk"] = int(arguments["select_topk"] * differing) / max(1, differing)
    else:
        least = 1 if job.method is not None and job.method.name == "ties" else 0
        given = torch.as_tensor(arguments["density"], dtype=torch.float64).reshape(-1).tolist()
        arguments["density"] = torch.tensor([max(least, int(round(d, 6) * n)) / n for d in given], dtype=torch.float64)
    return replace(job, arguments=arguments)


def deltas(job: TensorJob) -> Tensor:
    """`(models, n)` float32."""
    stack = torch.stack([source.read(0, job.elements).float() for source in job.sources])
    return stack if job.base is None else stack - job.base.read(0, job.elements).float()


def at_a_cut(job: TensorJob) -> Tensor:
    """Elements `(n,)` whose magnitude in some model's delta is that of another one and of a cut: which of them stays is free."""
    n, found = job.elements, torch.zeros(job.elements, dtype=torch.bool)
    if job.method is None or job.method.name == "sce":
        return found
    densities = torch.as_tensor(job.arguments["density"], dtype=torch.float64).reshape(-1, 1)
    gammas = torch.as_tensor(job.arguments.get("gamma", 0.0), dtype=torch.float64).reshape(-1, 1)
    for k, row in enumerate(deltas(job).abs()):
        density, gamma = (float(v[min(k, len(v) - 1)]) for v in (densities, gammas))
        top = int(gamma * n)
        for count in {top, top + int(density * n), top + round(density * n)}:
            if 0 < count <= n:
                found |= row == row.kthvalue(n - count + 1).values
    return found


def compare(row: Row, compiled: MergePlan, ours: Path, theirs: Path) -> None:
    """Fill in a row from both results."""
    mine, its = weights(ours), weights(theirs)
    row.missing, row.surplus = sorted(its.keys() - mine.keys()), sorted(mine.keys() - its.keys())
    merger = Merger(compiled, torch.device("cpu"))
    for name in sorted(mine.keys() & its.keys()):
        a, b, job = mine[name].flatten(), its[name].flatten(), compiled.jobs[name]
        row.tensors, row.elements = row.tensors + 1, row.elements + a.numel()
        off = relative(a, b)
        row.largest = max(row.largest, float(off.max()) if len(off) else 0.0)
        beyond = off > TOLERANCE
        if not beyond.any():
            continue
        row.beyond += int(beyond.sum())
        if row.method in CUTS and job.method is not None:
            again = relative(merge_tensor(merger, with_their_counts(job)).flatten(), b) > TOLERANCE
            row.counted, beyond = row.counted + int((beyond & ~again).sum()), beyond & again
            tied = beyond & at_a_cut(job)
            row.tied, beyond = row.tied + int(tied.sum()), beyond & ~tied
        if beyond.any():
            row.other += int(beyond.sum())
            row.where.append(name)


def table(mergekit: Mergekit, work: Path, families: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Every deterministic recipe on both sides. Where something is left to explain, mergekit merges again in float64."""
    rows: list[tuple[Row, MergePlan | None, Path]] = []
    requests, inputs = [], {family: parity_models.folders(family, work) for family in families}
    for family, method in ((f, m) for f in families for m in methods if m not in RANDOM):
        content, place = recipe(method, inputs[family]), work / "runs" / f"{family}-{method}"
        if content is None:
            rows.append((Row(family, method, error="needs more models than there are"), None, place))
            continue
        place.mkdir(parents=True)
        for name, dtype in (("recipe", "float32"), ("recipe64", "float64")):
            (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe(method, inputs[family], dtype), sort_keys=False))
        rows.append((Row(family, method), None, place))
        requests.append({"file": str(place / "recipe.yaml"), "out": str(place / "theirs")})
    answers = iter(mergekit(requests))
    doubtful = []
    for row, _, place in rows:
        if row.error:
            continue
        answer = next(answers)
        try:
            done = merge(place / "recipe.yaml", place / "ours", progress=False)
            row.seconds = (answer["seconds"], done.seconds)
            if answer["error"]:
                row.error = f"mergekit: {answer['error']}"
                continue
            compare(row, done.plan, place / "ours", place / "theirs")
        except Exception as error:
            row.error = f"{row.error} hf_merge: {type(error).__name__}: {error}"[:300]
        if row.other:
            doubtful.append((row, place))
        else:
            shutil.rmtree(place)
        print(row, flush=True)
    again = [{"file": str(place / "recipe64.yaml"), "out": str(place / "exact")} for _, place in doubtful]
    for (row, place), answer in zip(doubtful, mergekit(again) if again else [], strict=True):
        if answer["error"]:
            continue
        mine, its, exact = (weights(place / side) for side in ("ours", "theirs", "exact"))
        for name in row.where:
            beyond = relative(mine[name], its[name]) > TOLERANCE
            row.rounded += int((beyond & (relative(mine[name], exact[name]) <= TOLERANCE)).sum())
        row.other -= row.rounded
        print(row, flush=True)
    return [row for row, _, _ in rows]


def write_golden(mergekit: Mergekit) -> None:
    """The inputs, the recipes and mergekit's results that tests/parity reads."""
    shutil.rmtree(GOLDEN / "inputs", ignore_errors=True)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    parity_models.generate(lambda: LlamaForCausalLM(config), GOLDEN / "inputs", 4)
    with tempfile.TemporaryDirectory() as scratch:
        mergekit.work = Path(scratch)
        requests = []
        for file in (*GOLDEN.glob("*.yaml"), *GOLDEN.glob("*.safetensors")):
            file.unlink()
        for name, content in golden(GOLDEN / "inputs").items():
            text = yaml.safe_dump(content, sort_keys=False)
            Path(scratch, f"{name}.yaml").write_text(text)
            # Paths that hold wherever the tests run.
            (GOLDEN / f"{name}.yaml").write_text(text.replace(str(GOLDEN / "inputs"), "INPUTS"))
            requests.append({"file": str(Path(scratch, f"{name}.yaml")), "out": str(Path(scratch, name))})
        names = [Path(request["out"]).name for request in requests]
        requests += parity_random.requests(GOLDEN / "inputs", Path(scratch))
        for request, answer in zip(requests, mergekit(requests), strict=True):
            if answer["error"]:
                raise SystemExit(f"{request}: {answer['error']}")
        for name in names:
            save_file(weights(Path(scratch, name)), GOLDEN / f"{name}.safetensors")
        for method in RANDOM:
            shutil.copy(Path(scratch, f"{method}.safetensors"), GOLDEN / f"masked-{method}.safetensors")


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
    started = time.monotonic()
    rows = table(mergekit, given.work, given.families, given.methods)
    (given.work / "rows.json").write_text(json.dumps([vars(row) for row in rows]))


if __name__ == "__main__":
    main()
