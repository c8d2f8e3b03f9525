"""What goes with the tensors: everything that makes them a model, and no code."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import Maker

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.companions import companion_files
from hf_merge.demo.hub.server import LocalHub
from hf_merge.model_ref import ModelRef

CARRIED = [
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
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
]
LEFT = [
    "modeling_custom.py",
    "tokenization_custom.py",
    "README.md",
    "LICENSE",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "trainer_state.json",
    "adapter_config.json",
    ".gitattributes",
    "recipe.yaml",
]


def source(folder: Path, **config: object) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(ModelRef(str(folder)))


def config_of(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict:
    return json.loads(companion_files(checkpoint, dtype)["config.json"])


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_what_a_model_needs_is_carried_byte_for_byte_and_nothing_else_is(where: str, tmp_path: Path, hub: LocalHub) -> None:
    checkpoint = source(tmp_path / "model", model_type="x")
    content = {name: f"content of {name}\r\n é".encode() for name in [*CARRIED, *LEFT]}
    for name, data in content.items():
        (tmp_path / "model" / name).write_bytes(data)
    (tmp_path / "model/sub").mkdir()
    (tmp_path / "model/sub/vocab.txt").write_text("not at the top")
    if where == "hub":
        hub.seed("companions/model", tmp_path / "model")
        checkpoint = Checkpoint(ModelRef("companions/model"))
    found = companion_files(checkpoint, None)
    assert found.keys() == {*CARRIED, "config.json"}
    assert all(found[name] == content[name] for name in CARRIED)


def test_a_model_without_config_gets_none(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    assert companion_files(Checkpoint(ModelRef(str(tmp_path))), torch.float16).keys() == {"vocab.txt"}


@pytest.mark.parametrize("known_as", ["dtype", "torch_dtype"])
def test_the_config_says_the_result_s_dtype_once(known_as: str, tmp_path: Path) -> None:
    found = config_of(source(tmp_path / "model", model_type="x", **{known_as: "float32"}), torch.bfloat16)
    assert found == {"model_type": "x", "dtype": "bfloat16"}


@pytest.mark.parametrize("known_as", ["dtype", "torch_dtype"])
def test_without_a_dtype_the_config_keeps_its_own(known_as: str, tmp_path: Path) -> None:
    config = {"model_type": "x", known_as: "float16"}
    assert config_of(source(tmp_path / "model", **config), None) == config


def test_the_config_does_not_say_where_the_source_lay(tmp_path: Path) -> None:
    assert config_of(source(tmp_path / "model", _name_or_path="/home/me/secret", model_type="x"), None) == {"model_type": "x"}


def test_the_source_s_own_config_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "model", _name_or_path="org/m", torch_dtype="float32")
    companion_files(checkpoint, torch.float16)
    assert checkpoint.config == {"_name_or_path": "org/m", "torch_dtype": "float32"}


def test_the_config_points_to_no_code_because_none_is_carried(tmp_path: Path) -> None:
    found = config_of(source(tmp_path / "model", auto_map={"AutoModel": "modeling_x.X"}, model_type="x"), None)
    assert found == {"model_type": "x"}


def test_a_sentence_transformers_model_keeps_its_modules(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    (folder,) = make("bert", 1)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text("[]")
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text("{}")
    hub.seed("sentence/model", folder)
    local, remote = (companion_files(Checkpoint(ModelRef.parse(ref)), None) for ref in (folder, "sentence/model"))
    assert local == remote
    assert {"modules.json", "1_Pooling/config.json"} <= local.keys()
    assert "other/config.json" not in local
