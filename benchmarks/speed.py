"""Whole merges, ours and mergekit's, alternating in one run: seconds of the whole process and its peak memory.

    python benchmarks/speed.py --mergekit /path/to/another/venv/bin/mergekit-yaml
    python benchmarks/speed.py --in-place    # a search's candidates: TIES of three into one model in memory, nothing else

A family of Llama shape is generated (bfloat16, one base and three fine-tunes; `--layers 16` is 317 M parameters) and kept in
`--work`. mergekit gets its own YAML with `dtype: bfloat16`, its fastest mode; ours computes in float32. Both read from and
write to the same disk, with the inputs in the page cache. The merge phase of ours is also compared with the time that
reading the inputs and writing the result takes by themselves.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from hf_merge.merging.execute import execute
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import open_inputs, plan
from hf_merge.recipes import yaml as recipes

HIDDEN, INNER, VOCABULARY = 1024, 3744, 32000
METHODS: dict[str, tuple[int, dict[str, float], dict[str, float]]] = {
    # models, numbers of each model, numbers of the merge
    "linear": (3, {"weight": 0.33}, {}),
    "slerp": (2, {}, {"t": 0.4}),
    "nuslerp": (2, {"weight": 0.5}, {}),
    "task_arithmetic": (3, {"weight": 0.33}, {}),
    "model_stock": (3, {}, {}),
    "dare_linear": (3, {"weight": 0.33, "density": 0.5}, {}),
    "dare_ties": (3, {"weight": 0.33, "density": 0.5}, {}),
    "ties": (3, {"weight": 0.33, "density": 0.5}, {}),
    "breadcrumbs": (3, {"weight": 0.33, "density": 0.5}, {}),
    "sce": (3, {}, {"select_topk": 0.5}),
    "della": (3, {"weight": 0.33, "density": 0.5}, {}),
    "karcher": (3, {}, {}),
}
WEIGHTS = ("linear", "nuslerp", "karcher")
CHUNK = 1 << 20


def family(work: Path, layers: int) -> list[Path]:
    """Folders of the base and its three fine-tunes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{block}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{block}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folders = [work / f"{name}-{layers}" for name in ("base", "one", "two", "three")]
    if all((folder / "model.safetensors").is_file() for folder in folders):
        return folders
    torch.manual_seed(0)
    base = {name: (0.02 * torch.randn(s) if len(s) > 1 else torch.ones(s)).bfloat16() for name, s in shapes.items()}
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        # Heavy tails, as fine-tunes have them.
        own = (
            base
            if number == 0
            else {
                n: (t.float() + 0.002 * torch.randn(t.shape) * (1 + 5 * torch.rand(t.shape) ** 8)).bfloat16()
                for n, t in base.items()
            }
        )
        save_file(own, folder / "model.safetensors", {"format": "pt"})
    return folders


def main_family(work: Path, layers: int) -> list[Path]:
    """The family, made by another process: a process that starts others lends them its peak of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(family, work, layers).result()


def config_of(method: str, folders: list[Path]) -> dict[str, object]:
    """mergekit's YAML for a method."""
    count, own, shared = METHODS[method]
    base, *models = map(str, folders)
    entries = [{"model": model} | ({"parameters": own} if own else {}) for model in models[:count]]
    if method == "slerp":
        entries, base = entries[:2], models[0]
    found: dict[str, object] = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    return found | ({"parameters": shared} if shared else {}) | ({} if method in WEIGHTS else {"base_model": base})


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a process. Exits with its output if it fails."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        quiet = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        child = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - started
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{said.read().decode()[-3000:]}")
    return seconds, usage.ru_maxrss / 1024


def limit(folders: list[Path], out: Path, nbytes: int) -> float:
    """Seconds to read the inputs and to write as much as the result, in two threads, nothing else."""

    def copy(half: int) -> None:
        buffer = bytearray(CHUNK)
        for folder in folders:
            with open(folder / "model.safetensors", "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for start in range(half * size // 2, (half + 1) * size // 2, CHUNK):
                    os.preadv(file.fileno(), [buffer], start)
        for start in range(half * nbytes // 2, (half + 1) * nbytes // 2, CHUNK):
            os.pwrite(target, buffer, start)

    target = os.open(out, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(target, 0, nbytes)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(copy, range(2)))
    seconds = time.perf_counter() - started
    os.close(target)
    out.unlink()
    return seconds


def phase(method: str, folders: list[Path], out: Path) -> tuple[float, float]:
    """Seconds of our merge phase alone, in this process, and of the limit right after it."""
    recipe = recipes.from_dict(config_of(method, folders))
    compiled = plan(recipe, open_inputs(recipe))
    out.mkdir()
    started = time.perf_counter()
    execute(compiled, out, progress=False)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    read = [checkpoint.ref.path for checkpoint in compiled.inputs]
    return seconds, limit(read, out.with_suffix(".limit"), compiled.bytes_written)


def in_place(folders: list[Path]) -> list[float]:
    """Seconds that TIES of the three takes to be in place of the merge before it in one model in memory, at ten densities."""
    every, found = [], []
    for number in range(10):
        own = {"weight": 0.33, "density": (number + 0.5) / 10}
        models = [{"model": str(folder), "parameters": own} for folder in folders[1:]]
        every.append(recipes.from_dict(config_of("ties", folders) | {"models": models}))
    live = LiveModel(every[-1], open_inputs(every[-1]))
    live.load(every[-1])
    for recipe in every:
        started = time.perf_counter()
        live.load(recipe)
        found.append(time.perf_counter() - started)
    return found


def spread(values: list[float], digits: int) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml of an environment of its own")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hf_merge-speed")
    parser.add_argument("--in-place", action="store_true", help="TIES in memory alone")
    given = parser.parse_args()
    if not given.in_place and given.mergekit is None:
        parser.error("give --mergekit, or --in-place")
    folders = main_family(given.work, given.layers)
    if given.in_place:
        print(f"TIES of three models in place, ten densities: {spread(in_place(folders), 2)} s")
        return
    size = (folders[0] / "model.safetensors").stat().st_size
    print(f"{size / 2e6:,.0f} M parameters, {given.runs} alternating runs, {os.cpu_count()} cores: median (least-greatest)\n")
    print(
        "| method | mergekit s | ours s | ratio | mergekit MiB | ours MiB | ratio |\n|---|---|---|---|---|---|---|", flush=True
    )
    out, file = given.work / "out", given.work / "recipe.yaml"
    ours = [sys.executable, "-m", "hf_merge.cli", "merge", str(file), str(out), "--quiet"]
    theirs = [str(given.mergekit), str(file), str(out)]
    for method in given.methods:
        file.write_text(yaml.safe_dump(config_of(method, folders)))
        times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
        for _ in range(given.runs):
            for name, command in (("theirs", theirs), ("ours", ours)):
                shutil.rmtree(out, ignore_errors=True)
                times[name].append(run(command))
        (a, x), (b, y) = (tuple(map(list, zip(*times[name], strict=True))) for name in ("theirs", "ours"))
        ratio, memory = statistics.median(a) / statistics.median(b), statistics.median(y) / statistics.median(x)
        row = [method, spread(a, 1), spread(b, 1), f"{ratio:.1f}", spread(x, 0), spread(y, 0), f"{memory:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    print("\n| merge phase | s | read + write limit s | ratio |\n|---|---|---|---|")
    for method in ("linear", "task_arithmetic"):
        pairs = [phase(method, folders, out) for _ in range(given.runs)]
        ratios = [merged / least for merged, least in pairs]
        shown = (spread([m for m, _ in pairs], 2), spread([least for _, least in pairs], 2), spread(ratios, 2))
        print(f"| {method} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
