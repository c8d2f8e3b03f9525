"""Whether models fit each other, from headers, configs and tokenizers alone; and which tensor of one is which of another."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import CheckpointError, MergeError

_SAME_CONFIG = ("num_attention_heads", "num_key_value_heads", "hidden_act", "position_embedding_type")
_AUTO_CLASSES = (
    ("AutoModelForCausalLM", "text-generation", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForSeq2SeqLM", None, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (
        "AutoModelForSequenceClassification",
        "text-classification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    ("AutoModelForTokenClassification", "token-classification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("AutoModelForMaskedLM", "fill-mask", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("AutoModelForImageClassification", "image-classification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
)


@dataclass(frozen=True)
class Alignment:
    """For every tensor of the result, in order, its name in each checkpoint (`inputs`' order); empty where an integer buffer
    is missing."""

    tensors: Mapping[str, tuple[str, ...]]


def align(inputs: Sequence[Checkpoint]) -> Alignment:
    """Match every model's tensors to those of the first one, the primary.

    Raises `MergeError` that lists every mismatch: architecture, missing and surplus tensors, shapes, kinds of dtype,
    vocabulary, labels, quantized weights. Nothing but headers and small files is read. Tied copies (which a checkpoint may
    or may not hold) are one tensor.
    """
    primary = inputs[0]
    ties = [tied_names(checkpoint) for checkpoint in inputs]
    names = {_canonical(name, primary, ties[0]): None for name in primary.index.tensors}
    problems = [f"{checkpoint.label}: {problem}" for checkpoint in inputs for problem in _quantized(checkpoint.config)]
    for checkpoint, tied in zip(inputs[1:], ties[1:], strict=True):
        found = [
            *_config_problems(primary, checkpoint),
            *_vocabulary_problems(primary, checkpoint),
            *_tensor_problems(list(names), primary, ties[0], checkpoint, tied),
        ]
        problems += [f"{checkpoint.label}: {problem}" for problem in found]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        number = f"{len(problems)} mismatch{'es' if len(problems) > 1 else ''}"
        raise MergeError(f"The models do not fit {primary.label}, {number}:{listed}")
    lookup = [_lookup(checkpoint, tied) for checkpoint, tied in zip(inputs, ties, strict=True)]
    return Alignment({name: tuple(own.get(name, "") for own in lookup) for name in names})


def model_class(config: Mapping[str, Any]) -> type[Any] | None:
    """The transformers class that a config names in `architectures`; None for one that transformers does not know."""
    found = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def model_config(checkpoint: Checkpoint) -> PretrainedConfig | None:
    """The transformers config object of a checkpoint; None for a model type that transformers does not know.

    Raises `CheckpointError` for a config that it refuses.
    """
    kind = str(checkpoint.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return None
    with _refused(checkpoint):
        return CONFIG_MAPPING[kind].from_dict(dict(checkpoint.config))


def known_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The transformers config of a checkpoint. Raises `MergeError` if transformers does not know its model type."""
    config = model_config(checkpoint)
    if config is None:
        raise MergeError(
            f"{checkpoint.label}: transformers has no model for model_type {checkpoint.config.get('model_type')!r}, "
            "so it can be merged by tensor names but not evaluated."
        )
    return config


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Tied tensors by name, each with the one it is a copy of, as transformers ties them under the checkpoint's config."""
    config, cls = model_config(checkpoint), model_class(checkpoint.config)
    if config is None or cls is None:
        return {}
    with _refused(checkpoint), torch.device("meta"):
        model = cls(config)
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def _refused(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what transformers' own classes raise on a strange config is anything
        name = (checkpoint.config.get("architectures") or ["model"])[0]
        raise CheckpointError(f"{checkpoint.label}: transformers cannot make a {name} of config.json: {error}") from error


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


def _quantized(config: Mapping[str, Any]) -> Iterable[str]:
    if settings := config.get("quantization_config"):
        kind = settings.get("quant_method", "?") if isinstance(settings, Mapping) else "?"
        yield f"its weights are quantized ({kind}), and numbers in codes cannot be merged: take the model it was made from."


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
    if not isinstance(named, Mapping):
        return None
    values = [str(label) for _, label in sorted(named.items(), key=lambda pair: (len(pair[0]), pair[0]))]
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
                known = _vocabulary(primary, file, first), _vocabulary(other, file, second)
                yield from _vocabulary_difference(*known, primary)
            return


def _vocabulary(checkpoint: Checkpoint, file: str, data: bytes) -> dict[str, int]:
    """Token ids by token. Raises `CheckpointError` for a file that holds none."""
    try:
        return _token_ids(file, data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.label}: {file} is not the file of a tokenizer: {error!r}") from error


def _token_ids(file: str, data: bytes) -> dict[str, int]:
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


def auto_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The Auto class that loads a model of this config, and its pipeline tag on the Hub if it has one."""
    name = str((config.get("architectures") or [""])[0])
    for class_name, tag, mapping in _AUTO_CLASSES:
        if any(name in ((known,) if isinstance(known, str) else known) for known in mapping.values()):
            return class_name, tag
    return "AutoModel", None
