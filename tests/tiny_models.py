"""Tiny models of several architectures, with a tokenizer of whole words, in folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(93))]
_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_BERT = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "eos_token_id")}
_T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "tied-llama": (LlamaForCausalLM, LlamaConfig, _LLAMA | {"tie_word_embeddings": True}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, _LLAMA | {"num_local_experts": 4}),
    "bert": (BertForSequenceClassification, BertConfig, _BERT | {"num_labels": 5}),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
}

Maker = Callable[..., list[Path]]


def make_models(
    root: Path,
    architecture: str,
    count: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str | int = "5GB",
    parent: str = "models",
    words: list[str] = WORDS,
    **config: object,
) -> list[Path]:
    """Folders `base`, `model1`, `model2` … under `root / parent`, seeded by their position; `config` goes into the config."""
    cls, config_class, settings = ARCHITECTURES[architecture]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    folders = []
    for i in range(count):
        torch.manual_seed(i)
        folders.append(root / parent / (f"model{i}" if i else "base"))
        cls(config_class(**{**settings, **config})).to(dtype).save_pretrained(folders[-1], max_shard_size=shard)
        fast.save_pretrained(folders[-1])
    return folders
