"""What transformers knows of a model's architecture: its classes, ties and heads.

Its modeling code takes seconds to import, and a merge of models that fit each other needs none of it: it is imported where it
is used.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.quantized import plain_config
from hf_merge.errors import CheckpointError, MergeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_AUTO_CLASSES = (
    ("AutoModelForCausalLM", "text-generation", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", None, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "text-classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "token-classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "fill-mask", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
)
_BY_NAME = (
    ("ForCausalLM", 0),
    ("LMHeadModel", 0),
    ("ForSequenceClassification", 2),
    ("ForTokenClassification", 3),
    ("ForMaskedLM", 4),
    ("ForImageClassification", 5),
)
"""Endings of class names that tell which of the above loads them."""


def _transformers(module: str = "") -> Any:
    return importlib.import_module(f"transformers.{module}" if module else "transformers")


def model_class(config: Mapping[str, Any]) -> type[Any] | None:
    """The transformers class that a config names in `architectures`; None for one that transformers does not know."""
    library = _transformers()
    found = getattr(library, str((config.get("architectures") or [""])[0]), None)
    return found if isinstance(found, type) and issubclass(found, library.PreTrainedModel) else None


def model_config(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> "PretrainedConfig | None":
    """The transformers config object of a checkpoint, or of another `config` for it; None for a model type that transformers
    does not know.

    Raises `CheckpointError` for a config that it refuses.
    """
    settings = checkpoint.config if config is None else config
    kind, known = str(settings.get("model_type")), _transformers().CONFIG_MAPPING
    if kind not in known:
        return None
    with refused(checkpoint):
        found: PretrainedConfig = known[kind].from_dict(plain_config(settings))
    return found


def known_config(checkpoint: Checkpoint, settings: Mapping[str, Any] | None = None) -> "PretrainedConfig":
    """The transformers config of a checkpoint, or of other `settings` for it. Raises `MergeError` if transformers does not
    know its model type."""
    config = model_config(checkpoint, settings)
    if config is None:
        raise MergeError(
            f"{checkpoint.label}: transformers has no model for model_type {checkpoint.config.get('model_type')!r}, "
            "so it can be merged by tensor names but not evaluated."
        )
    return config


def layer_lists(settings: Mapping[str, Any], depth: int) -> list[str]:
    """The names of the settings that are lists with an entry for each of `depth` layers."""
    return [
        name
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == depth and name != "architectures" and not name.endswith("_token_id")
    ]


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Tied tensors by name, each with the one it is a copy of, as transformers ties them under the checkpoint's config."""
    config, cls = model_config(checkpoint), model_class(checkpoint.config)
    if config is None or cls is None:
        return {}
    with refused(checkpoint), torch.device("meta"):
        model = cls(config)
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def refused(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever transformers raises on a checkpoint's config into a `CheckpointError`."""
    try:
        yield
    except Exception as error:  # what transformers' own classes raise on a strange config is anything
        name = (checkpoint.config.get("architectures") or ["model"])[0]
        raise CheckpointError(f"{checkpoint.label}: transformers cannot make a {name} of config.json: {error}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers for what takes milliseconds, and no reports of what we say ourselves."""
    library = _transformers("utils.logging")
    shown, level = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if shown:
            library.enable_progress_bar()


def auto_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The Auto class that loads a model of this config, and its pipeline tag on the Hub if it has one."""
    name = str((config.get("architectures") or [""])[0])
    for ending, i in _BY_NAME:
        if name.endswith(ending):
            return _AUTO_CLASSES[i][:2]
    known = _transformers("models.auto.modeling_auto") if name else None
    for class_name, tag, mapping in _AUTO_CLASSES if known else ():
        if any(name in ((one,) if isinstance(one, str) else one) for one in getattr(known, mapping).values()):
            return class_name, tag
    return "AutoModel", None
