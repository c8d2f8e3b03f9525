"""A stock model in memory that runs paths: what it computes is what the written recipe of the path computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from path_models import FAMILIES, IDS, MIXED, dare_ties, family, path_model, steps
from tiny_adapters import loaded, peft_merged, save_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_merge.errors import MergeError, RecipeError
from hf_merge.merging.path_model import PathModel, sharing
from hf_merge.merging.plan import open_inputs
from hf_merge.merging.prefixes import Prefixes
from hf_merge.recipes.path import MERGED, along
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.tokenizer import TokenizerRequest
from hf_merge.single import check, merge

KINDS = [name for name in FAMILIES if name != "t5"]


def stock(folder: Path) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if "bert" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def generated(model: PreTrainedModel) -> Tensor:
    ones = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=ones, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("name", KINDS)
def test_the_identity_path_of_every_model_gives_its_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    folders = family(tmp_path, name)
    model = path_model(dare_ties(folders))
    for folder in folders[1:]:
        assert torch.equal(logits(model.take(model.identity(folder.name))), logits(stock(folder)))


@pytest.mark.parametrize("name", KINDS)
def test_a_path_in_memory_is_its_written_recipe_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name)))
    merge(model.recipe_of(MIXED), tmp_path / "out", progress=False)
    assert torch.equal(logits(model.take(MIXED)), logits(stock(tmp_path / "out")))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "bert"])
def test_a_path_generates_with_a_cache_what_its_written_recipe_generates(name: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name)))
    merge(model.recipe_of(MIXED), tmp_path / "out", progress=False)
    assert torch.equal(generated(model.take(MIXED)), generated(stock(tmp_path / "out")))


@pytest.mark.parametrize("weight", [0.6, [0.1, 0.5, 0.9]], ids=str)
def test_the_identity_path_of_the_merge_is_the_merge(weight: object, tmp_path: Path) -> None:
    recipe = dare_ties(family(tmp_path, "llama"), parameters={"density": 0.5, "weight": weight})
    model = path_model(recipe)
    merge(recipe, tmp_path / "whole", progress=False)
    merge(model.recipe_of(model.identity(MERGED)), tmp_path / "path", progress=False)
    wanted = logits(stock(tmp_path / "whole"))
    assert torch.equal(logits(model.take(model.identity(MERGED))), wanted)
    assert torch.equal(logits(stock(tmp_path / "path")), wanted)


def test_a_merged_layer_is_the_same_wherever_it_goes_with_a_gradient_too(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama"), parameters={"density": 0.5, "weight": [0.1, 0.5, 0.9]}))
    merge(model.recipe_of(MIXED), tmp_path / "out", progress=False)
    assert torch.equal(logits(model.take(MIXED)), logits(stock(tmp_path / "out")))


def test_the_merge_is_replaced_in_place(tmp_path: Path) -> None:
    recipe = dare_ties(family(tmp_path, "llama"))
    other = dare_ties([tmp_path / name for name in ("base", "model1", "model2")], parameters={"weight": 0.1})
    model, fresh = path_model(recipe), path_model(other)
    model.take(MIXED)
    model.load(other)
    assert torch.equal(logits(model.model), logits(fresh.take(MIXED)))


def test_the_merge_of_other_models_is_refused(tmp_path: Path) -> None:
    folders = family(tmp_path, "llama")
    with pytest.raises(RecipeError, match="same models and base"):
        path_model(dare_ties(folders)).load(dare_ties([folders[0], folders[2], folders[1]]))


def test_a_pool_may_have_several_merges_and_a_path_takes_layers_of_one(tmp_path: Path) -> None:
    folders = family(tmp_path, "llama")
    # The second needs no base.
    recipes = dare_ties(folders), dare_ties(folders, method="linear", base=None, parameters={"weight": [0.1, 0.4]})
    model = PathModel(recipes[0], open_inputs(recipes[0]), prefixes=Prefixes(), merges=recipes[1:])
    assert dict(model.depths) == {"model1": 4, "model2": 4, "merged": 4, "merged 2": 4}
    second = tuple(replace(step, model="merged 2") if step.model == MERGED else step for step in MIXED)
    for path, recipe in zip((MIXED, second, MIXED), (*recipes, recipes[0]), strict=True):
        alone = path_model(recipe)
        assert torch.equal(logits(model.take(path)), logits(alone.take(MIXED)))
        assert model.recipe_of(path) == alone.recipe_of(MIXED)
    assert not torch.equal(logits(model.take(MIXED)), logits(model.take(second)))
    with pytest.raises(RecipeError, match="layers of one merge"):
        model.take(steps(("merged", 0), ("merged 2", 1)))


def test_a_model_that_has_a_merges_name_is_refused(tmp_path: Path) -> None:
    recipe = dare_ties(family(tmp_path, "llama"))
    named = replace(recipe, models=(replace(recipe.models[0], name="merged 2"), recipe.models[1]))
    path_model(named)
    with pytest.raises(RecipeError, match="calls the merge 'merged 2'"):
        PathModel(named, open_inputs(named), merges=[named])


def test_layers_along_a_path_share_their_weights_with_the_models(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    model.take(steps(("model1", 1), ("model1", 1)))
    first, second = model.layers
    assert first is not second
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight


def test_a_shared_module_has_attributes_of_its_own() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    twin = sharing(module)
    twin[0].mark = 1
    twin.register_forward_hook(lambda *_: torch.zeros(1))
    assert not hasattr(module[0], "mark")
    assert module(torch.ones(1, 2)).shape == (1, 2)


def test_kinds_of_layers_follow_the_path_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "gemma2")))
    path = steps(("model1", 1), ("merged", 1), ("model2", 0))
    wanted = ["full_attention", "full_attention", "sliding_attention"]
    assert model.take(path).config.layer_types == wanted
    assert check(model.recipe_of(path)).config["layer_types"] == wanted


def test_kinds_of_layers_follow_the_path_where_the_config_leaves_them_to_transformers(tmp_path: Path) -> None:
    folders = family(tmp_path, "gemma2")
    for folder in folders:
        text = (folder / "config.json").read_text()
        start = text.index('"layer_types"')
        (folder / "config.json").write_text(text[:start] + text[text.index("],", start) + 2 :])
    model = path_model(dare_ties(folders))
    path = steps(("model1", 1), ("merged", 1), ("model2", 0))
    merge(model.recipe_of(path), tmp_path / "out", progress=False)
    assert stock(tmp_path / "out").config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert torch.equal(logits(model.take(path)), logits(stock(tmp_path / "out")))


def test_hidden_states_that_are_asked_for_are_those_of_the_path(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")), Prefixes())
    for path in (MIXED, MIXED[:3]):
        with torch.no_grad():
            states = model.take(path)(IDS, output_hidden_states=True).hidden_states
        assert len(states) == len(path) + 1


def test_models_of_several_depths_have_paths_through_all_of_them_and_no_merge(tmp_path: Path) -> None:
    first, second = family(tmp_path, "llama", depths=(3, 5))
    recipe = Recipe(method="linear", models=(str(first), str(second)))
    model = path_model(recipe)
    path = steps(("base", 0), ("model1", 4), ("base", 2, 0.9), ("model1", 1), ("model1", 2), ("model1", 3))
    merge(model.recipe_of(path), tmp_path / "out", progress=False)
    assert dict(model.depths) == {"base": 3, "model1": 5}
    assert stock(tmp_path / "out").config.num_hidden_layers == 6
    torch.testing.assert_close(logits(model.take(path)), logits(stock(tmp_path / "out")), rtol=0, atol=5e-4)
    for folder in (first, second):
        assert torch.equal(logits(model.take(model.identity(folder.name))), logits(stock(folder)))
    with pytest.raises(MergeError, match="several depths have no merge"):
        model.load(recipe)
    with pytest.raises(RecipeError, match="merged"):
        model.take(steps(("merged", 0)))


DIFFERENT = {
    "hidden_size": ({"hidden_size": 64}, "hidden_size is 64, .* has 32; the residual stream has one width"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads is 4, .*one layout of heads"),
    "mlp": ({"intermediate_size": 64}, "intermediate_size is 64, .*one kind of MLP"),
    "eps": ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, .*one kind of norm"),
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is .*positions mean the same"),
    "vocabulary": ({"vocab_size": 97}, "vocab_size is 97, .*tokens mean the same"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_models_that_no_one_config_describes_are_refused_before_weights_are_read(what: str, tmp_path: Path) -> None:
    config, message = DIFFERENT[what]
    (first,) = family(tmp_path / "one", "llama", depths=(2,))
    (second,) = family(tmp_path / "two", "llama", depths=(3,), **config)
    for folder in (first, second):
        (folder / "model.safetensors").write_bytes(b"not to be read")
    recipe = Recipe(method="linear", models=(str(first), str(second)))
    with pytest.raises(MergeError, match=message):
        path_model(recipe)


def test_models_of_other_architectures_are_refused(tmp_path: Path) -> None:
    (first,), (second,) = family(tmp_path / "one", "llama", depths=(2,)), family(tmp_path / "two", "qwen2", depths=(2,))
    with pytest.raises(MergeError, match="layers are of one architecture"):
        path_model(Recipe(method="linear", models=(str(first), str(second))))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("t5", {}, "an encoder and a decoder"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "a layer that moved is another one"),
    ],
)
def test_models_without_layers_that_can_move_are_refused_with_the_reason(
    name: str, config: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MergeError, match=message):
        path_model(dare_ties(family(tmp_path, name, **config)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((), "needs steps"),
        (steps(("model3", 0)), "Did you mean"),
        (steps(("model1", 4)), "the model has 4"),
        (steps(("model1", 0, 0.0)), "positive number"),
    ],
    ids=str,
)
def test_paths_that_the_pool_does_not_have_are_refused(path: tuple, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        path_model(dare_ties(family(tmp_path, "llama"))).take(path)


def test_statistics_say_how_much_and_where_each_block_differs_from_the_base(tmp_path: Path) -> None:
    folders = family(tmp_path, "llama")
    model = path_model(dare_ties(folders, models=(str(folders[1]), str(folders[0])), method="linear", parameters={}))
    names = model.blocks
    own, there = stock(folders[1]).model.layers[2].mlp, stock(folders[0]).model.layers[2].mlp
    theta, anchor = (torch.cat([p.detach().flatten() for p in mlp.parameters()]).double() for mlp in (own, there))
    delta = theta - anchor
    found = model.statistics()
    assert found.shape == (12, 6)
    assert found[names.index(("model1", 2)), 2] == pytest.approx(float(torch.log(delta.norm() / anchor.norm())), abs=1e-5)
    assert found[names.index(("model1", 2)), 3] == pytest.approx(float(delta @ anchor / delta.norm() / anchor.norm()), abs=1e-5)
    assert np.allclose(found[names.index(("base", 0))], [np.log(1e-8), 0] * 3)


def test_without_a_base_statistics_are_zeros(tmp_path: Path) -> None:
    recipe = Recipe(method="linear", models=tuple(map(str, family(tmp_path, "llama", depths=(2, 3)))))
    assert not path_model(recipe).statistics().any()


def test_models_of_several_dtypes_run_in_the_first_ones(tmp_path: Path) -> None:
    folders = family(tmp_path, "llama")
    half = AutoModelForCausalLM.from_pretrained(folders[2]).to(torch.bfloat16)
    half.save_pretrained(folders[2])
    model = path_model(dare_ties(folders))
    merge(model.recipe_of(MIXED), tmp_path / "out", progress=False)
    assert model.take(MIXED).dtype == torch.float32
    assert torch.equal(logits(model.model), logits(stock(tmp_path / "out")))


@pytest.mark.parametrize("what", ["layers", "tokenizer"])
def test_recipes_of_other_than_whole_models_of_one_vocabulary_are_refused(what: str, tmp_path: Path) -> None:
    recipe = dare_ties(family(tmp_path, "llama"))
    other = along(recipe, MIXED, 4) if what == "layers" else replace(recipe, tokenizer=TokenizerRequest(source="union"))
    with pytest.raises(RecipeError, match=f"without (a )?{what}"):
        path_model(other)


def test_layers_of_adapters_are_those_of_their_folded_models(tmp_path: Path) -> None:
    (base,) = family(tmp_path, "llama", depths=(4,))
    adapters = [save_adapter(base, tmp_path / f"lora{i}", "llama", i, target_modules=["q_proj", "down_proj"]) for i in (1, 2)]
    recipe = Recipe(method="linear", base=str(base), models=tuple(map(str, adapters)), parameters={"weight": 0.5})
    model = path_model(recipe)
    path = steps(("lora1", 0), ("merged", 1), ("lora2", 1), ("", 3))
    merge(model.recipe_of(path), tmp_path / "out", progress=False)
    assert torch.equal(logits(model.take(path)), logits(stock(tmp_path / "out")))
    whole = loaded(base, "llama")
    whole.load_state_dict(peft_merged(base, adapters[0], "llama"))
    torch.testing.assert_close(logits(model.take(model.identity("lora1"))), logits(whole.eval()))
