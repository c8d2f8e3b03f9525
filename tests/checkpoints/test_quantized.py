"""Quantized weights read as the numbers they stand for, compared bit for bit with each format's own formula, written out."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.quantized import dequantized, plain_config
from hf_merge.checkpoints.source import Source
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef

NUMBERS = count()
FP8 = torch.float8_e4m3fn
BLOCKWISE = {"quant_method": "fp8", "weight_block_size": [4, 8], "activation_scheme": "dynamic", "fmt": "e4m3"}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def compressed(kind: str, **weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "kv_cache_scheme": None}


def checkpoint(folder: Path, tensors: dict[str, Tensor], settings: object, **config: object) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return Checkpoint(ModelRef(str(folder)))


def numbers(opened: Checkpoint) -> Mapping[str, Source]:
    found = dequantized(opened)
    assert found is not None
    return found


def float8(*shape: int, dtype: torch.dtype = FP8) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 100).to(dtype)


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7 + sum(shape))) * 0.01 + 1e-4).to(dtype)


def by_hand(codes: Tensor, scale: Tensor, block: tuple[int, int], zero: Tensor | None = None) -> Tensor:
    """The definition, element by element."""
    made = torch.empty(codes.shape)
    rows, columns = codes.shape[-2:]
    flat = codes.float().reshape(-1, rows, columns)
    grid = scale.float().reshape(len(flat), -1, -(-columns // block[1]))
    zeros = torch.zeros_like(grid) if zero is None else zero.float().reshape(grid.shape)
    out = made.view(-1, rows, columns)
    for lead in range(len(flat)):
        for row in range(rows):
            for column in range(columns):
                at = lead, row // block[0], column // block[1]
                out[lead, row, column] = (flat[lead, row, column] - zeros[at]) * grid[at]
    return made


def check_ranges(source: Source, expected: Tensor) -> None:
    """The whole, and every kind of range, bit for bit."""
    flat, size = expected.reshape(-1), expected.numel()
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype
    columns = expected.shape[-1]
    wanted = {0, 1, columns - 1, columns, columns + 1, 3 * columns, size // 2, size - columns, size - 1, size}
    cuts = sorted(cut for cut in wanted if cut <= size)
    for start in cuts:
        for stop in (cut for cut in cuts if cut >= start):
            read = source.read(start, stop)
            assert read.dtype == expected.dtype
            assert torch.equal(read, flat[start:stop]), (start, stop)


@pytest.mark.parametrize("shape", [(8, 16), (9, 17), (4, 8), (3, 5), (13, 8), (1, 30), (3, 8, 16), (2, 6, 11)])
def test_fp8_in_blocks_is_codes_times_the_scale_of_the_block(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = float8(*shape)
    scale = scales(*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 8))
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, BLOCKWISE)
    check_ranges(numbers(opened)["a.weight"], by_hand(codes, scale, (4, 8)))


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("form", [(), (1,), (1, 1)])
def test_fp8_with_one_scale_is_codes_times_it(tmp_path: Path, dtype: torch.dtype, form: tuple[int, ...]) -> None:
    codes, scale = float8(5, 7, dtype=dtype), scales(1).reshape(form)
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, compressed("float-quantized"))
    check_ranges(numbers(opened)["a.weight"], codes.float() * float(scale))


@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "fp8"])
@pytest.mark.parametrize("form", [(6, 1), (6,)])
def test_fp8_with_a_scale_per_row_is_codes_times_it(tmp_path: Path, method: str, form: tuple[int, ...]) -> None:
    codes, scale = float8(6, 7), scales(6).reshape(form)
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, {"quant_method": method})
    check_ranges(numbers(opened)["a.weight"], codes.float() * scale.reshape(6, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_with_a_scale_per_row_is_codes_times_it(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, scale = int8(6, 7), scales(6, 1, dtype=dtype)
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, compressed("int-quantized", strategy="channel"))
    check_ranges(numbers(opened)["a.weight"], codes.float() * scale.float())


def test_zero_points_are_subtracted_before_scaling(tmp_path: Path) -> None:
    codes, scale, zero = int8(6, 7), scales(6, 1), int8(6, 1)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_zero_point": zero}
    opened = checkpoint(tmp_path, tensors, compressed("int-quantized", symmetric=False))
    check_ranges(numbers(opened)["a.weight"], (codes.float() - zero.float()) * scale)


def test_groups_of_columns_have_a_scale_and_a_zero_point_each(tmp_path: Path) -> None:
    codes, scale, zero = int8(6, 20), scales(6, 3), int8(6, 3)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_zero_point": zero}
    opened = checkpoint(tmp_path, tensors, compressed("int-quantized", strategy="group", group_size=8))
    check_ranges(numbers(opened)["a.weight"], by_hand(codes, scale, (1, 8), zero))


def test_compressed_blocks_have_the_size_that_their_group_names(tmp_path: Path) -> None:
    codes, scale = float8(9, 10), scales(3, 2)
    settings = compressed("float-quantized", strategy="block", block_structure=[4, 8])
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, settings)
    check_ranges(numbers(opened)["a.weight"], by_hand(codes, scale, (4, 8)))


def test_bitsandbytes_int8_is_codes_times_the_largest_of_the_row_over_127(tmp_path: Path) -> None:
    codes, largest = int8(6, 7), scales(6) * 500
    tensors = {"a.weight": codes, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    opened = checkpoint(tmp_path, tensors, BNB)
    check_ranges(numbers(opened)["a.weight"], codes.float() * largest.reshape(6, 1) * 7.874015718698502e-3)


def test_bitsandbytes_int8_in_the_order_of_a_gpu_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": int8(6, 7), "a.SCB": scales(6), "a.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"'a\.weight' is stored in the order"):
        numbers(checkpoint(tmp_path, tensors, BNB))["a.weight"].read(0, 3)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_values_have_the_dtype_of_the_config(tmp_path: Path, config: dict[str, object], dtype: torch.dtype) -> None:
    codes, scale = float8(9, 17), scales(3, 3)
    opened = checkpoint(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, BLOCKWISE, **config)
    check_ranges(numbers(opened)["a.weight"], by_hand(codes, scale, (4, 8)).to(dtype))


def test_scales_and_what_is_for_activations_are_not_tensors_of_the_model(tmp_path: Path) -> None:
    one = torch.tensor(0.5)
    tensors = {
        "a.weight": float8(4, 8),
        "a.weight_scale": scales(4, 1),
        "a.input_scale": one,
        "a.output_scale": one.clone(),
        "attn.k_scale": one.clone(),
        "attn.v_scale": one.clone(),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
        "norm.weight": torch.ones(8),
        "ids": torch.arange(3),
    }
    found = numbers(checkpoint(tmp_path, tensors, compressed("float-quantized")))
    assert sorted(found) == ["a.bias", "a.weight", "ids", "norm.weight"]
    assert torch.equal(found["a.bias"].read(0, 4), tensors["a.bias"])
    assert found["ids"].dtype == torch.int64


def test_bytes_to_read_are_those_of_codes_and_scales(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"a.weight": float8(9, 17), "a.weight_scale_inv": scales(3, 3)}, BLOCKWISE)
    assert numbers(opened)["a.weight"].nbytes == 9 * 17 + 3 * 3 * 4


def test_range_of_a_model_on_the_hub_reads_only_its_rows(hub: LocalHub) -> None:
    codes, scale = float8(4000, 800), scales(1000, 100)
    repo_id = f"quantized/{next(NUMBERS)}"
    config = json.dumps({"quantization_config": BLOCKWISE}).encode()
    hub.seed(repo_id, {"model.safetensors": save({"a.weight": codes, "a.weight_scale_inv": scale}), "config.json": config})
    source = numbers(Checkpoint(ModelRef(repo_id)))["a.weight"]
    assert not source.near
    hub.clear_requests()
    read = source.read(800 * 10, 800 * 12)
    assert torch.equal(read, by_hand(codes[8:12], scale[2:3], (4, 8))[2:].reshape(-1))
    assert sorted(request.bytes_served for request in hub.requests() if request.method == "GET") == [400, 1600]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        (compressed("mixed-precision") | {"config_groups": {"g": {"format": "nvfp4-pack-quantized"}}}, "nvfp4-pack-quantized"),
        (compressed("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed("float-quantized") | {"transform_config": {"config_groups": {"u": {}}}}, "rotated weights"),
        ({"bits": 4}, "unknown"),
        ("gguf", "gguf"),
    ],
)
def test_format_that_is_not_read_is_refused_by_its_name(tmp_path: Path, settings: object, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantized \(.*{name}\).*take the model that it was made from"):
        dequantized(checkpoint(tmp_path, {"a.weight": torch.zeros(2, 2)}, settings))


@pytest.mark.parametrize(
    ("last", "name"), [("qweight", "gptq or awq"), ("weight_packed", "packed"), ("weight_g_idx", "reordered")]
)
@pytest.mark.parametrize("settings", [None, compressed("int-quantized")])
def test_tensors_of_a_format_that_is_not_read_are_refused(tmp_path: Path, last: str, name: str, settings: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        dequantized(checkpoint(tmp_path, {f"a.{last}": torch.zeros(2, 2, dtype=torch.int32)}, settings))


def test_packed_four_bits_under_fp8_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": int8(4, 8), "a.weight_scale_inv": scales(1, 1)}
    with pytest.raises(CheckpointError, match="packed 4-bit"):
        dequantized(checkpoint(tmp_path, tensors, BLOCKWISE))


def test_bitsandbytes_int8_of_transposed_weights_is_refused(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"a.weight": int8(6, 6), "a.SCB": scales(6)}, BNB, model_type="gpt2")
    with pytest.raises(CheckpointError, match="transposed weights, model type gpt2"):
        dequantized(opened)


@pytest.mark.parametrize(
    ("codes", "settings"), [(float8(4, 8), BLOCKWISE), (int8(4, 8), BNB), (int8(4, 8), compressed("dense"))]
)
def test_codes_without_a_scale_are_refused(tmp_path: Path, codes: Tensor, settings: object) -> None:
    with pytest.raises(CheckpointError, match=r"'a\.weight' is quantized .* no scale"):
        dequantized(checkpoint(tmp_path, {"a.weight": codes}, settings))


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale"])
def test_scales_without_a_config_that_explains_them_are_refused(tmp_path: Path, scale: str) -> None:
    tensors = {"a.weight": float8(4, 8), f"a.{scale}": scales(1)}
    with pytest.raises(CheckpointError, match="no quantization_config"):
        dequantized(checkpoint(tmp_path, tensors, None))


def test_float8_without_scales_and_config_is_just_numbers(tmp_path: Path) -> None:
    assert dequantized(checkpoint(tmp_path, {"a.weight": float8(4, 8)}, None)) is None


def test_model_that_is_not_quantized_is_left_alone(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "scale": torch.ones(1), "a.logit_scale": torch.ones(1)}
    assert dequantized(checkpoint(tmp_path, tensors, None)) is None


@pytest.mark.parametrize("form", [(2, 2), (4, 3), (8,), (16, 1), (2, 3, 1)])
def test_scales_of_a_shape_that_fits_no_block_are_refused(tmp_path: Path, form: tuple[int, ...]) -> None:
    tensors = {"a.weight": float8(9, 17), "a.weight_scale_inv": scales(*form)}
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv.*per tensor or row.*\(4, 8\)"):
        dequantized(checkpoint(tmp_path, tensors, BLOCKWISE))


def test_scales_that_fit_blocks_of_two_sizes_are_refused(tmp_path: Path) -> None:
    settings = compressed("float-quantized", block_structure=[4, 8])
    settings["config_groups"]["group_1"] = {"weights": {"block_structure": [5, 9]}}
    with pytest.raises(CheckpointError, match="per block of a size"):
        dequantized(checkpoint(tmp_path, {"a.weight": float8(8, 16), "a.weight_scale": scales(2, 2)}, settings))


def test_zero_points_of_another_shape_than_the_scales_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": int8(6, 7), "a.weight_scale": scales(6, 1), "a.weight_zero_point": int8(3, 1)}
    with pytest.raises(CheckpointError, match=r"weight_zero_point.*\[3, 1\].*\[6, 1\]"):
        dequantized(checkpoint(tmp_path, tensors, compressed("int-quantized")))


def test_scales_that_are_exponents_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": float8(4, 8), "a.weight_scale_inv": torch.full((1, 1), 120, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"scales in torch\.uint8"):
        dequantized(checkpoint(tmp_path, tensors, BLOCKWISE))


def test_settings_of_a_text_model_in_a_config_count(tmp_path: Path) -> None:
    tensors = {"a.weight": float8(4, 8), "a.weight_scale_inv": scales(1, 1)}
    opened = checkpoint(tmp_path, tensors, None, text_config={"quantization_config": BLOCKWISE})
    assert list(numbers(opened)) == ["a.weight"]


def test_plain_config_says_nothing_on_quantization_and_keeps_the_rest() -> None:
    config = {
        "model_type": "x",
        "quantization_config": BLOCKWISE,
        "text_config": {"quantization_config": BLOCKWISE, "hidden_size": 3},
        "rope_scaling": {"factor": 2},
    }
    assert plain_config(config) == {"model_type": "x", "text_config": {"hidden_size": 3}, "rope_scaling": {"factor": 2}}
    assert "quantization_config" in config["text_config"]
