"""Whether models fit each other, from headers, configs and tokenizers alone; and which tensor of one is which of another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import MergeError

SHOWN = 20
"""Mismatches listed in one message; the rest are counted."""
_SAME_CONFIG = ("num_attention_heads", "num_key_value_heads", "hidden_act", "position_embedding_type")


@dataclass(frozen=True)
class Alignment:
    """For every tensor of the result, in order, its name in each checkpoint (`inputs`' order); empty where an integer buffer
    is missing."""

    tensors: Mapping[str, tuple[str, ...]]


def align(inputs: Sequence[Checkpoint]) -> Alignment:
    """Match every model's tensors to those of the first one, the primary.

    Raises `MergeError` that lists every mismatch: architecture, missing and surplus tensors, shapes, kinds of dtype,
    vocabulary, labels. Nothing but headers and small files is read. Tied copies (which a checkpoint may or may not hold)
    are one tensor.
    """
    primary = inputs[0]
    ties = [tied_names(checkpoint.config) for checkpoint in inputs]
    names = {_canonical(name, primary, ties[0]): None for name in primary.index.tensors}
    problems: list[str] = []
    for checkpoint, tied in zip(inputs[1:], ties[1:], strict=True):
        found = [
            *_config_problems(primary, checkpoint),
            *_tensor_problems(list(names), primary, ties[0], checkpoint, tied),
            *_vocabulary_problems(primary, checkpoint),
        ]
        problems += [f"{checkpoint.label}: {problem}" for problem in found]
    if problems:
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
        raise MergeError(f"The models do not fit {primary.label}, {len(problems)} mismatches:{listed}{more}")
    lookup = [_lookup(checkpoint, tied) for checkpoint, tied in zip(inputs, ties, strict=True)]
    return Alignment({name: tuple(own.get(name, "") for own in lookup) for name in names})


def model_class(config: Mapping[str, Any]) -> type[Any] | None:
    """The transformers class that a config names in `architectures`; None for one that transformers does not know."""
    names = config.get("architectures") or [""]
    return getattr(transformers, str(names[0]), None) if names[0] else None


def model_config(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """The transformers config object; None for a model type that transformers does not know."""
    kind = str(config.get("model_type"))
    return CONFIG_MAPPING[kind].from_dict(dict(config)) if kind in CONFIG_MAPPING else None


def tied_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Tied tensors by name, each with the one it is a copy of, as transformers ties them under this config."""
    found, cls = model_config(config), model_class(config)
    if found is None or cls is None:
        return {}
    with torch.device("meta"):
        model = cls(found)
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _canonical(name: str, checkpoint: Checkpoint, tied: Mapping[str, str]) -> str:
    source = tied.get(name)
    return source if source is not None and source in checkpoint.index.tensors else name


def _lookup(checkpoint: Checkpoint, tied: Mapping[str, str]) -> dict[str, str]:
    """Name in the checkpoint by each name it answers to: its own, and those that are tied to it but not stored."""
    own = {name: name for name in checkpoint.index.tensors}
    for copy, source in tied.items():
        if source in own:
            own[copy] = source
        elif copy in own:
            own[source] = own[copy]
    return own


def _config_problems(primary: Checkpoint, other: Checkpoint) -> Iterable[str]:
    a, b = primary.config, other.config
    for key in ("model_type", "architectures"):
        if a.get(key) and b.get(key) and a[key] != b[key]:
            yield f"another architecture: {key} is {b[key]!r}, {primary.label} has {a[key]!r}."
    for key in _SAME_CONFIG:
        if key in a and key in b and a[key] != b[key]:
            yield f"{key} is {b[key]!r} in config.json, {primary.label} has {a[key]!r}."
    labels = [_labels(config) for config in (a, b)]
    if labels[0] and labels[1] and labels[0] != labels[1]:
        yield f"its classes are {labels[1]}, those of {primary.label} are {labels[0]}: the heads mean different things."


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    named = config.get("id2label")
    values = [str(v) for _, v in sorted(named.items(), key=lambda pair: int(pair[0]))] if isinstance(named, Mapping) else []
    return None if all(value == f"LABEL_{i}" for i, value in enumerate(values)) else values


def _tensor_problems(
    names: list[str], primary: Checkpoint, primary_tied: Mapping[str, str], other: Checkpoint, tied: Mapping[str, str]
) -> Iterable[str]:
    own = _lookup(other, tied)
    for name in names:
        wanted = primary.index.tensors[name]
        if name not in own:
            if wanted.dtype.is_floating_point:
                yield f"tensor {name!r} is missing."
            continue
        entry = other.index.tensors[own[name]]
        if entry.shape != wanted.shape:
            rows = " (another vocabulary?)" if entry.shape[1:] == wanted.shape[1:] and len(entry.shape) > 1 else ""
            yield f"{name!r} has shape {list(entry.shape)}, {primary.label} has {list(wanted.shape)}{rows}."
        elif entry.dtype.is_floating_point != wanted.dtype.is_floating_point:
            yield f"{name!r} is {entry.dtype}, in {primary.label} {wanted.dtype}."
    taken = {own[name] for name in names if name in own}
    for name, entry in other.index.tensors.items():
        # Integer buffers (position_ids and the like) are made by the model's class; a stored tied copy equals its source.
        if name not in taken and name not in tied and entry.dtype.is_floating_point:
            tie = f", where it is tied to {primary_tied[name]!r}" if name in primary_tied else ""
            yield f"tensor {name!r} does not exist in {primary.label}{tie}."


def _vocabulary_problems(primary: Checkpoint, other: Checkpoint) -> Iterable[str]:
    for file in ("tokenizer.json", "vocab.json", "vocab.txt"):
        if file in primary.files.sizes and file in other.files.sizes:
            first, second = primary.bytes(file) or b"", other.bytes(file) or b""
            if first != second:
                yield from _vocabulary_difference(_vocabulary(file, first), _vocabulary(file, second), primary)
            return


def _vocabulary(file: str, data: bytes) -> dict[str, int]:
    """Token ids by token."""
    if file == "vocab.txt":
        return {token: i for i, token in enumerate(data.decode("utf-8", "replace").splitlines())}
    content = json.loads(data)
    if file == "vocab.json":
        return dict(content)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}


def _vocabulary_difference(first: Mapping[str, int], second: Mapping[str, int], primary: Checkpoint) -> Iterable[str]:
    differing = [token for token in {**first, **second} if first.get(token) != second.get(token)]
    if differing:
        shown = ", ".join(repr(token) for token in sorted(differing)[:3])
        yield (
            f"another vocabulary: {len(differing)} tokens differ from {primary.label}'s {len(first)} "
            f"({shown}{', …' if len(differing) > 3 else ''}). Merged embeddings would mix up tokens."
        )
