"""Writing a checkpoint: which tensor goes into which shard (pure), and shards filled in any order."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from hf_merge.checkpoints.index import DTYPES
from hf_merge.errors import RecipeError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")
PATTERN = "model{suffix}.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name and its tensors in the order in which they lie in it."""

    name: str
    tensors: Mapping[str, TensorSpec]

    @property
    def header(self) -> bytes:
        """The safetensors header with its length in front; its own length is a multiple of 8, so that tensors are aligned."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, spec in self.tensors.items():
            stop = position + spec.nbytes
            content[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())


def bytes_of(size: int | str, name: str) -> int:
    """A number of bytes, also from a text with a decimal unit such as "5GB". Raises `RecipeError` that names the option."""
    found = _SIZE.fullmatch(str(size).strip().upper())
    if not found or float(found[1]) <= 0:
        raise RecipeError(f"{name} is a size such as 5GB, 500MB or a number of bytes, got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def plan_shards(tensors: Mapping[str, TensorSpec], max_shard_size: int | str = "5GB") -> list[Shard]:
    """Distribute tensors over shards of at most `max_shard_size` (bytes, or decimal units such as "5GB"), in their order.

    A tensor larger than that has a shard of its own. Names are the Hub's: `model.safetensors`, or
    `model-00001-of-0000N.safetensors`. Raises `RecipeError` for a size that is none.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=bytes_of(max_shard_size, "max_shard_size"),
    )
    return [Shard(file, {n: tensors[n] for n in names}) for file, names in split.filename_to_tensors.items()]


def index_json(shards: list[Shard]) -> bytes | None:
    """The content of model.safetensors.index.json; None for a single shard, which needs none."""
    if len(shards) == 1:
        return None
    specs = [spec for shard in shards for spec in shard.tensors.values()]
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


class ShardFile:
    """A shard being written: pieces of tensors in any order, into a file of full size that gets its name when it is whole."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        self.path = folder / shard.name
        self._part = folder / f".{shard.name}.part"
        header, self._starts, position = shard.header, {}, 0
        for name, spec in shard.tensors.items():
            self._starts[name] = len(header) + position
            position += spec.nbytes
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, len(header) + position)
            else:
                os.ftruncate(self._file, len(header) + position)
            self._write(header, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store `values`, flat, as the elements from `start` on of tensor `name`."""
        data = values.contiguous().view(torch.uint8).numpy().data if values.numel() else b""
        self._write(data, self._starts[name] + start * values.dtype.itemsize)

    def finish(self) -> Path:
        """Close the file and give it its name."""
        os.close(self._file)
        self._part.rename(self.path)
        return self.path

    def abandon(self) -> None:
        """Close the file and remove it."""
        os.close(self._file)
        self._part.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written
