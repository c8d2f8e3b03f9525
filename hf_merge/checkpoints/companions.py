"""The small files that make tensors a model: config, tokenizer, chat template, generation config."""

import json
from fnmatch import fnmatch

import torch

from hf_merge.checkpoints.checkpoint import Checkpoint

CARRIED = (
    "generation_config.json",
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
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that are carried over as they are. Code is never carried."""


def companion_files(source: Checkpoint, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The companions of `source`, by name; the config says the result's `dtype` (None: the source's own)."""
    names = [name for name in source.files.sizes if any(fnmatch(name, pattern) for pattern in CARRIED)]
    found = {name: data for name in names if (data := source.bytes(name)) is not None}
    config = dict(source.config)
    if config:
        # Code is not carried, so the result must not point to any.
        for key in ("_name_or_path", "auto_map"):
            config.pop(key, None)
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found
