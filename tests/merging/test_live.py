"""One model in memory takes recipe after recipe, and each time is what was merged, on whatever road."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, Maker
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import MergeError
from hf_merge.merging import live as live_module
from hf_merge.merging.live import LiveModel, load_tokenizer
from hf_merge.merging.plan import open_inputs
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import merge


def alone(model: object) -> Recipe:
    return Recipe(method="linear", models=(str(model),))


def mean(models: list, **more: object) -> Recipe:
    return Recipe(method="linear", models=tuple(map(str, models)), **more)  # type: ignore[arg-type]


def state(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_live_model_starts_as_its_recipe_ready_to_be_measured(make: Maker) -> None:
    folders = make("llama", 3)
    live = LiveModel(alone(folders[1]), open_inputs(mean(folders)))
    assert same(live.model.state_dict(), state(folders[1]))
    assert not live.model.training


def test_a_recipe_leaves_nothing_of_those_before_it(make: Maker) -> None:
    folders = make("llama", 3)
    live = LiveModel(alone(folders[0]), open_inputs(mean(folders)))
    live.load(mean(folders, dtype=None))
    assert not same(live.model.state_dict(), state(folders[0]))
    for folder in reversed(folders):
        live.load(alone(folder))
        assert same(live.model.state_dict(), state(folder))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parameters_stay_where_they_are(family: str, make: Maker) -> None:
    folders = make(family, 2)
    live = LiveModel(alone(folders[0]), open_inputs(mean(folders)))
    before = {name: parameter.data_ptr() for name, parameter in live.model.named_parameters()}
    live.load(mean(folders))
    assert {name: parameter.data_ptr() for name, parameter in live.model.named_parameters()} == before


def test_tied_parameters_stay_tied(make: Maker) -> None:
    folders = make("tied-llama", 2)
    live = LiveModel(alone(folders[0]), open_inputs(mean(folders)))
    live.load(alone(folders[1]))
    assert live.model.lm_head.weight is live.model.model.embed_tokens.weight
    assert same(live.model.state_dict(), state(folders[1]))


def test_tied_models_fill_both_tensors_of_an_untied_one(make: Maker) -> None:
    base, tied = make("llama", 1)[0], make("tied-llama", 2, parent="tied")[1]
    live = LiveModel(alone(base), open_inputs(mean([base, tied])))
    live.load(Recipe(method="linear", base=ModelRef(str(base)), models=(str(tied),)))
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(live.model.lm_head.weight, embedding)
    assert torch.equal(live.model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_live_model_has_the_recipe_s_dtype(dtype: str, make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    live = LiveModel(mean(folders, dtype=dtype), open_inputs(mean(folders)))
    merge(mean(folders, dtype=dtype), tmp_path / "out", progress=False)
    assert live.model.dtype == getattr(torch, dtype)
    assert same(live.model.state_dict(), state(tmp_path / "out"))


def test_models_on_the_hub_are_fetched_once(make: Maker, hub: LocalHub) -> None:
    folders = make("llama", 3)
    for folder in folders:
        hub.seed(f"live/{folder.name}", folder)
    ids = [f"live/{folder.name}" for folder in folders]
    live = LiveModel(alone(ids[0]), open_inputs(mean(ids)))
    hub.clear_requests()
    recipes = mean(ids), alone(ids[1]), mean(ids[1:])
    for recipe in recipes:
        live.load(recipe)
    assert hub.bytes_served("*.safetensors") == 0
    hub.clear_requests()
    for recipe in recipes:
        live.load(recipe)
    assert hub.requests() == []
    live.load(alone(ids[2]))
    assert same(live.model.state_dict(), state(folders[2]))


def test_models_too_large_for_memory_are_read_from_the_cache(
    make: Maker, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make("llama", 2)
    for folder in folders:
        hub.seed(f"large/{folder.name}", folder)
    ids = [f"large/{folder.name}" for folder in folders]
    monkeypatch.setattr(live_module, "RAM_SHARE", 0.0)
    opened = open_inputs(mean(ids))
    live = LiveModel(alone(ids[0]), opened)
    hub.clear_requests()
    live.load(alone(ids[1]))
    assert same(live.model.state_dict(), state(folders[1]))
    assert hub.bytes_served("*.safetensors") == 0
    assert all(checkpoint._held == {} for checkpoint in opened.values())


def test_the_generation_settings_are_the_primary_s(make: Maker) -> None:
    folders = make("llama", 2)
    (folders[0] / "generation_config.json").write_text('{"max_new_tokens": 77, "eos_token_id": [2, 5]}')
    live = LiveModel(alone(folders[0]), open_inputs(mean(folders)))
    assert live.model.generation_config.max_new_tokens == 77
    assert live.model.generation_config.eos_token_id == [2, 5]


def test_tensors_that_the_class_would_have_to_invent_are_an_error(make: Maker) -> None:
    folders = make("llama", 2)
    for folder in folders:
        kept = load_file(folder / "model.safetensors")
        del kept["model.norm.weight"]
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"its tensors are not those of LlamaForCausalLM.*model\.norm\.weight"):
        LiveModel(mean(folders), open_inputs(mean(folders)))


@pytest.mark.parametrize("config", ['{"model_type": "of_next_year"}', "{}"])
def test_an_architecture_that_transformers_does_not_know_is_an_error(config: str, make: Maker) -> None:
    folder = make("llama", 1)[0]
    (folder / "config.json").write_text(config)
    with pytest.raises(MergeError, match=rf"{folder}: transformers has no model for model_type"):
        LiveModel(alone(folder), open_inputs(alone(folder)))


def test_an_unknown_class_of_a_known_type_is_an_error(make: Maker) -> None:
    folder = make("llama", 1)[0]
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "LlamaForNextYear"))
    with pytest.raises(MergeError, match=r"transformers has no class .*LlamaForNextYear"):
        LiveModel(alone(folder), open_inputs(alone(folder)))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_left_as_they_were(shown: bool, make: Maker) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        LiveModel(alone(folder := make("llama", 1)[0]), open_inputs(alone(folder)))
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_tokenizer_is_the_checkpoint_s_at_its_commit(where: str, make: Maker, hub: LocalHub) -> None:
    folder = make("llama", 1)[0]
    checkpoint = Checkpoint(ModelRef(str(folder)))
    if where == "hub":
        hub.seed("live-tokenizer/model", folder)
        checkpoint = Checkpoint(ModelRef("live-tokenizer/model"))
        hub.seed("live-tokenizer/model", make("llama", 1, parent="new", words=["[PAD]", "[UNK]", "[EOS]", "other"])[0])
    assert load_tokenizer(checkpoint)("w0 w92")["input_ids"] == [3, 95]


def test_a_model_without_tokenizer_is_an_error_that_names_it(tmp_path: Path, make: Maker) -> None:
    folder = make("llama", 1)[0]
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(MergeError, match=rf"{folder} has no tokenizer"):
        load_tokenizer(Checkpoint(ModelRef(str(folder))))


@pytest.mark.parametrize("family", [name for name in ARCHITECTURES if name not in ("bert", "t5")])
def test_a_live_merge_computes_what_the_written_one_computes(family: str, make: Maker, tmp_path: Path) -> None:
    folders = make(family, 3)
    recipe = Recipe(method="ties", base=ModelRef(str(folders[0])), models=tuple(map(str, folders[1:])))
    merge(recipe, tmp_path / "out", progress=False)
    live = LiveModel(alone(folders[0]), open_inputs(recipe))
    live.load(recipe)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        assert torch.equal(live.model(ids).logits, written)
