"""`hf-merge check` on the Hub: what a merge would cost, and every fault with its remedy, from headers alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_models import WORDS, make_models
from transformers import AutoModelForCausalLM

from hf_merge.cli import main
from hf_merge.demo.hub.server import LocalHub

HEADER = 100_000
LARGE = {"hidden_size": 128, "intermediate_size": 512}
"""Models of more than a megabyte, next to which a header is small."""
SHARD = "600kB"


@dataclass(frozen=True)
class Folders:
    """Models to break copies of: `base` and `model` of one shape, a smaller `other`, an adapter of another base."""

    root: Path

    def copy(self, name: str, to: str) -> Path:
        return Path(shutil.copytree(self.root / name, self.root / "broken" / to, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("check")
    base, model = make_models(root, "llama", 2, shard=SHARD, **LARGE)
    base.rename(root / "base")
    model.rename(root / "model")
    for name, architecture, settings in (
        ("narrow", "llama", {"hidden_size": 64, "intermediate_size": 512}),
        ("gpt2", "gpt2", {"n_embd": 128}),
        ("words", "llama", LARGE | {"words": [*WORDS[:-2], "other1", "other2"]}),
        ("tall", "llama", LARGE | {"num_hidden_layers": 3}),
    ):
        (made,) = make_models(root, architecture, 1, parent=f"making-{name}", **settings)
        made.rename(root / name)
    save_adapter(root / "gpt2", root / "adapter", "gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return Folders(root)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def check(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Puts folders on the Hub, checks a recipe of them, and looks that nothing but headers was read."""

    def checked(text: str, *options: str, seeded: dict[str, Path]) -> Answer:
        for repo_id, folder in seeded.items():
            hub.seed(repo_id, folder)
        hub.clear_requests()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        capsys.readouterr()
        code = main(["check", str(recipe), *options])
        shards = sum(1 for folder in seeded.values() for _ in folder.glob("*.safetensors"))
        assert hub.bytes_served("*.safetensors") <= shards * HEADER
        return Answer(code, *capsys.readouterr())

    return checked


def recipe_of(models: list[str], base: str = "check/base", more: str = "") -> str:
    return f"merge_method: ties\nbase_model: {base}\nmodels: [{', '.join(f'{{model: {model}}}' for model in models)}]\n{more}"


def nothing(folders: Folders) -> dict[str, Path]:
    return {}


def missing_shard(folders: Folders) -> dict[str, Path]:
    folder = folders.copy("model", "missing")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return {"check/missing": folder}


def truncated_shard(folders: Folders) -> dict[str, Path]:
    folder = folders.copy("model", "truncated")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    return {"check/truncated": folder}


def gptq(folders: Folders) -> dict[str, Path]:
    folder = folders.copy("words", "gptq")
    tensors = {
        name.replace("_proj.weight", "_proj.qweight"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return {"check/gptq": folder}


def empty(folders: Folders) -> dict[str, Path]:
    folder = folders.copy("words", "empty")
    (folder / "model.safetensors").unlink()
    return {"check/empty": folder}


def one(name: str) -> Callable[[Folders], dict[str, Path]]:
    return lambda folders: {f"check/{name}": folders.root / name}


FAULTS: dict[str, tuple[Callable[[Folders], dict[str, Path]], str, list[str]]] = {
    "a missing shard": (
        missing_shard,
        recipe_of(["check/model", "check/missing"]),
        ["check/missing@", "model-00002-of-", "missing"],
    ),
    "a truncated shard": (
        truncated_shard,
        recipe_of(["check/truncated"]),
        ["check/truncated@", "model-00002-of-", "truncated"],
    ),
    "another vocabulary": (
        one("words"),
        recipe_of(["check/model", "check/words"]),
        ["check/words@", "another vocabulary: 4 tokens differ", "'other1'", "tokenizer: {source: union}"],
    ),
    "other shapes": (
        one("narrow"),
        recipe_of(["check/model", "check/narrow"]),
        ["check/narrow@", "'model.embed_tokens.weight' has shape [96, 64]", "has [96, 128]", "'lm_head.weight'"],
    ),
    "another architecture": (
        one("gpt2"),
        recipe_of(["check/gpt2"]),
        [
            "model_type is 'gpt2'",
            "has 'llama'",
            "tensor 'model.norm.weight' is missing",
            "'transformer.wpe.weight' does not exist",
        ],
    ),
    "quantized weights": (
        gptq,
        recipe_of(["check/gptq"]),
        ["check/gptq@", "quantized (gptq)", "take the model that it was made from", "or save it dequantized"],
    ),
    "layers beyond the model": (
        nothing,
        "merge_method: passthrough\nslices:\n  - sources: [{model: check/base, layer_range: [0, 2]}]\n"
        "  - sources: [{model: check/model, layer_range: [1, 7]}]\n",
        ["check/model@", "has 2 layers", "layers [1, 7)"],
    ),
    "an adapter of another base": (
        one("adapter"),
        recipe_of(["check/adapter"]),
        ["check/adapter@", "no such tensors as the adapter changes", "c_attn.weight", "It was trained on "],
    ),
    "a misplaced key": (
        nothing,
        "merge_method: ties\nbase_model: check/base\nmodels: [{model: check/model, density: 0.3}]\n",
        ["'density'", "parameters"],
    ),
    "a misspelled key": (
        nothing,
        recipe_of(["check/model"], more="paramters: {density: 0.3}\n"),
        ["'paramters'", "Did you mean 'parameters'"],
    ),
    "a model that is nowhere": (nothing, recipe_of(["check/nowhere"]), ["check/nowhere", "not"]),
    "a model without weights": (
        empty,
        recipe_of(["check/empty"]),
        ["check/empty@", "has neither model.safetensors nor model.safetensors.index.json", "'config.json'"],
    ),
}


def sound(folders: Folders) -> dict[str, Path]:
    return {"check/base": folders.root / "base", "check/model": folders.root / "model"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_remedy_before_a_tensor_is_read(
    fault: str, folders: Folders, check: Callable[..., Answer]
) -> None:
    broken, recipe, said = FAULTS[fault]
    answer = check(recipe, seeded=sound(folders) | broken(folders))
    assert (answer.code, answer.out) == (1, "")
    assert [part for part in said if part not in answer.err] == [], answer.err


@pytest.mark.parametrize("fault", ["another vocabulary", "quantized weights", "a misplaced key"])
def test_a_fault_is_json_for_machines(fault: str, folders: Folders, check: Callable[..., Answer]) -> None:
    broken, recipe, said = FAULTS[fault]
    answer = check(recipe, "--json", seeded=sound(folders) | broken(folders))
    content = json.loads(answer.out)
    assert (answer.code, answer.err) == (1, "")
    assert content["error"] in ("MergeError", "CheckpointError", "RecipeError")
    assert all(part in content["message"] for part in said)


def test_all_faults_of_all_models_are_said_at_once(folders: Folders, check: Callable[..., Answer]) -> None:
    seeded = sound(folders) | one("words")(folders) | one("narrow")(folders) | one("tall")(folders)
    answer = check(recipe_of(["check/words", "check/narrow", "check/tall"]), seeded=seeded)
    for said in (
        "check/words@",
        "another vocabulary",
        "check/narrow@",
        "check/tall@",
        "'model.layers.2.mlp.up_proj.weight' does not",
    ):
        assert said in answer.err


def test_all_models_that_cannot_be_read_as_numbers_are_said_at_once(folders: Folders, check: Callable[..., Answer]) -> None:
    folder = gptq(folders)["check/gptq"]
    seeded = sound(folders) | {"check/gptq": folder, "check/gptq-too": folder}
    answer = check(recipe_of(["check/gptq", "check/gptq-too"]), seeded=seeded)
    assert "check/gptq@" in answer.err
    assert "check/gptq-too@" in answer.err


def test_a_sound_recipe_is_shown_with_all_that_it_costs(folders: Folders, check: Callable[..., Answer]) -> None:
    licensed = folders.copy("model", "licensed")
    (licensed / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    seeded = sound(folders) | {"check/licensed": licensed}
    answer = check(recipe_of(["check/model", "check/licensed"]), seeded=seeded)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders.root / "base").parameters())
    size = f"{parameters * 4 / 1e6:.1f} MB"
    assert (answer.code, answer.err) == (0, "")
    for said in (
        "TIES of model (weight 1, density",
        "check/base@",
        f"21 tensors, {size}, license: not declared",
        f"21 tensors, {size}, license: apache-2.0",
        f"{parameters:,} parameters, {size} in 1 shard; reads {3 * parameters * 4 / 1e6:.1f} MB",
        " s and ",
        " MB of memory for tensors on this machine",
    ):
        assert said in answer.out, said


def test_a_sound_recipe_s_costs_are_json_for_machines(folders: Folders, check: Callable[..., Answer]) -> None:
    answer = check(recipe_of(["check/model"]), "--json", seeded=sound(folders))
    content = json.loads(answer.out)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders.root / "base").parameters())
    assert (content["tensors"], content["parameters"]) == (21, parameters)
    assert (content["bytes_read"], content["bytes_written"]) == (2 * 4 * parameters, content["bytes_written"])
    assert 4 * parameters <= content["bytes_written"] <= 4 * parameters + 10_000
    assert content["memory"] > 0
    assert content["seconds"] > 0
    assert content["licenses"] == {"check/base": None, "check/model": None}
    assert [model.partition("@")[0] for model in content["models"]] == ["check/base", "check/model"]
    assert all(len(model.partition("@")[2]) == 40 for model in content["models"])


def test_an_adapter_s_cost_is_that_of_its_factors(folders: Folders, check: Callable[..., Answer], tmp_path: Path) -> None:
    adapter = save_adapter(folders.root / "base", tmp_path / "lora", "llama", r=4, target_modules=["q_proj"])
    seeded = sound(folders) | {"check/lora": adapter}
    content = json.loads(check(recipe_of(["check/lora"]), "--json", seeded=seeded).out)
    factors = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert content["bytes_read"] == 4 * content["parameters"] + factors
    assert [model.partition("@")[0] for model in content["models"]] == ["check/base", "check/lora"]


def test_a_union_of_vocabularies_is_shown_with_its_tokens(folders: Folders, check: Callable[..., Answer]) -> None:
    recipe = recipe_of(["check/words"], more="tokenizer: {source: union}\n")
    answer = check(recipe, seeded=sound(folders) | one("words")(folders))
    assert answer.code == 0, answer.err
    assert "Vocabulary: 98 tokens in 98 rows, 2 added: 'other1', 'other2'" in answer.out
