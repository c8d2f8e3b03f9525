"""The small files that make tensors a model: config, tokenizer, chat template, generation config."""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.quantized import plain_config

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
"""Patterns of the files that make a tokenizer."""
CARRIED = (
    "generation_config.json",
    *TOKENIZER,
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
)
"""Files that are carried over as they are. Code is never carried."""


def companion_files(source: Checkpoint, dtype: torch.dtype | None, config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The companions of `source`, by name. The config is its own unless another is given, and says the result's `dtype` (None:
    as it was)."""
    names = [name for name in source.files.sizes if any(fnmatch(name, pattern) for pattern in CARRIED)]
    found = {name: data for name in names if (data := source.bytes(name)) is not None}
    config = dict(plain_config(source.config if config is None else config))
    if config:
        # Code is not carried, so the result must not point to any.
        for key in ("_name_or_path", "auto_map"):
            config.pop(key, None)
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found
