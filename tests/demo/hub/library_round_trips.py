"""Run by test_hub_libraries.py in a process whose environment points at a local Hub: one round trip a library."""

import sys

import datasets
import evaluate
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def transformers() -> None:
    """A sharded model and its tokenizer, pushed and loaded."""
    model = tiny_model()
    model.push_to_hub("demo/llama", max_shard_size="10KB")
    tiny_tokenizer().push_to_hub("demo/llama")
    files = HfApi().list_repo_files("demo/llama")
    assert "model.safetensors.index.json" in files, files
    loaded = AutoModelForCausalLM.from_pretrained("demo/llama")
    tokenizer = AutoTokenizer.from_pretrained("demo/llama")
    ids = tokenizer("a b", return_tensors="pt").input_ids
    assert ids.tolist() == [[1, 2]]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def peft() -> None:
    """An adapter, pushed and loaded on its base from the Hub."""
    tiny_model().push_to_hub("demo/base")
    base = AutoModelForCausalLM.from_pretrained("demo/base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.push_to_hub("demo/adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("demo/base"), "demo/adapter")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    assert HfApi().model_info("demo/adapter").config["peft"]["base_model_name_or_path"] == "demo/base"


def load_dataset() -> None:
    """A dataset, pushed, loaded and streamed."""
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    rows.push_to_hub("demo/rows", split="validation")
    assert datasets.load_dataset("demo/rows", split="validation").to_dict() == rows.to_dict()
    streamed = datasets.load_dataset("demo/rows", split="validation", streaming=True)
    assert [row["text"] for row in streamed] == ["a", "b"]


def load_metric() -> None:
    """A metric's script from a Space; nothing from anywhere else."""
    metric = evaluate.load("parity")
    assert metric.compute(predictions=[1, 2], references=[1, 3]) == {"parity": 0.5}


if __name__ == "__main__":
    globals()[sys.argv[1]]()
