"""Adapters read as deltas: what PEFT makes of the same adapter, tensor by tensor, without the base where it is not needed."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import Headless, base_of, headless, loaded, opened, peft_merged, save_adapter, whole
from tiny_models import Maker

from hf_merge.checkpoints.adapter_config import CONFIG
from hf_merge.checkpoints.adapter_names import locate
from hf_merge.checkpoints.adapters import WEIGHTS, Adapter, is_adapter
from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.checkpoints.low_rank import LowRank
from hf_merge.checkpoints.source import Stored
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef

RSLORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
PATTERNS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.up_proj": 7},
    "alpha_pattern": {"v_proj": 3},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "rslora": ("llama", RSLORA),
    "patterns": ("llama", PATTERNS),
    "some layers": ("llama", {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "head": ("llama", {"r": 2, "target_modules": ["lm_head", "k_proj"]}),
    "module to save": ("llama", {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("llama", {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True}),
    "dora embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"]}),
    "square conv1d alone": ("gpt2", {"r": 4, "target_modules": r".*attn\.c_proj"}),
    "dora conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "biases": ("bert", {"r": 4, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "all biases and head": ("bert", {"r": 4, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "lora bias": ("bert", {"r": 4, "lora_alpha": 3, "target_modules": ["query", "dense"], "lora_bias": True}),
    "tokens": ("llama", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "tokens and head": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1]}},
    ),
    "gaussian": ("bert", {"r": 4, "target_modules": ["dense"], "init_lora_weights": "gaussian"}),
    "mixture of experts": ("mixtral", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_that_peft_merges(case: str, make: Maker, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    (base,) = make(architecture, 1)
    folder = save_adapter(base, tmp_path / "adapter", architecture, **config)
    names, tensors = base_of(base)
    sources = opened(folder).sources(names, tensors)
    expected = peft_merged(base, folder, architecture)
    changed = 0
    assert list(sources) == names
    for name, source in sources.items():
        if name in expected:  # the experts of a mixtral are stored one by one
            before = whole(tensors(name))
            delta = whole(source) if source.delta else whole(source) - before
            torch.testing.assert_close(delta, expected[name] - before, atol=1e-6, rtol=0)
            changed += bool(delta.any())
    assert changed >= 1


@pytest.mark.parametrize("case", [case for case in CASES if "dora" not in case and "tokens" not in case])
def test_the_base_is_not_read(case: str, make: Maker, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    (base,) = make(architecture, 1)
    folder = save_adapter(base, tmp_path / "adapter", architecture, **config)
    for source in opened(folder).sources(*headless(base)).values():
        whole(source)


def test_opening_and_planning_read_no_tensor(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA, use_dora=True)
    read: list[str] = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *range: read.append(name) or real(self, name, *range))
    sources = opened(folder).sources(*base_of(base))
    assert read == []
    whole(sources["model.layers.0.self_attn.q_proj.weight"])
    assert len(read) == 4  # A, B, the magnitudes and the base


def test_untouched_tensors_are_deltas_of_nothing(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    source = opened(save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)).sources(*headless(base))["model.norm.weight"]
    assert (source.delta, source.nbytes) == (True, 0)
    assert not whole(source).any()


def test_a_low_rank_source_says_what_it_is(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    name = "model.layers.0.mlp.down_proj.weight"
    source = opened(folder).sources(*headless(base))[name]
    assert (source.delta, source.near, source.dtype, source.shape) == (True, True, torch.float32, (32, 48))
    assert source.nbytes == 4 * 3 * (32 + 48)
    assert source.label == f"{folder}: tensor {name!r}"


@pytest.mark.parametrize("case", ["linear", "conv1d", "dora", "dora conv1d", "embedding"])
def test_any_range_has_the_bits_of_the_whole(case: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, config = CASES[case]
    (base,) = make(architecture, 1)
    folder = save_adapter(base, tmp_path / "adapter", architecture, **config)
    monkeypatch.setattr("hf_merge.checkpoints.low_rank.TILE", 300)
    sources = opened(folder).sources(*base_of(base))
    name = next(name for name, source in sources.items() if source.nbytes and len(source.shape) == 2)
    source, values = sources[name], whole(sources[name]).reshape(-1)
    count = len(values)
    for start, stop in [(0, 0), (0, 1), (count - 1, count), (5, 301), (31, 33), (299, 1000), (count // 2, count)]:
        assert torch.equal(source.read(start, stop), values[start:stop])


def test_threads_read_the_same_values_and_factors_once(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", r=4, target_modules="all-linear")
    adapter = opened(folder)
    sources = adapter.sources(*headless(base))
    expected = {name: whole(source) for name, source in opened(folder).sources(*headless(base)).items()}
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(sources, pool.map(whole, sources.values()), strict=True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_factors_are_dropped_when_others_are_read(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base,) = make("llama", 1)
    adapter = opened(save_adapter(base, tmp_path / "adapter", "llama", r=4, target_modules="all-linear"))
    monkeypatch.setattr("hf_merge.checkpoints.low_rank.KEPT", 2)
    for source in adapter.sources(*headless(base)).values():
        whole(source)
    assert len(adapter._recent._values) == 2


def test_factors_that_could_not_be_read_are_read_again(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base,) = make("llama", 1)
    adapter = opened(save_adapter(base, tmp_path / "adapter", "llama", **RSLORA))
    source = adapter.sources(*headless(base))["model.layers.0.self_attn.q_proj.weight"]
    with monkeypatch.context() as broken:
        broken.setattr(adapter.checkpoint, "read", lambda name: (_ for _ in ()).throw(CheckpointError("gone")))
        with pytest.raises(CheckpointError, match="gone"):
            whole(source)
    assert whole(source).any()


def test_names_of_a_base_without_the_prefix_of_its_head_are_found(make: Maker, tmp_path: Path) -> None:
    (base,) = make("gpt2", 1)
    folder = save_adapter(base, tmp_path / "adapter", "gpt2", r=2, target_modules=["c_attn"])
    names, tensors = headless(base)
    bare = {name.removeprefix("transformer."): name for name in names}
    sources = opened(folder).sources(bare, lambda name: tensors(bare[name]))
    assert isinstance(sources["h.0.attn.c_attn.weight"], LowRank)


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("a.b.weight", ["a.b.weight", "b.weight"], "a.b.weight"),
        ("bert.x.weight", ["x.weight", "y.weight"], "x.weight"),
        ("x.weight", ["bert.x.weight"], "bert.x.weight"),
        ("x.weight", ["encoder.x.weight", "decoder.x.weight"], None),
        ("x.weight", ["y.weight"], None),
    ],
)
def test_a_tensor_is_located_up_to_one_prefix(name: str, known: list[str], found: str | None) -> None:
    assert locate(name, known) == found


def test_a_tensor_that_the_base_does_not_have_is_named(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    names, tensors = headless(base)
    names.remove("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(
        CheckpointError, match=r"no such tensors.*'model\.layers\.1\.mlp\.down_proj\.weight'\. It was trained on"
    ):
        opened(folder).sources(names, tensors)


def test_a_head_that_the_base_does_not_have_is_given_if_it_may_be_private(make: Maker, tmp_path: Path) -> None:
    (base,) = make("bert", 1)
    folder = save_adapter(base, tmp_path / "adapter", "bert", r=2, target_modules=["query"], task_type="SEQ_CLS")
    names, tensors = headless(base)
    bare = [name for name in names if "classifier" not in name]
    with pytest.raises(CheckpointError, match=r"no such tensors.*'classifier\.bias', 'classifier\.weight'"):
        opened(folder).sources(bare, tensors)
    sources = opened(folder).sources(bare, tensors, private=True)
    assert list(sources) == [*bare, "classifier.bias", "classifier.weight"]
    assert torch.equal(whole(sources["classifier.weight"]), load_file(folder / WEIGHTS)["base_model.model.classifier.weight"])


def test_a_base_of_another_size_is_refused(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    (wider,) = make("llama", 1, parent="wider", intermediate_size=64)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape \[32, 48\].*\[32, 64\]"):
        opened(folder).sources(*headless(wider))


def test_a_saved_embedding_with_more_rows_keeps_them(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    model = loaded(base, "llama")
    model.resize_token_embeddings(100)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    source = opened(tmp_path / "adapter").sources(*headless(base))["model.embed_tokens.weight"]
    assert (source.delta, source.shape) == (False, (100, 32))
    assert torch.equal(whole(source), model.get_input_embeddings().weight)


TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_tied_tensors_that_are_changed_apart_are_refused(config: dict[str, Any], make: Maker, tmp_path: Path) -> None:
    (base,) = make("tied-llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "tied-llama", r=2, **config)
    with pytest.raises(CheckpointError, match=r"the base ties .lm_head\.weight. to .model\.embed_tokens\.weight."):
        opened(folder).sources(*headless(base), TIED)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_tied_tensors_that_stay_tied_are_read_once(config: dict[str, Any], make: Maker, tmp_path: Path) -> None:
    (base,) = make("tied-llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "tied-llama", r=2, **config)
    sources = opened(folder).sources(*base_of(base), TIED)
    merged, tokens = loaded(base, "tied-llama"), torch.arange(3, 40)[None]
    for name, source in sources.items():
        original = merged.state_dict()[name]
        original.copy_(whole(source) + source.delta * original)
    # Against the adapter as it runs: `merge_and_unload` adds a tied change to the shared tensor twice.
    running = PeftModel.from_pretrained(loaded(base, "tied-llama"), folder)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, running(tokens).logits, atol=1e-5, rtol=0)


def test_dora_keeps_rows_of_zeros(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    model = loaded(base, "llama")
    model.state_dict()["model.layers.0.self_attn.q_proj.weight"][5] = 0
    model.save_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(str(tmp_path / "adapter"))
    values = whole(opened(tmp_path / "adapter").sources(*base_of(base))["model.layers.0.self_attn.q_proj.weight"])
    assert values.isfinite().all()
    assert not values[5].any()


def test_a_config_that_calls_conv1d_linear_is_overruled_by_shapes(make: Maker, tmp_path: Path) -> None:
    (base,) = make("gpt2", 1)
    folder = save_adapter(base, tmp_path / "adapter", "gpt2", r=4, target_modules=["c_attn", "c_proj"])
    sources = opened(folder).sources(*headless(base))
    edit_config(folder, fan_in_fan_out=False)  # what PEFT writes if a linear head is the last module that it meets
    again = opened(folder).sources(*headless(base))
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(whole(again[name]), whole(sources[name]))


def test_linear_and_conv1d_modules_are_told_apart(make: Maker, tmp_path: Path) -> None:
    (base,) = make("gpt2", 1, tie_word_embeddings=False)
    folder = save_adapter(base, tmp_path / "adapter", "gpt2", r=4, target_modules=["c_attn", "c_proj", "lm_head"])
    assert not json.loads((folder / CONFIG).read_text())["fan_in_fan_out"]
    names, tensors = base_of(base)
    expected = peft_merged(base, folder, "gpt2")
    for name, source in opened(folder).sources(names, tensors).items():
        value = whole(source) + source.delta * whole(tensors(name))
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_two_names_of_one_tensor_are_refused(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    twice = {"base_model.model.norm.weight": torch.ones(32)}
    save_file(load_file(folder / WEIGHTS) | twice, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"changes 'model\.norm\.weight' of the base under two names"):
        opened(folder).sources(*headless(base))


def edit_config(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapter; only LORA"),
        ({"peft_type": None}, "None adapter; only LORA"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"invented_later": 1}, "settings that are not understood: invented_later=1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "rewrites the base"),
        ({"init_lora_weights": "olora"}, "rewrites the base"),
        ({"init_lora_weights": "corda"}, "rewrites the base"),
        ({"init_lora_weights": "loftq"}, "rewrites the base"),
        ({"r": 0}, "ranks are positive whole numbers"),
        ({"r": "8"}, "ranks are positive whole numbers"),
        ({"rank_pattern": {"q_proj": -1}}, "ranks are positive whole numbers"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is a mapping"),
        ({"lora_alpha": None}, "lora_alpha is a number"),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(
    settings: dict[str, Any], message: str, make: Maker, tmp_path: Path
) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    edit_config(folder, **settings)
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, r"not of the rank 5 in adapter_config\.json"),
        ({"rank_pattern": {"q_proj": 5}}, r"'model\.layers\.0\.self_attn\.q_proj'.*not of the rank 5"),
        ({"rank_pattern": {"q_proj(": 5}}, "no regular expression"),
        ({"use_dora": True}, "has no DoRA magnitude"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    settings: dict[str, Any], message: str, make: Maker, tmp_path: Path
) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    edit_config(folder, **settings)
    with pytest.raises(CheckpointError, match=message):
        opened(folder).sources(*headless(base))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "expected A and B"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_diag", "kind that is not understood"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", r"no such tensors.*q_proj\.bias"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", r"trained the rows \[\].*shape \[3, 32\]"),
        ("base_model.model.strange.weight", "no such tensors.*'strange.weight'"),
    ],
)
def test_a_tensor_that_fits_nothing_is_refused_by_name(added: str, message: str, make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    save_file(load_file(folder / WEIGHTS) | {added: torch.ones(3, 32)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        opened(folder).sources(*headless(base))


@pytest.mark.parametrize(
    "rename", [lambda k: k.removeprefix("base_model.model."), lambda k: k.replace(".weight", ".default.weight")]
)
def test_names_without_prefix_or_with_the_adapters_name_are_read(
    rename: Callable[[str], str], make: Maker, tmp_path: Path
) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    before = {name: whole(source) for name, source in opened(folder).sources(*headless(base)).items()}
    save_file({rename(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    after = opened(folder).sources(*headless(base))
    assert all(torch.equal(whole(after[name]), before[name]) for name in before)


def test_a_convolution_is_a_matrix_of_its_first_dimension(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    merged = peft.merge_and_unload().state_dict()
    base = Checkpoint(ModelRef(str(tmp_path)))
    names = list(base.index.tensors)
    sources = opened(tmp_path).sources(names, lambda name: Headless(Stored(base, name)))
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(whole(sources[name]), merged[name] - before[name], atol=1e-6, rtol=0)


def test_a_repository_is_an_adapter_by_its_config(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    assert is_adapter(Checkpoint(ModelRef(str(folder))).files)
    assert not is_adapter(Checkpoint(ModelRef(str(base))).files)


def test_a_model_is_no_adapter(make: Maker) -> None:
    (base,) = make("llama", 1)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        opened(base)


def test_a_pickled_adapter_is_to_be_saved_again(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        opened(folder)


def test_an_adapter_on_the_hub_is_read_by_ranges(hub: Any, make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    folder = save_adapter(base, tmp_path / "adapter", "llama", **RSLORA)
    checkpoint = Checkpoint(ModelRef("demo/adapter-ranges"), publish(folder, "demo/adapter-ranges"))
    expected = opened(folder).sources(*headless(base))
    sources = Adapter(checkpoint).sources(*headless(base))
    assert all(torch.equal(whole(sources[name]), whole(expected[name])) for name in expected)


def publish(folder: Path, repo_id: str) -> Any:
    api = hub_api()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS])
    return api
