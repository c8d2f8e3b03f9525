"""A 4-way merge of more than 12 GB, from the Hub to the Hub, with 1.5 GB of memory and 1.2 GB of disk.

    python benchmarks/large.py            # root may mount a quota; others get theirs sampled
    python benchmarks/large.py --scale 0.02

A base and four fine-tunes of Llama shape (bfloat16, 3.2 GB each, several shards, a tied embedding of 128,256 x 2,048) are
generated and put on a local Hub in a process of its own. `hf-merge merge --push-to` then runs with

- RLIMIT_AS of 1.5 GB (`prlimit --as`): all of the address space, so more than what is resident: libraries, stacks,
  reservations of the allocator (MALLOC_ARENA_MAX=2 keeps those small);
- HOME, HF_HOME, HF_MERGE_CACHE, TMPDIR and the working folder on a file system of 1.2 GB: whoever writes more gets ENOSPC.
  Where mounting is not allowed, its use is sampled and asserted.

Tensors of what was pushed are read back from the Hub by ranges and compared, bit for bit, with the method applied to the same
files on disk, in this process, without limits. TIES runs again with a `max_memory` smaller than the largest tensor: every shard
must have the same sha256.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.writer import Shard, ShardFile, TensorSpec, index_json, plan_shards
from hf_merge.demo.hub.server import LocalHub
from hf_merge.merging.merger import Merger, merge_into
from hf_merge.merging.plan import open_inputs, plan
from hf_merge.model_ref import ModelRef
from hf_merge.recipes import yaml as recipes

MEMORY, QUOTA = 1_500_000_000, 1_200_000_000
LAYERS, HIDDEN, VOCABULARY = 22, 2048, 128_256
NAMES = ("base", "one", "two", "three", "four")
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
BANK = (1 << 24) + 43
"""Random elements of a model; its tensors are stretches of them, each with a start of its own."""
COMPARED = 1 << 24
"""Elements that are read back at once."""


def shapes_of(hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with tied embeddings, grouped queries and an MLP of four times its width."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden)}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        shapes |= {f"{block}self_attn.{part}_proj.weight": (hidden // 4, hidden) for part in "kv"}
        shapes |= {f"{block}mlp.{part}_proj.weight": (4 * hidden, hidden) for part in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (hidden, 4 * hidden)}
        shapes |= {f"{block}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def banks() -> Iterator[Tensor]:
    """Of each model, its random elements: the base's, and the fine-tunes' near them, with heavy tails."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(BANK, generator=generator)
    yield base.bfloat16()
    for _ in NAMES[1:]:
        own = torch.randn(BANK, generator=generator) * (1 + 5 * torch.rand(BANK, generator=generator) ** 8)
        yield (base + 0.002 * own).bfloat16()


def write_model(folder: Path, bank: Tensor, shapes: dict[str, tuple[int, ...]], config: dict[str, object], size: int) -> None:
    """A model's folder, in shards of `size` bytes, written in pieces."""
    folder.mkdir(parents=True)
    shards = plan_shards({name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}, size)
    starts = {name: 7_919_317 * number % BANK for number, name in enumerate(shapes)}
    for shard in shards:
        write_shard(folder, shard, bank, starts)
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards) or b"{}")
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(folder: Path, shard: Shard, bank: Tensor, starts: dict[str, int]) -> None:
    """One file: every tensor goes round the bank from its own start; norms are near one."""
    file = ShardFile(shard, folder)
    for name, spec in shard.tensors.items():
        done, total, at = 0, spec.nbytes // 2, starts[name]
        while done < total:
            piece = bank[at : at + total - done]
            file.write(name, done, 1 + 5 * piece if len(spec.shape) == 1 else piece)
            done, at = done + len(piece), 0
    file.finish()


def recipe_of(method: str, models: list[str]) -> dict[str, object]:
    """mergekit's YAML."""
    density = {"density": 0.3} if method == "ties" else {}
    entries = [{"model": m, "parameters": {"weight": w, **density}} for m, w in zip(models[1:], WEIGHTS, strict=True)]
    base = {"base_model": models[0]} if method == "ties" else {}
    return {"merge_method": method, "models": entries, "dtype": "bfloat16", **base}


@contextmanager
def quota(work: Path, size: int) -> Iterator[tuple[Path, bool]]:
    """A folder that holds `size` bytes, its file system's own included, and whether the system sees to it."""
    image, folder = work / "quota.img", work / "quota"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    make = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)]
    mount = ["mount", "-o", "loop", str(image), str(folder)]
    try:
        hard = all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in (make, mount))
    except FileNotFoundError:
        hard = False
    try:
        yield folder, hard
    finally:
        if hard:
            subprocess.run(["umount", str(folder)], check=True)


@dataclass
class Usage:
    """What a process was seen to use, in bytes."""

    resident: int = 0
    virtual: int = 0
    written: int = 0
    scratch: int = 0

    def look(self, pid: int, used: Callable[[], int]) -> None:
        """Look once more. The kernel keeps the greatest sizes itself."""
        self.scratch = max(self.scratch, used())
        with suppress(OSError, TypeError):  # it has just ended
            status, io = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "io"))
            found = dict(re.findall(r"(VmHWM|VmPeak):\s+(\d+)", status))
            if found:
                self.resident, self.virtual = int(found["VmHWM"]) * 1024, int(found["VmPeak"]) * 1024
            self.written = int(dict(re.findall(r"(wchar): (\d+)", io))["wchar"])


def used_below(folder: Path, hard: bool) -> int:
    """Bytes in use: of the file system, or of the files."""
    if hard:
        stat = os.statvfs(folder)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def limited_merge(work: Path, hub: LocalHub, recipe: Path, target: str, size: int, quota_bytes: int, *more: str) -> None:
    """Merge and push under the limits, and print what it took. Exits with the process's output if it fails."""
    hub.clear_requests()
    home = work / target
    home.mkdir()
    with quota(home, quota_bytes) as (disk, hard), (work / "output.txt").open("w+") as said:
        folders = {name: str(disk) for name in ("HOME", "HF_HOME", "HF_MERGE_CACHE", "TMPDIR")}
        environment = {**os.environ, **hub.environment(), **folders, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        command = ["prlimit", f"--as={MEMORY}", sys.executable, "-m", "hf_merge.cli", "merge", str(recipe), "--quiet"]
        command += ["--push-to", f"demo/{target}", "--max-shard-size", str(size), *more]
        before, usage, started = used_below(disk, hard), Usage(), time.perf_counter()
        child = subprocess.Popen(command, env=environment, cwd=disk, stdout=said, stderr=subprocess.STDOUT)
        while child.poll() is None:
            usage.look(child.pid, lambda: used_below(disk, hard))
            time.sleep(0.02)
        seconds, free = time.perf_counter() - started, shutil.disk_usage(disk).total
        said.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(command)} ended with {child.returncode} ({usage}):\n{said.read()[-4000:]}")
        scratch = f"{free / 1e9:.3f} GB for files, ENOSPC beyond" if hard else "sampled: mounting is not allowed"
        served, received = hub.bytes_served("*/big/*.safetensors"), sum(r.bytes_received for r in hub.requests())
        print(f"seconds                 {seconds:.1f}")
        print(f"read from the Hub       {served / 1e9:.3f} GB in {len(hub.requests()):,} requests of all kinds")
        print(f"written                 {usage.written / 1e9:.3f} GB to scratch, {received / 1e9:.3f} GB to the Hub")
        print(f"peak resident           {usage.resident / 1e6:.0f} MB")
        print(f"peak address space      {usage.virtual / 1e6:.0f} MB of {MEMORY / 1e6:.0f} (RLIMIT_AS)")
        print(f"largest use of scratch  {(usage.scratch - before) / 1e9:.3f} GB (quota {quota_bytes / 1e9:.3f} GB: {scratch})")
        print(f"left on scratch         {used_below(disk, hard) - before:,} bytes", flush=True)
        assert usage.resident < MEMORY
        assert usage.virtual <= MEMORY
        assert usage.scratch <= quota_bytes


def compare(recipe: dict[str, object], target: str, hub: LocalHub, size: int) -> None:
    """Tensors of the pushed model, read by ranges, with the method on local files."""
    local = recipes.from_dict(recipe)
    compiled = plan(local, open_inputs(local), max_shard_size=size)
    pushed = Checkpoint(ModelRef(f"demo/{target}"), HfApi(endpoint=hub.endpoint, token=hub.token))
    layers = [f"model.layers.{i}." for i in (0, LAYERS // 2, LAYERS - 1)]
    names = [n for n in compiled.jobs if n == EMBEDDING or n == "model.norm.weight" or n.startswith(tuple(layers))]
    assert set(pushed.index.tensors) == set(compiled.jobs)
    merger, elements = Merger(compiled, torch.device("cpu")), 0
    for name in names:
        spec = compiled.jobs[name].spec
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        merge_into(merger, {name: whole})
        expected = whole.flatten()
        for start in range(0, len(expected), COMPARED):
            stop = min(start + COMPARED, len(expected))
            got = pushed.read(name, start, stop)
            if got.dtype is not expected.dtype or not torch.equal(
                got.view(torch.int16), expected[start:stop].view(torch.int16)
            ):
                sys.exit(f"{name}[{start}:{stop}] of demo/{target} is not what the local files give")
        elements += len(expected)
    norms = sum("norm" in name for name in names)
    print(f"equal, bit for bit      {len(names)} tensors, {elements:,} elements: the embedding, {norms} norms, all of 3 layers")


def hashes(target: str, hub: LocalHub) -> dict[str, str]:
    """sha256 of every shard, as the Hub has it."""
    info = HfApi(endpoint=hub.endpoint, token=hub.token).model_info(f"demo/{target}", files_metadata=True)
    return {f.rfilename: f.lfs.sha256 for f in info.siblings or () if f.lfs and f.rfilename.endswith(".safetensors")}


def main() -> None:
    """Generate, merge under limits, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the size; memory stays, the quota shrinks with it")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where a folder with 30 GB is made")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"], choices=["linear", "ties"])
    given = parser.parse_args()
    hidden = max(64, round(HIDDEN * given.scale**0.5 / 64) * 64)
    shapes = shapes_of(hidden, round(VOCABULARY * given.scale**0.5))
    embedding = 2 * shapes[EMBEDDING][0] * hidden
    quota_bytes = round(QUOTA * embedding / (2 * VOCABULARY * HIDDEN))
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "vocab_size": shapes[EMBEDDING][0],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(prefix="hf_merge-large-", dir=given.work) as name:
        work = Path(name)
        with LocalHub.spawn(work / "hub") as hub:
            started, total = time.perf_counter(), 0
            for model, bank in zip(NAMES, banks(), strict=True):
                folder, kept = work / "seed" / model, work / "local" / model
                write_model(folder, bank, shapes, config, 2 * embedding)
                # The Hub's store moves the files; a second name keeps them at hand for the comparison, without a copy.
                shutil.copytree(folder, kept, copy_function=os.link)
                files = sorted(folder.glob("*.safetensors"))
                total += sum(file.stat().st_size for file in files)
                count = len(files)
                hub.seed(f"big/{model}", folder, move=True)
            sizes = (
                f"{len(NAMES)} x {total / len(NAMES) / 1e9:.3f} GB in {count} shards each, embedding {embedding / 1e6:.0f} MB"
            )
            print(f"generated {total / 1e9:.2f} GB: {sizes}, in {time.perf_counter() - started:.0f} s", flush=True)
            runs: list[tuple[str, tuple[str, ...]]] = [(method, ()) for method in given.methods]
            runs += [("ties", ("--max-memory", str(embedding // 5)))] if "ties" in given.methods else []
            for method, more in runs:
                target = f"large-{method}" + ("-small" if more else "")
                print(f"\n## {method} {' '.join(more)}", flush=True)
                recipe = work / f"{target}.yaml"
                recipe.write_text(yaml.safe_dump(recipe_of(method, [f"big/{model}" for model in NAMES])))
                size = int(0.95 * embedding)
                limited_merge(work, hub, recipe, target, size, quota_bytes, *more)
                if more:
                    first, second = hashes("large-ties", hub), hashes(target, hub)
                    if not first or first != second:
                        sys.exit(f"other bits: {first} and {second}")
                    print(f"the same sha256 as without a bound: all {len(first)} shards")
                else:
                    compare(recipe_of(method, [str(work / "local" / model) for model in NAMES]), target, hub, size)


if __name__ == "__main__":
    main()
