"""Scales folded into stock checkpoints: what is folded computes what is scaled, and what cannot be folded is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from path_models import IDS, SCALED, dare_ties, family, path_model, steps
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_merge.errors import MergeError
from hf_merge.merging.calibration import eps_bound
from hf_merge.merging.folding import EPS_NAMES
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

PRE_NORM = ["llama", "tied-llama", "qwen2", "gpt2", "gemma", "gemma2", "neox", "mixtral"]
EPS = dict.fromkeys(PRE_NORM, "rms_norm_eps") | {"gpt2": "layer_norm_epsilon", "neox": "layer_norm_eps"}
UNSCALED = steps(*((step.model, step.layer) for step in SCALED))


def stock(folder: Path) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if "bert" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", PRE_NORM)
def test_folded_equals_scaled_where_the_norms_eps_is_next_to_nothing(name: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name, **{EPS[name]: 1e-12})))
    merge(model.recipe_of(SCALED), tmp_path / "out", progress=False)
    scaled, plain = logits(model.take(SCALED)), logits(model.take(UNSCALED))
    error, effect = (logits(stock(tmp_path / "out")) - scaled).abs().max(), (scaled - plain).abs().max()
    assert effect > 0.01
    assert error < 1e-6 * max(1.0, float(scaled.abs().max()))


@pytest.mark.parametrize("name", PRE_NORM)
def test_folded_equals_scaled_within_what_the_norms_eps_may_change(name: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name)))
    merge(model.recipe_of(SCALED), tmp_path / "out", progress=False)
    bound = eps_bound(model, SCALED, {"input_ids": IDS})
    scaled = logits(model.take(SCALED))
    error = (logits(stock(tmp_path / "out")) - scaled).abs().max() / scaled.abs().max()
    assert error < bound + 1e-6


def test_a_norm_at_the_end_of_the_layer_before_takes_the_scale(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "bert")))
    merge(model.recipe_of(SCALED), tmp_path / "out", progress=False)
    scaled, plain = logits(model.take(SCALED)), logits(model.take(UNSCALED))
    assert (scaled - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(stock(tmp_path / "out")), scaled, rtol=0, atol=2e-6)


def test_the_first_scale_of_a_bert_goes_into_the_embeddings_norm(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "bert")))
    path = steps(("model1", 0, 1.5), ("model1", 1))
    merge(model.recipe_of(path), tmp_path / "out", progress=False)
    torch.testing.assert_close(logits(stock(tmp_path / "out")), logits(model.take(path)), rtol=0, atol=2e-6)


def test_scales_of_one_change_nothing(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "olmo2")))
    assert check(model.recipe_of(UNSCALED)).jobs.keys()
    assert torch.equal(logits(model.take(UNSCALED)), logits(model.take(UNSCALED)))


def test_weights_and_biases_of_the_outputs_are_divided_by_the_product_of_the_scales_and_nothing_else_is_changed(
    tmp_path: Path,
) -> None:
    (folder,) = family(tmp_path, "llama", depths=(3,))
    scales = (2.0, 1.0, 0.25)
    slices = [Slice(sources=(LayerRange(model="base", start=i, stop=i + 1),), residual_scale=s) for i, s in enumerate(scales)]
    merge(Recipe(method="passthrough", models=(str(folder),), layers=LayerMap(tuple(slices))), tmp_path / "out", progress=False)
    got, own = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in own.items():
        folded = "o_proj" in name or "down_proj" in name
        factor = {"0": 0.5, "1": 0.5, "2": 2.0}[name.split(".")[2]] if folded else 1.0
        assert torch.equal(got[name], tensor * factor), name


def test_a_merged_and_scaled_layer_is_folded_before_it_is_rounded(tmp_path: Path) -> None:
    folders = family(tmp_path, "llama")
    wide, half = (path_model(dare_ties(folders, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    path = steps(("merged", 0, 1.3), ("merged", 1))
    merge(wide.recipe_of(path), tmp_path / "wide", progress=False)
    merge(half.recipe_of(path), tmp_path / "half", progress=False)
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = load_file(tmp_path / "wide/model.safetensors")[name].to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "half/model.safetensors")[name], wanted)


def test_olmo_2_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "olmo2")))
    with pytest.raises(MergeError, match=r"cannot be folded .* reads the stream itself and not its norm"):
        check(model.recipe_of(SCALED))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("t5", {"num_decoder_layers": 2}, "several modules"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "depends on its place"),
    ],
)
def test_models_whose_layers_hang_on_their_place_are_refused(name: str, config: dict, message: str, tmp_path: Path) -> None:
    (folder,) = family(tmp_path, name, depths=(2,), **config)
    modules = ("encoder", "decoder") if name == "t5" else ("",)
    slices = tuple(
        Slice(sources=(LayerRange(model="base", start=0, stop=2),), module=module, residual_scale=2.0) for module in modules
    )
    with pytest.raises(MergeError, match=message):
        check(Recipe(method="passthrough", models=(str(folder),), layers=LayerMap(slices)))


def test_a_class_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (folder,) = family(tmp_path, "llama", depths=(2,))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NextYear"]}
    (folder / "config.json").write_text(json.dumps(config))
    part = Slice(sources=(LayerRange(model="base", start=0, stop=2),), residual_scale=2.0)
    with pytest.raises(MergeError, match=r"no class \['NextYear'\] to try it on"):
        check(Recipe(method="passthrough", models=(str(folder),), layers=LayerMap((part,))))


def test_what_is_tried_leaves_the_random_numbers_as_they_were(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama", rms_norm_eps=3e-6)))
    before = torch.get_rng_state()
    check(model.recipe_of(SCALED))
    assert torch.equal(torch.get_rng_state(), before)


def test_scales_whose_product_grows_large_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    with caplog.at_level(logging.WARNING):
        check(model.recipe_of(steps(("model1", 0, 5.0), ("model1", 1, 5.0))))
    assert "product reaches 25" in caplog.text


def test_a_stream_that_is_small_against_the_norms_eps_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama", rms_norm_eps=1e-2)))
    with caplog.at_level(logging.WARNING):
        bound = eps_bound(model, SCALED, {"input_ids": IDS})
    assert bound > 1e-3
    assert "before position 1" in caplog.text


def test_the_bound_is_the_formula_for_a_scale_before_the_first_layer(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    stream = model.take(model.identity("model1")).model.embed_tokens(IDS).detach().double()
    wanted = 0.5 * 1e-6 * abs(1 / 0.25 - 1) / (stream.square().mean(-1).min())
    assert eps_bound(model, steps(("model1", 0, 0.5)), {"input_ids": IDS}) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in PRE_NORM if name != "mixtral"])
def test_every_norm_has_an_eps_by_a_known_name(name: str, tmp_path: Path) -> None:
    (folder,) = family(tmp_path, name, depths=(1,))
    norms = [m for m in stock(folder).modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(any(isinstance(getattr(norm, eps, None), float) for eps in EPS_NAMES) for norm in norms)
