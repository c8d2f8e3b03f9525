"""Adapters that PEFT makes of tiny models, with every trained tensor random."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_merge.checkpoints.adapters import Adapter
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.source import Source, Stored, elements
from hf_merge.model_ref import ModelRef

CLASSES = {"bert": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Headless:
    """A tensor of the base of which only the header may be read."""

    stored: Stored
    label: str = "base"
    near: bool = False
    delta: bool = False
    nbytes: int = 0
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.stored.shape)
        object.__setattr__(self, "dtype", self.stored.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        raise AssertionError("the base was read")


def loaded(base: Path, architecture: str) -> PreTrainedModel:
    model: PreTrainedModel = CLASSES.get(architecture, AutoModelForCausalLM).from_pretrained(base)
    return model


def save_adapter(base: Path, folder: Path, architecture: str, seed: int = 0, **config: Any) -> Path:
    """An adapter whose every trained tensor is random, saved by PEFT."""
    model = get_peft_model(loaded(base, architecture), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            # In place, for tied factors share their memory; magnitudes are norms and stay positive.
            parameter.data.mul_(1 + noise.abs()) if "magnitude" in name else parameter.data.add_(noise)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Adapter:
    return Adapter(Checkpoint(ModelRef(str(folder))))


def base_of(folder: Path) -> tuple[list[str], Callable[[str], Source]]:
    checkpoint = Checkpoint(ModelRef(str(folder)))
    return list(checkpoint.index.tensors), lambda name: Stored(checkpoint, name)


def headless(folder: Path) -> tuple[list[str], Callable[[str], Source]]:
    checkpoint = Checkpoint(ModelRef(str(folder)))
    return list(checkpoint.index.tensors), lambda name: Headless(Stored(checkpoint, name))


def whole(source: Source) -> Tensor:
    return source.read(0, elements(source)).reshape(source.shape)


def peft_merged(base: Path, adapter: Path, architecture: str) -> dict[str, Tensor]:
    merged = PeftModel.from_pretrained(loaded(base, architecture), adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}
