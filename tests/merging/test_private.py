"""Models of which some have tensors that others lack (heads, buffers), merged under each policy for them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import peft_merged, save_adapter
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)

from hf_merge.cli import main
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, MergeError, RecipeError
from hf_merge.merging.plan import open_inputs, plan
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

SHARED = "encoder.layer.0.attention.self.query.weight"
HEAD = ("classifier.weight", "classifier.bias")
_SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def saved(cls: type, folder: Path, seed: int, **settings: object) -> Path:
    torch.manual_seed(seed)
    model = cls(BertConfig(**{**_SETTINGS, **settings}))
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    """A masked language model, an encoder alone with a buffer of integers, and a classifier."""
    root = tmp_path / "models"
    base = saved(BertForMaskedLM, root / "base", 0)
    encoder = saved(BertModel, root / "encoder", 1)
    store(encoder, stored(encoder) | {"embeddings.position_ids": torch.arange(16)[None]})
    return [base, encoder, saved(BertForSequenceClassification, root / "classifier", 2, num_labels=3)]


def recipe_of(folders: list[Path], private: str, **more: object) -> Recipe:
    base, *models = map(str, folders)
    settings = {"method": "task_arithmetic", "base": base, "parameters": {"weight": 0.5}} | more
    return Recipe(models=tuple(models), private=private, **settings)  # type: ignore[arg-type]


def outcome(folders: list[Path], private: str) -> dict[str, bool]:
    """Names of the result's tensors, and whether each is merged, without asking whether it loads."""
    recipe = recipe_of(folders, private)
    return {name: job.method is not None for name, job in plan(recipe, open_inputs(recipe)).jobs.items()}


def shared_by(folders: list[Path]) -> set[str]:
    """Names without `bert.` of the tensors that all have."""
    return set.intersection(*({name.removeprefix("bert.") for name in stored(folder)} for folder in folders))


def test_private_tensors_are_refused_with_their_names_unless_a_policy_is_given(family: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeError) as caught:
        merge(recipe_of(family, "refuse"), tmp_path / "out", progress=False)
    for said in ("'classifier.weight' does not exist", "'cls.predictions.bias' is missing", "another architecture"):
        assert said in str(caught.value)
    assert "position_ids" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_refusal_of_heads_alone_names_the_policies(family: list[Path]) -> None:
    with pytest.raises(MergeError, match=r"\nWhere only heads or buffers differ.* `private: base`.*`owner`.*`drop`"):
        check(recipe_of(family, "refuse"))


def test_with_base_the_result_is_the_base_s_model(family: list[Path], tmp_path: Path) -> None:
    merge(recipe_of(family, "base"), tmp_path / "out", progress=False)
    found, base = stored(tmp_path / "out"), stored(family[0])
    assert found.keys() == base.keys()
    heads = {name for name in base if name.startswith("cls.")}
    assert heads
    for name in heads:
        assert torch.equal(found[name], base[name])
    _, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("private", ["base", "owner", "drop"])
def test_what_all_have_is_merged_under_every_policy(private: str, family: list[Path]) -> None:
    merged = {name for name, done in outcome(family, private).items() if done}
    assert {name.removeprefix("bert.") for name in merged} == shared_by(family)


def test_values_that_all_have_follow_the_formula_whatever_their_prefix(family: list[Path], tmp_path: Path) -> None:
    merge(recipe_of(family, "base"), tmp_path / "out", progress=False)
    base, encoder, classifier = (stored(folder) for folder in family)
    start = base[f"bert.{SHARED}"]
    expected = start + 0.5 * (encoder[SHARED] - start) + 0.5 * (classifier[f"bert.{SHARED}"] - start)
    assert torch.allclose(stored(tmp_path / "out")[f"bert.{SHARED}"], expected, atol=1e-6)


def test_with_owner_every_tensor_that_any_model_has_comes_out(family: list[Path]) -> None:
    found = outcome(family, "owner")
    assert set(HEAD) <= found.keys()
    assert not any(found[name] for name in HEAD)
    assert {"cls.predictions.bias", f"bert.{SHARED}"} <= found.keys()


def test_with_owner_nothing_comes_out_twice_where_prefixes_differ(family: list[Path]) -> None:
    every = {name.removeprefix("bert.") for folder in family for name in stored(folder)}
    assert sorted(name.removeprefix("bert.") for name in outcome(family, "owner")) == sorted(every)


def test_with_owner_each_head_loads_with_the_class_that_it_is_of(family: list[Path], tmp_path: Path) -> None:
    merge(recipe_of(family, "owner"), tmp_path / "out", progress=False)
    for cls, settings in ((BertForMaskedLM, {}), (BertForSequenceClassification, {"num_labels": 3})):
        _, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, **settings)
        assert not info["missing_keys"]


def test_models_that_all_hold_more_than_their_class_wants_are_no_fault(tmp_path: Path) -> None:
    folders = [saved(BertForPreTraining, tmp_path / str(n), n) for n in range(2)]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
        (folder / "config.json").write_text(json.dumps(config))
    assert "cls.seq_relationship.weight" in check(recipe_of(folders, "refuse")).jobs


def test_with_drop_only_what_all_have_comes_out(family: list[Path]) -> None:
    assert {name.removeprefix("bert.") for name in outcome(family, "drop")} == shared_by(family)


def test_a_result_that_would_not_load_is_refused_with_the_tensors(family: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"would not load as BertForMaskedLM: .*missing cls\.predictions"):
        merge(recipe_of(family, "drop"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_heads_owner_as_base_gives_a_classifier_that_loads(family: list[Path], tmp_path: Path) -> None:
    base, encoder, classifier = family
    merge(recipe_of([classifier, encoder, base], "base"), tmp_path / "out", progress=False)
    found = stored(tmp_path / "out")
    for name in HEAD:
        assert torch.equal(found[name], stored(classifier)[name])
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_an_encoder_as_base_takes_the_encoders_of_models_with_heads(family: list[Path], tmp_path: Path) -> None:
    base, encoder, classifier = family
    merge(recipe_of([encoder, base, classifier], "base"), tmp_path / "out", progress=False)
    found = stored(tmp_path / "out")
    assert found.keys() == stored(encoder).keys()
    assert torch.equal(found["embeddings.position_ids"], torch.arange(16)[None])
    model, info = BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.state_dict()[SHARED], found[SHARED])


@pytest.mark.parametrize("private", ["base", "owner"])
def test_heads_of_two_tasks_are_private_and_the_base_s_is_kept(private: str, tmp_path: Path) -> None:
    folders = [saved(BertForSequenceClassification, tmp_path / str(n), n, num_labels=n + 2) for n in range(3)]
    merge(recipe_of(folders, private), tmp_path / "out", progress=False)
    found = stored(tmp_path / "out")
    for name in HEAD:
        assert torch.equal(found[name], stored(folders[0])[name])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


def test_heads_of_one_shape_are_merged(tmp_path: Path) -> None:
    folders = [saved(BertForSequenceClassification, tmp_path / str(n), n, num_labels=3) for n in range(2)]
    merge(recipe_of(folders, "base"), tmp_path / "out", progress=False)
    one, two = stored(folders[0])[HEAD[0]], stored(folders[1])[HEAD[0]]
    assert torch.allclose(stored(tmp_path / "out")[HEAD[0]], one + 0.5 * (two - one), atol=1e-6)


@pytest.mark.parametrize("private", ["base", "owner", "drop"])
def test_models_that_share_next_to_nothing_are_refused_under_every_policy(private: str, tmp_path: Path) -> None:
    narrow = saved(BertForSequenceClassification, tmp_path / "narrow", 0)
    wide = saved(BertForSequenceClassification, tmp_path / "wide", 1, hidden_size=64)
    with pytest.raises(MergeError, match=r"Only \d of the 41 tensors of .*narrow are in all the models in one shape"):
        check(recipe_of([narrow, wide], private))


def test_the_refusal_of_models_of_another_width_does_not_offer_a_policy(tmp_path: Path) -> None:
    narrow = saved(BertForSequenceClassification, tmp_path / "narrow", 0)
    wide = saved(BertForSequenceClassification, tmp_path / "wide", 1, hidden_size=64)
    with pytest.raises(MergeError) as caught:
        check(recipe_of([narrow, wide], "refuse"))
    assert "private" not in str(caught.value)


@pytest.mark.parametrize("private", ["base", "drop"])
def test_weights_without_a_base_are_averaged_over_what_all_have(private: str, family: list[Path], tmp_path: Path) -> None:
    _, encoder, classifier = family
    recipe = Recipe(method="linear", models=(str(encoder), str(classifier)), private=private)  # type: ignore[arg-type]
    merge(recipe, tmp_path / "out", progress=False)
    expected = (stored(encoder)[SHARED] + stored(classifier)[f"bert.{SHARED}"]) / 2
    assert torch.allclose(stored(tmp_path / "out")[SHARED], expected, atol=1e-6)
    assert BertModel.from_pretrained(tmp_path / "out").config.hidden_size == 32


@pytest.mark.parametrize("private", ["base", "owner"])
def test_the_head_that_an_adapter_trained_takes_the_place_of_the_base_s(private: str, tmp_path: Path) -> None:
    base = saved(BertForSequenceClassification, tmp_path / "base", 0, num_labels=3)
    adapter = save_adapter(base, tmp_path / "adapter", "bert", r=2, target_modules=["query"], modules_to_save=["classifier"])
    merge(recipe_of([base, adapter], private, parameters={"weight": 1.0}), tmp_path / "out", progress=False)
    found, expected = stored(tmp_path / "out"), peft_merged(base, adapter, "bert")
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name


def test_with_owner_the_head_that_an_adapter_trained_on_an_encoder_comes_out(tmp_path: Path) -> None:
    encoder = saved(BertModel, tmp_path / "encoder", 0)
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=3)
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    trained.save_pretrained(tmp_path / "adapter")
    recipe = recipe_of([encoder, tmp_path / "adapter"], "owner")
    merge(recipe, tmp_path / "out", progress=False)
    loaded, info = BertForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.classifier.weight, trained.get_base_model().classifier.modules_to_save["default"].weight)


def test_the_policy_stands_in_yaml(family: list[Path], tmp_path: Path) -> None:
    base, encoder, classifier = family
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {encoder}}}, {{model: {classifier}}}]\n"
        "parameters: {weight: 0.5}\nprivate: base\n"
    )
    assert main(["merge", str(path), str(tmp_path / "out"), "--quiet"]) == 0
    merge(recipe_of(family, "base"), tmp_path / "expected", progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert yaml.load(tmp_path / "out/recipe.yaml").private == "base"


def test_an_unknown_policy_is_refused_with_those_that_are_known(family: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"'bse'\. Did you mean 'base'\? Known: base, drop, owner, refuse"):
        recipe_of(family, "bse")


def test_streaming_from_the_hub_gives_the_bits_of_the_disk(family: list[Path], hub: LocalHub, tmp_path: Path) -> None:
    for folder in family:
        hub.seed(f"private/{folder.name}", folder)
    merge(recipe_of([Path(f"private/{folder.name}") for folder in family], "base"), tmp_path / "hub", progress=False)
    merge(recipe_of(family, "base"), tmp_path / "disk", progress=False)
    assert (tmp_path / "hub/model.safetensors").read_bytes() == (tmp_path / "disk/model.safetensors").read_bytes()


def test_every_policy_makes_another_recipe(family: list[Path]) -> None:
    assert len({recipe_of(family, private).digest for private in ("refuse", "base", "owner", "drop")}) == 4


def reaction_models() -> Path | None:
    spec = importlib.util.find_spec("rxnfp")
    return Path(next(iter(spec.submodule_search_locations or ()))) / "models/transformers" if spec else None


@pytest.mark.slow
@pytest.mark.skipif(reaction_models() is None, reason="needs the package rxnfp (pip install --no-deps rxnfp==0.1.0)")
@pytest.mark.parametrize(("private", "tensors"), [("base", 207), ("owner", 209), ("drop", 199)])
def test_published_models_of_chemistry_merge_from_their_pickles(private: str, tensors: int, tmp_path: Path) -> None:
    root = reaction_models()
    assert root is not None
    folders = [root / name for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")]
    with pytest.raises(CheckpointError, match="pickles"):
        check(recipe_of(folders, private))
    merge(recipe_of(folders, private), tmp_path / "out", pickles=True, progress=False)
    parts = [torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True) for folder in folders]
    base, encoder, classifier = (part.get(SHARED, part.get(f"bert.{SHARED}")) for part in parts)
    found = stored(tmp_path / "out")
    assert len(found) == tensors
    expected = base + 0.5 * (encoder - base) + 0.5 * (classifier - base)
    assert torch.allclose(found[f"bert.{SHARED}"], expected, atol=1e-6)
    if private == "base":
        config = BertConfig(**json.loads((tmp_path / "out/config.json").read_text()))
        _, info = BertForPreTraining.from_pretrained(tmp_path / "out", config=config, output_loading_info=True)
        assert not info["missing_keys"]
