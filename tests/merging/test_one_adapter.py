"""Adapters merged into one: what PEFT makes of it is the weighted sum of what it makes of each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_adapters import Headless, loaded, opened, peft_merged, save_adapter
from tiny_models import Maker
from torch import Tensor

from hf_merge.checkpoints.adapter_config import CONFIG
from hf_merge.checkpoints.adapters import WEIGHTS
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.source import Source, Stored
from hf_merge.errors import MergeError, RecipeError
from hf_merge.merging.one_adapter import merge_adapters
from hf_merge.model_ref import ModelRef

Q_AND_UP: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
RSLORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
PATTERNS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 5},
    "alpha_pattern": {"v_proj": 3},
}
LLAMAS = (Q_AND_UP, RSLORA, PATTERNS)
GPT2S: tuple[dict[str, Any], ...] = (
    {"r": 2, "target_modules": ["c_attn", "c_proj"]},
    {"r": 3, "target_modules": ["c_fc", "c_attn"]},
)
EMBEDDINGS: tuple[dict[str, Any], ...] = (
    {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    {"r": 3, "target_modules": ["embed_tokens"]},
    {"r": 3, "target_modules": ["k_proj"]},
)
BIASES: tuple[dict[str, Any], ...] = (
    {"r": 2, "target_modules": ["query"], "bias": "lora_only"},
    {"r": 3, "target_modules": ["query", "key"], "bias": "all"},
)
HEADS: tuple[dict[str, Any], ...] = (
    {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"},
    {"r": 3, "target_modules": ["value"], "task_type": "SEQ_CLS"},
)
TIED: tuple[dict[str, Any], ...] = (
    {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {"r": 3, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
)
FAMILIES = {
    "tied": ("tied-llama", TIED, (0.5, -0.3)),
    "llama": ("llama", LLAMAS, (0.5, -0.3, 1.2)),
    "conv1d": ("gpt2", GPT2S, (0.7, 0.6)),
    "embeddings": ("llama", EMBEDDINGS, (0.5, 0.5, 1.0)),
    "biases": ("bert", BIASES, (0.3, 0.4)),
    "heads": ("bert", HEADS, (0.3, 0.4)),
}


def adapters_of(base: Path, root: Path, architecture: str, configs: tuple[dict[str, Any], ...]) -> list[Path]:
    return [save_adapter(base, root / f"adapter{i}", architecture, seed=i, **config) for i, config in enumerate(configs)]


def tensors_of(base: Path) -> dict[str, Source]:
    checkpoint = Checkpoint(ModelRef(str(base)))
    return {name: Stored(checkpoint, name) for name in checkpoint.index.tensors}


def merged_deltas(base: Path, adapter: Path, architecture: str) -> dict[str, Tensor]:
    before = loaded(base, architecture).state_dict()
    return {name: tensor - before[name] for name, tensor in peft_merged(base, adapter, architecture).items()}


def weighted_sum(deltas: list[dict[str, Tensor]], weights: tuple[float, ...]) -> dict[str, Tensor]:
    return {name: sum(w * d[name] for w, d in zip(weights, deltas, strict=True)) for name in deltas[0]}  # type: ignore[misc]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_the_weighted_sum_of_the_deltas(family: str, make: Maker, tmp_path: Path) -> None:
    architecture, configs, weights = FAMILIES[family]
    (base,) = make(architecture, 1)
    folders = adapters_of(base, tmp_path, architecture, configs)
    report = merge_adapters([opened(f) for f in folders], weights, tmp_path / "one", scaling=0.9, base=tensors_of(base))
    found = merged_deltas(base, tmp_path / "one", architecture)
    expected = weighted_sum([merged_deltas(base, folder, architecture) for folder in folders], tuple(0.9 * w for w in weights))
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=0)
    assert report.exact
    assert report.error == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_finds_every_tensor_that_it_expects_and_no_other(family: str, make: Maker, tmp_path: Path) -> None:
    architecture, configs, weights = FAMILIES[family]
    (base,) = make(architecture, 1)
    folders = adapters_of(base, tmp_path, architecture, configs)
    merge_adapters([opened(folder) for folder in folders], weights, tmp_path / "one", base=tensors_of(base))
    model = get_peft_model(loaded(base, architecture), LoraConfig.from_pretrained(str(tmp_path / "one")))
    result = set_peft_model_state_dict(model, load_file(tmp_path / "one" / WEIGHTS))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "default" in key] == []


def test_its_logits_are_those_of_the_base_with_the_summed_deltas(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    weights = (0.5, -0.3, 1.2)
    folders = adapters_of(base, tmp_path, "llama", LLAMAS)
    merge_adapters([opened(folder) for folder in folders], weights, tmp_path / "one")
    summed, tokens = loaded(base, "llama"), torch.arange(3, 60)[None]
    for name, delta in weighted_sum([merged_deltas(base, folder, "llama") for folder in folders], weights).items():
        summed.state_dict()[name].add_(delta)
    with torch.no_grad():
        found = PeftModel.from_pretrained(loaded(base, "llama"), tmp_path / "one")(tokens).logits
        torch.testing.assert_close(found, summed(tokens).logits, atol=1e-5, rtol=1e-5)


def test_concatenated_ranks_add_up_module_by_module(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", LLAMAS)]
    report = merge_adapters(adapters, (1, 1, 1), tmp_path / "one")
    ranks = {name.removeprefix("model.layers."): module.rank for name, module in report.modules.items()}
    assert ranks["0.self_attn.q_proj"] == 4 + 3 + 5
    assert ranks["1.self_attn.q_proj"] == 4 + 3 + 2
    assert ranks["0.mlp.down_proj"] == 3
    assert len(ranks) == 8


TRUNCATED = {"llama": LLAMAS, "gpt2": GPT2S}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("architecture", TRUNCATED)
def test_truncation_has_the_error_of_the_full_svd(architecture: str, rank: int, make: Maker, tmp_path: Path) -> None:
    (base,) = make(architecture, 1)
    configs = TRUNCATED[architecture]
    weights = (0.5, -0.3, 1.2)[: len(configs)]
    folders = adapters_of(base, tmp_path, architecture, configs)
    report = merge_adapters([opened(folder) for folder in folders], weights, tmp_path / "one", rank=rank)
    exact = weighted_sum([merged_deltas(base, folder, architecture) for folder in folders], weights)
    found = merged_deltas(base, tmp_path / "one", architecture)
    lost = total = 0.0
    for name, module in report.modules.items():
        wanted = exact[f"{name}.weight"].double().numpy()
        values = np.linalg.svd(wanted, compute_uv=False)
        best = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
        assert module.error == pytest.approx(best, abs=1e-6)
        assert np.linalg.norm(found[f"{name}.weight"].double().numpy() - wanted) / np.linalg.norm(wanted) == pytest.approx(
            best, abs=1e-6
        )
        lost, total = lost + float((values[rank:] ** 2).sum()), total + float((values**2).sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert not report.exact


def test_a_rank_that_holds_everything_truncates_nothing(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", LLAMAS)]
    assert merge_adapters(adapters, (1, 1, 1), tmp_path / "one", rank=12).exact
    exact, capped = tmp_path / "exact", tmp_path / "one"
    merge_adapters(adapters, (1, 1, 1), exact)
    assert (exact / WEIGHTS).read_bytes() == (capped / WEIGHTS).read_bytes()


def test_a_kept_rank_is_not_more_than_the_matrix_has(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folders = adapters_of(base, tmp_path, "llama", ({"r": 30, "target_modules": ["k_proj"]},) * 2)
    report = merge_adapters([opened(folder) for folder in folders], (1, 1), tmp_path / "one", rank=40)
    assert {module.rank for module in report.modules.values()} == {16}
    assert report.error < 1e-6
    assert merged_deltas(base, tmp_path / "one", "llama")["model.layers.0.self_attn.k_proj.weight"].any()


@pytest.mark.parametrize("family", ["llama", "conv1d", "embeddings"])
def test_factors_are_merged_without_a_base(family: str, make: Maker, tmp_path: Path) -> None:
    architecture, configs, weights = FAMILIES[family]
    (base,) = make(architecture, 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, architecture, configs)]
    merge_adapters(adapters, weights, tmp_path / "one")


def headless(base: Path) -> Mapping[str, Source]:
    checkpoint = Checkpoint(ModelRef(str(base)))
    return {name: Headless(Stored(checkpoint, name)) for name in checkpoint.index.tensors}


def test_heads_whose_weights_sum_to_one_need_no_base(make: Maker, tmp_path: Path) -> None:
    (base,) = make("bert", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "bert", HEADS)]
    report = merge_adapters(adapters, (0.7, 0.3), tmp_path / "one", base=headless(base))
    assert report.full == ("base_model.model.classifier.bias", "base_model.model.classifier.weight")
    one, *each = [load_file(folder / WEIGHTS)[report.full[1]] for folder in (tmp_path / "one", *sorted(tmp_path.glob("ad*")))]
    torch.testing.assert_close(one, 0.7 * each[0] + 0.3 * each[1])


def test_a_head_that_needs_the_base_is_named_without_one(make: Maker, tmp_path: Path) -> None:
    (base,) = make("bert", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "bert", HEADS)]
    with pytest.raises(
        MergeError, match=r"'classifier\.bias' is saved in full \(.*adapter0: .* \(weight 0\.7\).*Give the base"
    ):
        merge_adapters(adapters, (0.7, 0.7), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_head_of_one_adapter_moves_by_its_weight_from_the_base(make: Maker, tmp_path: Path) -> None:
    (base,) = make("bert", 1)
    folders = adapters_of(base, tmp_path, "bert", (HEADS[0], {"r": 3, "target_modules": ["value"]}))
    merge_adapters([opened(folder) for folder in folders], (0.25, 1), tmp_path / "one", base=tensors_of(base))
    name = "classifier.weight"
    moved, whole = (merged_deltas(base, folder, "bert")[name] for folder in (tmp_path / "one", folders[0]))
    torch.testing.assert_close(moved, 0.25 * whole, atol=1e-6, rtol=0)
    assert whole.any()


def test_an_adapter_of_weight_zero_is_left_out(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", (Q_AND_UP, {**RSLORA, "use_dora": True}))]
    report = merge_adapters(adapters, (1, 0), tmp_path / "one")
    assert {module.rank for module in report.modules.values()} == {4}


def test_the_config_says_plain_lora_of_the_base(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", (RSLORA, PATTERNS))]
    merge_adapters(adapters, (1, 1), tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["peft_type"], config["use_rslora"], config["use_dora"]) == ("LORA", False, False)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]


def test_a_pattern_matches_one_module_alone(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", (PATTERNS,))]
    merge_adapters(adapters, (1,), tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert config["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 5}


def test_adapters_of_the_same_modules_keep_their_short_list(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", (Q_AND_UP, {**Q_AND_UP, "r": 2}))]
    merge_adapters(adapters, (1, 1), tmp_path / "one")
    assert sorted(json.loads((tmp_path / "one" / CONFIG).read_text())["target_modules"]) == ["q_proj", "up_proj"]


def test_an_adapter_on_the_result_can_be_merged_again(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folders = adapters_of(base, tmp_path, "llama", LLAMAS)
    merge_adapters([opened(folder) for folder in folders], (1, 1, 1), tmp_path / "one")
    merge_adapters([opened(tmp_path / "one"), opened(folders[0])], (1, -1), tmp_path / "two")
    found = merged_deltas(base, tmp_path / "two", "llama")
    expected = weighted_sum([merged_deltas(base, folder, "llama") for folder in folders[1:]], (1, 1))
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((1.0,), {}, "one weight for each adapter, got 1 for 2"),
        ((1.0, float("nan")), {}, "finite numbers"),
        ((1.0, 1.0), {"scaling": float("inf")}, "finite numbers"),
        ((0.0, 0.0), {}, "nothing is left of the adapters"),
        ((1.0, 1.0), {"scaling": 0.0}, "nothing is left of the adapters"),
        ((1.0, 1.0), {"rank": 0}, "rank is at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    weights: tuple[float, ...], options: dict[str, Any], message: str, make: Maker, tmp_path: Path
) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", LLAMAS[:2])]
    with pytest.raises(RecipeError, match=message):
        merge_adapters(adapters, weights, tmp_path / "one", **options)


CLASHES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dora": ("llama", Q_AND_UP, {**Q_AND_UP, "use_dora": True}, "adapter1 is a DoRA adapter"),
    "bias": ("bert", HEADS[0], {"r": 2, "target_modules": ["query"], "lora_bias": True}, "adapter1 was trained with lora_bias"),
    "tokens": ("llama", Q_AND_UP, {**Q_AND_UP, "trainable_token_indices": [3]}, "trained with trainable_token_indices"),
    "full and low rank": (
        "llama",
        {"r": 2, "target_modules": ["lm_head"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "'lm_head' is trained in full by one adapter and in low rank by another",
    ),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_adapters_that_no_single_adapter_can_hold_are_refused(clash: str, make: Maker, tmp_path: Path) -> None:
    architecture, *configs, message = CLASHES[clash]
    (base,) = make(architecture, 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, architecture, tuple(configs))]
    with pytest.raises(MergeError, match=message):
        merge_adapters(adapters, (1, 1), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def renamed_base(folder: Path, name: str | None) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": name}))


def test_adapters_of_different_bases_are_refused(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folders = adapters_of(base, tmp_path, "llama", LLAMAS[:2])
    renamed_base(folders[1], "org/other")
    with pytest.raises(MergeError, match=r"different bases.*(\n.*)*adapter1: org/other"):
        merge_adapters([opened(folder) for folder in folders], (1, 1), tmp_path / "one")


def test_an_adapter_that_names_no_base_is_taken_at_its_word(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folders = adapters_of(base, tmp_path, "llama", LLAMAS[:2])
    renamed_base(folders[0], None)
    merge_adapters([opened(folder) for folder in folders], (1, 1), tmp_path / "one")
    assert json.loads((tmp_path / "one" / CONFIG).read_text())["base_model_name_or_path"] == str(base)


def test_modules_of_other_shapes_are_refused(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    (wider,) = make("llama", 1, parent="wider", intermediate_size=64)
    folders = [save_adapter(folder, tmp_path / f"{i}", "llama", **RSLORA) for i, folder in enumerate((base, wider))]
    renamed_base(folders[1], str(base))
    with pytest.raises(MergeError, match=r"'model\.layers\.0\.mlp\.down_proj' has another shape in each adapter"):
        merge_adapters([opened(folder) for folder in folders], (1, 1), tmp_path / "one")


def test_embedding_copies_that_differ_are_refused(make: Maker, tmp_path: Path) -> None:
    base, other = make("llama", 2)
    folders = [save_adapter(folder, tmp_path / f"{i}", "llama", **EMBEDDINGS[1]) for i, folder in enumerate((base, other))]
    renamed_base(folders[1], str(base))
    with pytest.raises(MergeError, match=r"'model\.embed_tokens\.weight' is frozen under the factors.*hold other values"):
        merge_adapters([opened(folder) for folder in folders], (1, 1), tmp_path / "one")


@pytest.mark.parametrize("rank", [None, 2])
def test_the_report_says_what_was_kept(rank: int | None, make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", LLAMAS)]
    said = str(merge_adapters(adapters, (1, 1, 1), tmp_path / "one", rank=rank))
    assert ("exactly the weighted sum" in said) == (rank is None)
    assert ("rank 2; truncated: relative error 0." in said) == (rank == 2)


def test_a_merge_that_fails_leaves_no_adapter(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base,) = make("llama", 1)
    adapters = [opened(folder) for folder in adapters_of(base, tmp_path, "llama", LLAMAS)]
    monkeypatch.setattr(Checkpoint, "read", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        merge_adapters(adapters, (1, 1, 1), tmp_path / "one")
    assert list((tmp_path / "one").iterdir()) == []
