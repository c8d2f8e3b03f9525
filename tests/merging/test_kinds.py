"""Many kinds of models merged end to end: the result loads with transformers, and its values are those of the formula."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Maker
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import open_inputs
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _WIDTH | {"vocab_size": 96}
_DECODER = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
_IMAGE = _WIDTH | {"image_size": 8, "patch_size": 4}
_WHISPER = {
    "vocab_size": 96,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}

KINDS: dict[str, tuple[type[PreTrainedModel], Callable[[], Any]]] = {
    "vit": (ViTForImageClassification, lambda: ViTConfig(**_IMAGE, num_labels=5)),
    "clip": (
        CLIPModel,
        lambda: CLIPConfig(
            text_config=_TEXT | {"max_position_embeddings": 16, "projection_dim": 16},
            vision_config=_IMAGE | {"projection_dim": 16},
            projection_dim=16,
        ),
    ),
    "whisper": (WhisperForConditionalGeneration, lambda: WhisperConfig(**_WHISPER)),
    "t5": (T5ForConditionalGeneration, lambda: T5Config(**_T5)),
    "t5-untied": (T5ForConditionalGeneration, lambda: T5Config(**_T5, tie_word_embeddings=False)),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**_DECODER, num_local_experts=4)),
    "gemma": (Gemma2ForCausalLM, lambda: Gemma2Config(**_DECODER, head_dim=8)),
    "qwen": (Qwen2ForCausalLM, lambda: Qwen2Config(**_DECODER, tie_word_embeddings=True)),
    "encoder": (BertModel, lambda: BertConfig(**_TEXT)),
}


def saved(folder: Path, kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random values everywhere, its norms and biases included."""
    torch.manual_seed(seed)
    cls, config = KINDS[kind]
    model = cls(config())
    for parameter in model.parameters():
        parameter.data = parameter.data + torch.randn_like(parameter) * 0.1
    model.to(dtype).save_pretrained(folder)
    return folder


def family(root: Path, kind: str, count: int = 3) -> list[Path]:
    return [saved(root / f"{kind}{i}", kind, i) for i in range(count)]


def states(folders: list[Path], cls: type[PreTrainedModel]) -> list[Mapping[str, Tensor]]:
    """What transformers makes of each folder."""
    found = []
    for folder in folders:
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        found.append(dict(model.state_dict()))
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def arithmetic(folders: list[Path], **more: object) -> Recipe:
    base, *models = map(str, folders)
    return Recipe(method="task_arithmetic", base=base, models=tuple(models), parameters={"weight": 0.5}, **more)  # type: ignore[arg-type]


def assert_arithmetic(found: Mapping[str, Tensor], base: Mapping[str, Tensor], *models: Mapping[str, Tensor]) -> None:
    assert found.keys() == base.keys()
    for name, start in base.items():
        expected = start + sum(0.5 * (model[name] - start) for model in models) if start.is_floating_point() else start
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_loads_with_transformers_and_equals_the_formula(kind: str, tmp_path: Path) -> None:
    folders = family(tmp_path, kind)
    check(arithmetic(folders))
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert_arithmetic(*states([tmp_path / "out", *folders], KINDS[kind][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_model_is_what_transformers_loads_of_the_merge(kind: str, tmp_path: Path) -> None:
    folders = family(tmp_path, kind)
    recipe = arithmetic(folders)
    live = LiveModel(Recipe(method="linear", models=(str(folders[0]),)), open_inputs(recipe))  # type: ignore[arg-type]
    live.load(recipe)
    merge(recipe, tmp_path / "out", progress=False)
    (expected,) = states([tmp_path / "out"], KINDS[kind][0])
    found = live.model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


# Experts


def per_expert(folder: Path) -> None:
    """Write a model's experts as older versions of transformers do: tensor by tensor."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    for name, tensor in MixtralForCausalLM.from_pretrained(folder).state_dict().items():
        block = name.partition(".mlp.")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                tensors[f"{block}.block_sparse_moe.experts.{e}.w1.weight"] = gate
                tensors[f"{block}.block_sparse_moe.experts.{e}.w3.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[f"{block}.block_sparse_moe.experts.{e}.w2.weight"] = down
        else:
            tensors[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    assert config["model_type"] == "mixtral"
    store(folder, tensors)


def fused(folder: Path) -> None:
    """Write a model under the names that its module has now."""
    store(folder, MixtralForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("layout", [per_expert, fused])
def test_experts_merge_in_either_layout(layout: Callable[[Path], None], tmp_path: Path) -> None:
    folders = family(tmp_path, "mixtral")
    expected = states(folders, MixtralForCausalLM)
    for folder in folders:
        layout(folder)
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert stored(tmp_path / "out").keys() == stored(folders[0]).keys()
    (found,) = states([tmp_path / "out"], MixtralForCausalLM)
    assert_arithmetic(found, *expected)


@pytest.mark.parametrize("layouts", [(per_expert, fused), (fused, per_expert)])
def test_experts_in_two_layouts_are_refused_with_the_tensors_and_the_remedy(
    layouts: tuple[Callable[[Path], None], ...], tmp_path: Path
) -> None:
    folders = family(tmp_path, "mixtral", 2)
    for layout, folder in zip(layouts, folders, strict=True):
        layout(folder)
    with pytest.raises(MergeError, match=r"experts\.0\.w1\.weight") as caught:
        check(arithmetic(folders))
    assert "experts.gate_up_proj" in str(caught.value)
    assert f"{folders[1]} holds as many numbers under other names: load it with transformers" in str(caught.value)


# Tied embeddings


@pytest.mark.parametrize("kind", ["gemma", "qwen"])
@pytest.mark.parametrize("stored_by", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_a_stored_copy_of_tied_embeddings_changes_nothing(kind: str, stored_by: tuple[int, ...], tmp_path: Path) -> None:
    folders = family(tmp_path, kind)
    expected = states(folders, KINDS[kind][0])
    for i in stored_by:
        tensors = stored(folders[i])
        assert "lm_head.weight" not in tensors
        store(folders[i], tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    check(arithmetic(folders))
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    (found,) = states([tmp_path / "out"], KINDS[kind][0])
    assert_arithmetic(found, *expected)


# Weights in other forms


def in_blocks_of_fp8(folder: Path, block: int = 16) -> dict[str, Tensor]:
    """Quantize a model's matrices in layers as fp8 checkpoints are; returns the numbers they stand for."""
    plain, written = {}, {}
    for name, tensor in stored(folder).items():
        plain[name] = written[name] = tensor
        if ".layers." in name and tensor.dim() == 2:
            rows, columns = tensor.shape
            tiles = tensor.float().view(rows // block, block, columns // block, block)
            scale = tiles.abs().amax((1, 3)) / 448
            codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            written |= {name: codes.view(rows, columns), f"{name}_scale_inv": scale}
            plain[name] = (codes.float() * scale[:, None, :, None]).view(rows, columns).to(tensor.dtype)
    store(folder, written)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    return plain


@pytest.mark.parametrize("quantized", [0, 1])
def test_a_model_in_blocks_of_fp8_merges_with_one_in_bfloat16(quantized: int, make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2, dtype=torch.bfloat16)
    plain = [stored(folder) for folder in folders]
    plain[quantized] = in_blocks_of_fp8(folders[quantized])
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    (found,) = states([tmp_path / "out"], LlamaForCausalLM)
    assert found.keys() == plain[0].keys()
    for name, tensor in found.items():
        base, model = plain[0][name].float(), plain[1][name].float()
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (base + 0.5 * (model - base)).bfloat16()), name


def pickled(folder: Path) -> None:
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_pickled_models_merge_where_it_is_asked_for(which: list[int], make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 2)
    merge(arithmetic(folders), tmp_path / "expected", progress=False)
    for i in which:
        pickled(folders[i])
    with pytest.raises(CheckpointError, match="pickles"):
        merge(arithmetic(folders), tmp_path / "out", progress=False)
    merge(arithmetic(folders), tmp_path / "out", pickles=True, progress=False)
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "expected").keys()
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, stored(tmp_path / "expected")[name])


def test_half_precision_merges_in_float32_and_is_rounded_once(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), "qwen", i, torch.bfloat16) for i in range(3)]
    merge(arithmetic(folders, dtype="float32"), tmp_path / "wide", progress=False)
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, stored(tmp_path / "wide")[name].bfloat16())
    base, *models = (stored(folder) for folder in folders)
    wide = {name: tensor.float() for name, tensor in base.items()}
    assert_arithmetic(stored(tmp_path / "wide"), wide, *({n: t.float() for n, t in m.items()} for m in models))


# What transformers does not know


def test_models_of_an_unknown_kind_merge_by_names_alone(tmp_path: Path) -> None:
    folders = []
    for i in range(3):
        torch.manual_seed(i)
        folders.append(tmp_path / f"m{i}")
        folders[-1].mkdir()
        store(folders[-1], {"stem.weight": torch.randn(4, 3), "blocks.0.mix": torch.randn(7), "step": torch.tensor(3)})
        (folders[-1] / "config.json").write_text('{"model_type": "ours", "architectures": ["OursModel"]}')
    check(arithmetic(folders))
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert_arithmetic(*(stored(folder) for folder in [tmp_path / "out", *folders]))


def test_models_without_a_config_merge_by_names_alone(tmp_path: Path) -> None:
    folders = [tmp_path / f"m{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        store(folder, {"weight": torch.full((3,), float(i))})
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert stored(tmp_path / "out")["weight"].tolist() == [0.5] * 3


def test_models_of_two_kinds_are_refused_by_kind(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", "qwen", 0), saved(tmp_path / "two", "gemma", 1)
    with pytest.raises(MergeError, match="another architecture: model_type is 'gemma2'"):
        check(arithmetic([one, two]))


def test_a_tokenless_llama_is_a_model_too(tmp_path: Path) -> None:
    folders = [tmp_path / f"m{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        torch.manual_seed(i)
        LlamaForCausalLM(LlamaConfig(**_DECODER)).save_pretrained(folder)
    merge(arithmetic(folders), tmp_path / "out", progress=False)
    assert_arithmetic(*states([tmp_path / "out", *folders], LlamaForCausalLM))
