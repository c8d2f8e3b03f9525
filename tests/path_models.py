"""Tiny models of the families that paths go through, all weights random: biases of zero would hide a missed one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_merge.merging.path_model import PathModel
from hf_merge.merging.plan import open_inputs
from hf_merge.merging.prefixes import Prefixes
from hf_merge.recipes.path import Step
from hf_merge.recipes.recipe import Recipe

VOCABULARY = 96
IDS = torch.arange(3, 19).reshape(2, 8)
_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED | {"attention_bias": True, "mlp_bias": True}, "num_hidden_layers"),
    "tied-llama": (LlamaForCausalLM, LlamaConfig, _GROUPED | {"tie_word_embeddings": True}, "num_hidden_layers"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED, "num_hidden_layers"),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2, "n_layer"),
    "gemma": (GemmaForCausalLM, GemmaConfig, _GROUPED | {"head_dim": 8}, "num_hidden_layers"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GROUPED | {"head_dim": 8, "sliding_window": 4}, "num_hidden_layers"),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _PLAIN, "num_hidden_layers"),
    "mixtral": (MixtralForCausalLM, MixtralConfig, _GROUPED | {"num_local_experts": 4}, "num_hidden_layers"),
    "bert": (BertForSequenceClassification, BertConfig, _PLAIN | {"num_labels": 5}, "num_hidden_layers"),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _GROUPED, "num_hidden_layers"),
    "t5": (T5ForConditionalGeneration, T5Config, _T5, "num_layers"),
}


def family(root: Path, name: str, *, depths: Sequence[int] = (4, 4, 4), **config: object) -> list[Path]:
    """Folders `base`, `model1`, `model2` … of so many layers each; the fine-tunes are the base with a little noise."""
    cls, config_class, settings, key = FAMILIES[name]
    folders = []
    for i, depth in enumerate(depths):
        torch.manual_seed(0)
        model: PreTrainedModel = cls(config_class(**{**settings, key: depth, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else 0.05))
            torch.manual_seed(i)
            for parameter in model.parameters() if i else ():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        folders.append(root / (f"model{i}" if i else "base"))
        model.save_pretrained(folders[-1])
    return folders


def dare_ties(folders: Sequence[Path], **more: object) -> Recipe:
    """The merge of all models with the first one as the base."""
    parameters = {"density": 0.5, "weight": 0.6}
    models = tuple(map(str, folders[1:]))
    return Recipe(**{"method": "dare_ties", "base": str(folders[0]), "models": models, "parameters": parameters, **more})  # type: ignore[arg-type]


def path_model(recipe: Recipe, prefixes: Prefixes | None = None) -> PathModel:
    return PathModel(recipe, open_inputs(recipe), prefixes=prefixes)


def steps(*given: tuple[object, ...]) -> tuple[Step, ...]:
    return tuple(Step(*step) for step in given)  # type: ignore[arg-type]


MIXED = steps(("model1", 0), ("merged", 1), ("merged", 3), ("model2", 1), ("merged", 1), ("merged", 2), ("model2", 3))
"""Layers of all models, some twice and out of order."""
SCALED = steps(
    ("model1", 0), ("merged", 1, 1.3), ("merged", 3, 0.7), ("model2", 1), ("merged", 1, 1.6), ("merged", 2), ("model2", 3, 0.8)
)
"""The same with scales."""
