"""Weights stored as codes and scales, read as the numbers they stand for."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.index import TensorEntry
from hf_merge.checkpoints.source import Source, Stored
from hf_merge.errors import CheckpointError

_SETTINGS = ("quantization_config", "compression_config")
_SCALED_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors"})
_COMPRESSED_FORMATS = frozenset({"dense", "float-quantized", "int-quantized", "naive-quantized"})
_CODES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})
_SCALES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SUFFIXES = ("_scale_inv", "_scale")
"""Of the scales of a tensor. Both are multiplied with; the first name is the inverse of what the codes were made with."""
_ACTIVATIONS = (
    *(f"{part}_{what}" for part in ("input", "output", "k", "v", "q", "activation") for what in ("scale", "zero_point")),
    "weight_format",
)
"""Last parts of names that say how to compute with codes, not what they are."""
_FOREIGN = {
    "qweight": "gptq or awq",
    "weight_packed": "packed compressed-tensors",
    "absmax": "bitsandbytes 4-bit",
    "quant_map": "bitsandbytes 4-bit",
    "weight_g_idx": "compressed-tensors with reordered columns",
    "bitmask": "sparse compressed-tensors",
}
"""Last parts of names that only formats have which are not read, and those formats."""
_TRANSPOSING = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Model types with weights of (in, out), which bitsandbytes stores as (out, in)."""


@dataclass(frozen=True)
class Scaled:
    """`factor * (codes - zero) * scale`, where each scale is that of a block of rows and columns of the last two dimensions.

    `codes` has shape `(*lead, rows, columns)`; `scale` (and `zero`) has one element, or shape
    `(*lead, ceil(rows / block[0]), ceil(columns / block[1]))`, or as many elements without the dimensions that are 1. Computed
    in float32 and rounded once, to `dtype`. `form` is a number in the checkpoint that must be 0: codes in the order of their
    shape.
    """

    codes: Source
    scale: Source
    block: tuple[int, int]
    dtype: torch.dtype
    zero: Source | None = None
    factor: float = 1.0
    form: Source | None = None

    @property
    def label(self) -> str:
        """That of the codes."""
        return self.codes.label

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    @property
    def near(self) -> bool:
        """Whether all its parts are."""
        return self.codes.near and self.scale.near

    @property
    def delta(self) -> bool:
        """Never."""
        return False

    @property
    def nbytes(self) -> int:
        """Of the codes and the scales."""
        return self.codes.nbytes + self.scale.nbytes + (self.zero.nbytes if self.zero else 0)

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat; only the scales of their rows are read."""
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        if self.form is not None and int(self.form.read(0, 1)) != 0:
            raise CheckpointError(
                f"{self.label} is stored in the order of a GPU's tiles, which is not read: save it again with bitsandbytes "
                "0.45 or later, or take the model it was made from."
            )
        values = self.codes.read(start, stop).to(torch.float32)
        if self.zero is not None:
            values = values - self._spread(self.zero, start, stop)
        values = values * self._spread(self.scale, start, stop)
        return (values * self.factor if self.factor != 1.0 else values).to(self.dtype)

    def _spread(self, grid: Source, start: int, stop: int) -> Tensor:
        """For each element its number in the grid, in float32; one number if there is only one."""
        if math.prod(grid.shape) == 1:
            return grid.read(0, 1).to(torch.float32)
        rows, columns = self.shape[-2:]
        high, wide = -(-rows // self.block[0]), -(-columns // self.block[1])
        row = torch.arange(start // columns, -(-stop // columns))
        of_row = row // rows * high + row % rows // self.block[0]
        first, last = int(of_row[0]), int(of_row[-1]) + 1
        numbers = grid.read(first * wide, last * wide).to(torch.float32).reshape(-1, wide)
        spread = numbers.repeat_interleave(self.block[1], dim=1)[:, :columns] if wide > 1 else numbers.expand(-1, columns)
        begin = start // columns * columns
        return spread[of_row - first].reshape(-1)[start - begin : stop - begin]


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says on quantization, also in the configs that it contains."""
    return {
        key: plain_config(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in _SETTINGS
    }


def dequantized(checkpoint: Checkpoint) -> Mapping[str, Source] | None:
    """The tensors of a quantized checkpoint as the numbers that they stand for, without scales; None if it is not quantized.

    Read: fp8 with scales per block, row or tensor (`weight_scale_inv`, `weight_scale`); compressed-tensors in fp8 or int8 with
    scales per block, group, row or tensor, and zero points; bitsandbytes int8 (`SCB`). Values have the config's dtype (float32
    if it has none). Raises `CheckpointError` for every other format, by its name, and for codes without scales.
    """
    names = checkpoint.index.tensors
    settings = _settings(checkpoint.config)
    foreign = next((_FOREIGN[last] for name in names if (last := name.rpartition(".")[2]) in _FOREIGN), None)
    if settings is None:
        scales = [name for name in names if _scale_of(name, names) or (name.endswith(".SCB") and _bnb_weight(name) in names)]
        if foreign or scales:
            what = f"codes ({foreign})" if foreign else f"a scale ({scales[0]!r})"
            raise CheckpointError(
                f"{checkpoint.label} holds {what} but its config.json has no quantization_config that says how to read them: "
                "restore it, or take the model it was made from."
            )
        return None
    method = _method(settings)
    problem = _refusal(method, settings, checkpoint) or foreign
    if problem:
        raise CheckpointError(
            f"{checkpoint.label}: its weights are quantized ({problem}), and such codes cannot be merged: take the model "
            "that it was made from, or save it dequantized. Read are fp8 and int8 with scales, and bitsandbytes 8-bit."
        )
    found = dict(_sources(checkpoint, settings, bnb=method == "bitsandbytes"))
    if codes := sorted(name for name, source in found.items() if isinstance(source, Stored) and source.dtype in _CODES):
        raise CheckpointError(f"{checkpoint.label}: tensor {codes[0]!r} is quantized ({method}), but has no scale beside it.")
    return found


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config, or a config in it (that of the text model), says on quantization."""
    for part in (config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping))):
        for key in _SETTINGS:
            if key in part and part[key] is not None:
                return part[key] if isinstance(part[key], Mapping) else {"quant_method": part[key]}
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    return str(method or settings.get("format") or "unknown")


def _refusal(method: str, settings: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """The name of a format that is not read."""
    if method == "bitsandbytes":
        kind = str(checkpoint.config.get("model_type"))
        if not settings.get("load_in_8bit"):
            return "bitsandbytes 4-bit"
        return f"bitsandbytes 8-bit of transposed weights, model type {kind}" if kind in _TRANSPOSING else None
    if method not in _SCALED_METHODS:
        return method
    names = checkpoint.index.tensors
    if method != "compressed-tensors" and any(_scale_of(name, names, torch.int8) for name in names):
        return f"{method} with packed 4-bit codes"
    if method == "compressed-tensors":
        sparse = settings.get("sparsity_config") or {}
        formats = [settings.get("format"), sparse.get("format"), *(group.get("format") for group in _groups(settings))]
        # A mixture names the format of each group.
        other = [kind for kind in formats if kind not in (None, "mixed-precision", *_COMPRESSED_FORMATS)]
        if other:
            return f"{method}, {other[0]}"
        if settings.get("transform_config"):
            return f"{method}, rotated weights"
    return None


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _sources(checkpoint: Checkpoint, settings: Mapping[str, Any], *, bnb: bool) -> Iterator[tuple[str, Source]]:
    names = checkpoint.index.tensors
    dtype = _logical_dtype(checkpoint.config)
    for name in names:
        if _scale_of(name, names) or _zero_of(name, names) or name.rpartition(".")[2] in (*_ACTIVATIONS, "SCB"):
            continue
        codes = Stored(checkpoint, name)
        module = name.removesuffix("weight")
        scale = module + "SCB" if bnb else next((name + suffix for suffix in _SUFFIXES if name + suffix in names), "")
        if codes.dtype not in _CODES or scale not in names:
            yield name, codes
            continue
        grid = Stored(checkpoint, scale)
        if grid.dtype not in _SCALES:
            raise CheckpointError(f"{grid.label} scales in {grid.dtype}, which is not read: take the model it was made from.")
        if bnb:
            form = Stored(checkpoint, module + "weight_format") if module + "weight_format" in names else None
            # 127 is the largest code of a row.
            yield name, Scaled(codes, grid, _block(codes, grid, {}), dtype, factor=1 / 127, form=form)
            continue
        zero = Stored(checkpoint, name + "_zero_point") if name + "_zero_point" in names else None
        block = _block(codes, grid, settings)
        if zero is not None and math.prod(zero.shape) != math.prod(grid.shape):
            raise CheckpointError(f"{zero.label} has shape {list(zero.shape)}, its scale has {list(grid.shape)}.")
        yield name, Scaled(codes, grid, block, dtype, zero)


def _scale_of(name: str, names: Mapping[str, TensorEntry], *codes: torch.dtype) -> bool:
    """Whether a tensor is the scale of another one, which is in `codes` (any, if none are given)."""
    scaled = [names.get(name.removesuffix(suffix)) for suffix in _SUFFIXES if name.endswith(suffix)]
    return any(entry is not None and entry.dtype in (codes or _CODES) for entry in scaled)


def _zero_of(name: str, names: Mapping[str, TensorEntry]) -> bool:
    return name.endswith("_zero_point") and name.removesuffix("_zero_point") in names


def _bnb_weight(scale: str) -> str:
    return scale.removesuffix("SCB") + "weight"


def _block(codes: Source, grid: Source, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises `CheckpointError` unless the scale's shape says which."""
    if math.prod(grid.shape) == 1:
        return 1, 1
    if len(codes.shape) > 1:
        *lead, rows, columns = codes.shape
        if grid.shape == (*lead, rows):
            return 1, columns
        named = [(1, columns), (rows, columns), *_block_sizes(settings)]
        # Blocks larger than the tensor are the same block.
        sizes = {(min(size[0], rows), min(size[1], columns)) for size in named}
        fitting = [size for size in sizes if grid.shape == (*lead, -(-rows // size[0]), -(-columns // size[1]))]
        if len(fitting) == 1:
            return fitting[0]
    raise CheckpointError(
        f"{grid.label} has shape {list(grid.shape)}; for {list(codes.shape)} codes that is neither a scale per tensor or row, "
        f"nor one per block of a size in quantization_config ({list(_block_sizes(settings)) or 'it names none'})."
    )


def _block_sizes(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Every size of a block that the settings name: rows, columns."""
    sizes = [settings.get("weight_block_size")]
    for group in _groups(settings):
        weights = group.get("weights") or {}
        sizes += [weights.get("block_structure"), [1, weights.get("group_size")]]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(isinstance(part, int) and part > 0 for part in size):
            yield size[0], size[1]


def _logical_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config gives the model, or the text model in it."""
    for part in (config, config.get("text_config") or {}):
        named = part.get("dtype") or part.get("torch_dtype")
        dtype = getattr(torch, str(named).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype in _SCALES:
            return dtype
    return torch.float32
