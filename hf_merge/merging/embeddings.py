"""Which of a model's tensors have a row for every token."""

import re
from collections.abc import Iterable

import torch

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.merging.architecture import model_class, model_config

_NAMES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|shared|lm_head|decoder|head|output)\.(weight|bias)$"
    r"|(^|\.)(predictions|lm_head)\.bias$|(^|\.)final_logits_bias$"
)


def vocabulary_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of a checkpoint's tensors whose first axis is the vocabulary: input embeddings, output head, the head's bias.

    transformers says which they are where it knows the architecture; else their usual names and their size do. The first is the
    one that tells the number of rows. Empty for a model without a vocabulary.
    """
    tensors = checkpoint.index.tensors
    named = [name for name in _by_transformers(checkpoint) if name in tensors]
    usual = sorted((n for n in tensors if _NAMES.search(n)), key=lambda name: ("embed" not in name, "wte" not in name, name))
    size = checkpoint.config.get("vocab_size", (checkpoint.config.get("text_config") or {}).get("vocab_size"))
    if not named:
        named = [name for name in usual if tensors[name].shape[:1] == (size,)]
    if not named:
        return ()
    rows = tensors[named[0]].shape[0]
    return tuple(name for name in dict.fromkeys([*named, *usual]) if tensors[name].shape[:1] == (rows,))


def _by_transformers(checkpoint: Checkpoint) -> Iterable[str]:
    config, cls = model_config(checkpoint), model_class(checkpoint.config)
    if config is None or cls is None:
        return []
    try:
        with torch.device("meta"):
            model = cls(config)
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except Exception:  # an architecture without embeddings, or a config that its class refuses: names tell the rest
        return []
    if not isinstance(found[0], torch.nn.Embedding):
        return []
    wanted = [id(p) for module in found if module is not None for p in module.parameters(recurse=False)]
    names = [(wanted.index(id(p)), name) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted]
    return [name for _, name in sorted(names)]
