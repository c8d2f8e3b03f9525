"""Results made of slices of the models' layers: the right tensors, the right config, and logits of the stack done by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Maker
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_merge.errors import MergeError
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

IDS = torch.arange(3, 15).reshape(1, -1)


def ranges(*parts: tuple[str, int, int], **parameters: object) -> LayerMap:
    """Slices of one source each."""
    return LayerMap(tuple(Slice(sources=(LayerRange(model=m, start=a, stop=b),), parameters=parameters) for m, a, b in parts))


def passthrough(models: list[Path], layers: LayerMap, **more: object) -> Recipe:
    return Recipe(method="passthrough", models=tuple(map(str, models)), layers=layers, **more)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_frankenmerge_loads_and_its_logits_are_those_of_the_layer_stack_done_by_hand(make: Maker, tmp_path: Path) -> None:
    first, second = make("llama", 2, num_hidden_layers=6)
    merge(passthrough([first, second], ranges(("base", 0, 4), ("model1", 0, 6))), tmp_path / "out", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    a, b = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (first, second))
    assert merged.config.num_hidden_layers == 10
    by_hand = AutoModelForCausalLM.from_pretrained(first).eval()
    by_hand.model.layers = torch.nn.ModuleList([*a.model.layers[:4], *b.model.layers])
    by_hand.model.norm, by_hand.lm_head = b.model.norm, b.lm_head
    for i, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = i
    by_hand.config.num_hidden_layers = 10
    with torch.no_grad():
        assert torch.equal(merged(IDS, use_cache=False).logits, by_hand(IDS, use_cache=False).logits)


def test_one_model_s_layers_may_be_repeated(make: Maker, tmp_path: Path) -> None:
    (model,) = make("gpt2", 1)
    merge(passthrough([model], ranges(("base", 0, 2), ("base", 1, 2), ("base", 0, 1))), tmp_path / "out", progress=False)
    got, own = tensors(tmp_path / "out"), tensors(model)
    assert json.loads((tmp_path / "out/config.json").read_text())["n_layer"] == 4
    for new, old in enumerate([0, 1, 1, 0]):
        assert torch.equal(got[f"transformer.h.{new}.mlp.c_fc.weight"], own[f"transformer.h.{old}.mlp.c_fc.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_layer == 4


def test_lists_with_an_entry_for_each_layer_follow_the_layers(make: Maker, tmp_path: Path) -> None:
    kinds = [["full_attention", "sliding_attention", "full_attention"], ["sliding_attention"] * 3]
    folders = make("llama", 2, num_hidden_layers=3)
    for folder, own in zip(folders, kinds, strict=True):
        config = json.loads((folder / "config.json").read_text()) | {"layer_types": own, "other": [1, 2]}
        (folder / "config.json").write_text(json.dumps(config))
    plan = check(passthrough(folders, ranges(("base", 1, 3), ("model1", 0, 1), ("base", 0, 2))))
    assert plan.config["layer_types"] == [kinds[0][1], kinds[0][2], kinds[1][0], kinds[0][0], kinds[0][1]]
    assert (plan.config["num_hidden_layers"], plan.config["other"]) == (5, [1, 2])


def test_sources_of_a_slice_are_merged_layer_by_layer_with_their_own_weights(make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2, num_hidden_layers=3)
    both = Slice(
        sources=(
            LayerRange(model="base", start=0, stop=2, parameters={"weight": 0.25}),
            LayerRange(model="model1", start=1, stop=3, parameters={"weight": [0.75, 0.25]}),
        ),
        parameters={"normalize": False},
    )
    recipe = Recipe(method="linear", models=tuple(map(str, folders)), layers=LayerMap((both,)))
    merge(recipe, tmp_path / "out", progress=False)
    got, a, b = tensors(tmp_path / "out"), *map(tensors, folders)
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(got[name.format(0)], 0.25 * a[name.format(0)] + 0.75 * b[name.format(1)])
    torch.testing.assert_close(got[name.format(1)], 0.25 * a[name.format(1)] + 0.25 * b[name.format(2)])
    torch.testing.assert_close(got["model.norm.weight"], 0.25 * a["model.norm.weight"] + 0.75 * b["model.norm.weight"])
    assert name.format(2) not in got


def test_differences_are_from_the_base_s_own_layer_or_from_the_one_that_the_slice_names(make: Maker, tmp_path: Path) -> None:
    base, model = make("llama", 2, num_hidden_layers=3)
    same = Slice(sources=(LayerRange(model="model1", start=1, stop=2),))
    named = Slice(sources=(LayerRange(model="model1", start=1, stop=2), LayerRange(model="", start=2, stop=3)))
    recipe = Recipe(
        method="task_arithmetic",
        base=ModelRef(str(base)),
        models=(str(model),),  # type: ignore[arg-type]
        parameters={"scaling": 0.5},
        layers=LayerMap((same, named)),
    )
    merge(recipe, tmp_path / "out", progress=False)
    got, anchor, own = tensors(tmp_path / "out"), tensors(base), tensors(model)
    name = "model.layers.{}.mlp.up_proj.weight"
    for new, old in ((0, 1), (1, 2)):
        expected = anchor[name.format(old)] + 0.5 * (own[name.format(1)] - anchor[name.format(old)])
        torch.testing.assert_close(got[name.format(new)], expected)


def test_slices_of_the_base_alone_are_the_base_s(make: Maker, tmp_path: Path) -> None:
    base, model = make("llama", 2)
    alone = Slice(sources=(LayerRange(model="", start=1, stop=2),))
    merged = Slice(sources=(LayerRange(model="model1", start=1, stop=2),))
    recipe = Recipe(
        method="task_arithmetic",
        base=ModelRef(str(base)),
        models=(str(model),),  # type: ignore[arg-type]
        layers=LayerMap((alone, merged)),
    )
    merge(recipe, tmp_path / "out", progress=False)
    got, anchor, own = tensors(tmp_path / "out"), tensors(base), tensors(model)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(got[name.format(0)], anchor[name.format(1)])
    assert torch.allclose(got[name.format(1)], own[name.format(1)])
    assert torch.equal(got["model.embed_tokens.weight"], anchor["model.embed_tokens.weight"])


def test_scales_of_a_passthrough_apply_to_the_tensors_that_a_filter_names(make: Maker, tmp_path: Path) -> None:
    (model,) = make("llama", 1)
    scale = [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]
    part = Slice(sources=(LayerRange(model="base", start=0, stop=2, parameters={"scale": scale}),))
    merge(passthrough([model], LayerMap((part,))), tmp_path / "out", progress=False)
    got, own = tensors(tmp_path / "out"), tensors(model)
    assert all(torch.equal(got[name], own[name] * (0.5 if "o_proj" in name else 1.0)) for name in own)


def test_the_parts_of_an_encoder_decoder_have_slices_of_their_own(make: Maker, tmp_path: Path) -> None:
    (model,) = make("t5", 1, num_layers=2, num_decoder_layers=2)
    parts = (
        Slice(sources=(LayerRange(model="base", start=0, stop=2),), module="encoder"),
        Slice(sources=(LayerRange(model="base", start=0, stop=2),), module="decoder"),
        Slice(sources=(LayerRange(model="base", start=1, stop=2),), module="decoder"),
    )
    merge(passthrough([model], LayerMap(parts)), tmp_path / "out", progress=False)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.num_layers, loaded.config.num_decoder_layers) == (2, 3)
    with pytest.raises(MergeError, match="modules"):
        check(passthrough([model], ranges(("base", 0, 1))))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((("base", 0, 3),), r"has 2 layers, and a slice takes layers \[0, 3\)"),
        ((("other", 0, 2),), "which is not a model of the recipe"),
        ((("base", 1, 1),), "0 <= start < stop"),
    ],
)
def test_layers_that_are_not_there_are_an_error(parts: tuple, message: str, make: Maker) -> None:
    (model,) = make("llama", 1)
    with pytest.raises(ValueError if "recipe" in message or "start" in message else MergeError, match=message):
        check(passthrough([model], ranges(*parts)))


def test_models_of_other_widths_are_an_error_that_names_the_tensors(make: Maker) -> None:
    (first,), (second,) = make("llama", 1), make("llama", 1, parent="wide", hidden_size=64)
    recipe = Recipe(
        method="passthrough", models=(str(first), str(second)), layers=ranges(("models/base", 0, 1), ("wide/base", 0, 1))
    )
    with pytest.raises(MergeError, match=r"would not load|of another shape"):
        check(recipe)


def test_a_gradient_goes_from_the_first_to_the_last_layer_and_what_is_in_none_takes_its_first_number(
    make: Maker, tmp_path: Path
) -> None:
    first, second = make("llama", 2, num_hidden_layers=3)
    recipe = Recipe(method="slerp", models=(str(first), str(second)), parameters={"t": [0.0, 1.0]})
    merge(recipe, tmp_path / "out", progress=False)
    got, a, b = tensors(tmp_path / "out"), tensors(first), tensors(second)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.allclose(got[name.format(0)], a[name.format(0)])
    assert torch.allclose(got[name.format(2)], b[name.format(2)])
    assert not torch.allclose(got[name.format(1)], a[name.format(1)])
    assert torch.allclose(got["lm_head.weight"], a["lm_head.weight"])


def test_filters_give_each_kind_of_tensor_its_number(make: Maker, tmp_path: Path) -> None:
    first, second = make("llama", 2)
    t = [{"filter": "self_attn", "value": 0.0}, {"filter": "mlp", "value": [1.0, 0.0]}, {"value": 1.0}]
    recipe = Recipe(method="slerp", models=(str(first), str(second)), parameters={"t": t})
    merge(recipe, tmp_path / "out", progress=False)
    got, a, b = tensors(tmp_path / "out"), tensors(first), tensors(second)
    for name, value in got.items():
        from_first = "self_attn" in name or "layers.1.mlp" in name
        assert torch.allclose(value, (a if from_first else b)[name]), name
