"""Three repositories of 400 MB each, merged from a Hub in another process: memory is bounded, no source reaches the disk."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge.demo.hub.server import LocalHub

LAYERS, HIDDEN, INNER, VOCABULARY, SHARD_LAYERS = 11, 1024, 2816, 32000, 3
ALLOWED_MIB, ALLOWED_SHARE = 350, 1.02

MERGE = """
import json, re, sys
from pathlib import Path
import psutil
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import merge

method, base, out = sys.argv[1], ModelRef("big/base"), Path(sys.argv[2])
parents = (ModelRef("big/model1"), ModelRef("big/model2"))
start = psutil.Process().memory_info().rss
if method in ("linear", "slerp"):
    recipe = Recipe(method=method, models=parents)
else:
    recipe = Recipe(method=method, base=base, models=parents)
target = {"push_to": "demo/big-" + method.replace("_", "-")} if sys.argv[3] == "hub" else {"out": out}
done = merge(recipe, **target, max_shard_size="150MB", progress=False)
# Not getrusage: its peak is inherited from the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"start": start, "peak": peak, "needed": done.plan.bytes_read, "seconds": done.seconds}))
"""


def write_model(folder: Path, seed: int) -> None:
    """A Llama of about 207 M parameters in bfloat16, in several shards."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shards = [tensors]
    for layer in range(LAYERS):
        if layer % SHARD_LAYERS == 0:
            shards.append({})
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shards[-1][f"model.layers.{layer}.{name}.weight"] = draw(*shape)
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, content in zip(names, shards, strict=True):
        save_file(content, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, content in zip(names, shards, strict=True) for tensor in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="module")
def big_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("big")
    with LocalHub.spawn(root / "hub") as hub:
        for seed, name in enumerate(["base", "model1", "model2"]):
            write_model(root / name, seed)
            hub.seed(f"big/{name}", root / name, move=True)
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "target"),
    [(method, "folder") for method in ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")]
    + [("ties", "hub")],
)
def test_memory_disk_and_traffic_of_a_streamed_merge_are_bounded(
    method: str, target: str, big_hub: LocalHub, tmp_path: Path
) -> None:
    big_hub.clear_requests()
    home = tmp_path / "hf_home"
    environment = {**os.environ, **big_hub.environment(), "HF_HOME": str(home), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MERGE, method, str(tmp_path / "out"), target]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    grown, served = (told["peak"] - told["start"]) / 2**20, big_hub.bytes_served("*big/*.safetensors")
    print(f"{method} to {target}: +{grown:.0f} MiB, {served / told['needed']:.4f} of what is needed, {told['seconds']:.1f} s")
    assert grown <= ALLOWED_MIB
    assert told["needed"] <= served <= ALLOWED_SHARE * told["needed"]
    assert bytes_on_disk(home) < 1_000_000
    written = bytes_on_disk(tmp_path) - bytes_on_disk(home)
    assert written <= (0 if target == "hub" else told["needed"] / 2 + 1_000_000)
