"""A tokenizer of whole words, tiny models of it with random weights, and datasets of random words."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_merge.evaluation.measure import Evaluator

VOCABULARY = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(61))]
LABELS = ("pos", "neg", "who", "where", "when")
_NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BERT = {**_SIZES, "max_position_embeddings": 48, "pad_token_id": 0}
TAGS = ("O", "B-x", "I-x", "B-y", "I-y")
_TAGGED = {"id2label": dict(enumerate(TAGS)), "label2id": {name: i for i, name in enumerate(TAGS)}}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "bos_token_id": 2, "eos_token_id": 2}
_ARCHITECTURES = {
    "bert": (BertForSequenceClassification, BertConfig, {**_BERT, **_NAMED}),
    "bert-tagger": (BertForTokenClassification, BertConfig, {**_BERT, **_TAGGED}),
    "bert-masked": (BertForMaskedLM, BertConfig, _BERT),
    "bert-body": (BertModel, BertConfig, _BERT),
    "vit": (ViTForImageClassification, ViTConfig, {**_VIT, "patch_size": 8, **_NAMED}),
    "gpt2-classifier": (GPT2ForSequenceClassification, GPT2Config, {**_GPT2, **_NAMED}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "llama": (LlamaForCausalLM, LlamaConfig, {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 48}),
    "bloom": (BloomForCausalLM, BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
    ),
}

MakeModel = Callable[..., PreTrainedModel]
MakeData = Callable[..., DatasetDict]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A", pair="$A [EOS] $B:1", special_tokens=[("[EOS]", 2)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, **special)


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model("bert", seed=…, **config)`: random weights, large enough that predictions differ from row to row."""

    def build(architecture: str, seed: int = 0, **config: object) -> PreTrainedModel:
        cls, config_class, settings = _ARCHITECTURES[architecture]
        torch.manual_seed(seed)
        model = cls(config_class(**{**settings, **config})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model

    return build


@pytest.fixture
def make_data() -> MakeData:
    """`make_data(rows, labels=…, seed=…)`: splits search and held_out, texts of 1 to 40 words, targets drawn from `labels`."""

    def build(rows: int = 60, labels: tuple[object, ...] = LABELS, seed: int = 0, shortest: int = 1) -> DatasetDict:
        rng = np.random.default_rng(seed)
        texts: dict[str, None] = {}
        while len(texts) < 2 * rows:
            texts[" ".join(f"w{i}" for i in rng.integers(0, 61, rng.integers(shortest, 41)))] = None
        targets = [labels[i] for i in rng.integers(0, len(labels), 2 * rows)]
        every = Dataset.from_dict({"text": list(texts), "label": targets})
        return DatasetDict({"search": every.select(range(rows)), "held_out": every.select(range(rows, 2 * rows))})

    return build


@pytest.fixture
def evaluator(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Evaluator]:
    """`evaluator(model, *objectives, **arguments)`, with the tokenizer unless another is given."""

    def build(model: PreTrainedModel, *objectives: object, **arguments: object) -> Evaluator:
        return Evaluator(objectives, **{"tokenizer": tokenizer, "config": model.config, "progress": False, **arguments})

    return build
