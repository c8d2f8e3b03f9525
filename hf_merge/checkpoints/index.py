"""What a checkpoint holds, from the headers of its safetensors files alone."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import PurePosixPath
from typing import Any, Protocol

import torch

from hf_merge.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FIRST_READ = 100_000
"""Bytes read at once from the start of a shard: enough for most headers."""
LONGEST_HEADER = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Files(Protocol):
    """The files of one model at one revision: their sizes in bytes, and ranges of their bytes."""

    @property
    def label(self) -> str:
        """Name of the model for messages."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file at the top of the repository."""

    def read_bytes(self, file: str, start: int, stop: int) -> bytearray | mmap:
        """The bytes [start, stop) of a file. Raises `CheckpointError` if they cannot be had."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes [start, stop) of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by name."""

    tensors: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def read_index(files: Files) -> CheckpointIndex:
    """The index of a checkpoint, read from its headers and checked against its files' sizes.

    Raises `CheckpointError` for pickles, missing or truncated shards, names that leave the folder, and headers that contradict
    themselves.
    """
    if SINGLE in files.sizes:
        shards, promised = [SINGLE], {}
    elif INDEX in files.sizes:
        promised = _weight_map(files)
        shards = sorted(set(promised.values()))
    else:
        raise CheckpointError(_no_weights(files))
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in _header(files, shard).items():
            if name in tensors:
                raise CheckpointError(f"{files.label}: tensor {name!r} stands in both {tensors[name].file} and {shard}.")
            tensors[name] = entry
    absent = sorted(name for name in promised if name not in tensors or tensors[name].file != promised[name])
    if absent:
        raise CheckpointError(f"{files.label}: {INDEX} names tensors that its shards do not hold: {_some(absent)}.")
    if not tensors:
        raise CheckpointError(f"{files.label} holds no tensors.")
    return CheckpointIndex(tensors)


def _no_weights(files: Files) -> str:
    pickles = sorted(name for name in files.sizes if name.endswith(PICKLES))
    if pickles:
        return (
            f"{files.label} has its weights only as pickles ({_some(pickles)}), which can run code when they are loaded. "
            "Convert them once with transformers (`save_pretrained`) and use the safetensors."
        )
    return f"{files.label} has neither {SINGLE} nor {INDEX}. Its files: {_some(sorted(files.sizes))}."


def _weight_map(files: Files) -> dict[str, str]:
    content = parse_json(bytes(files.read_bytes(INDEX, 0, files.sizes[INDEX])), f"{files.label}: {INDEX}")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{files.label}: {INDEX} has no usable 'weight_map'.")
    names = sorted(set(weight_map.values()))
    hostile = [name for name in names if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors")]
    if hostile:
        raise CheckpointError(f"{files.label}: {INDEX} names files that are not shards beside it: {_some(hostile)}. Refused.")
    missing = [name for name in names if name not in files.sizes]
    if missing:
        raise CheckpointError(f"{files.label}: shards named in {INDEX} are missing: {_some(missing)}.")
    return weight_map


def _header(files: Files, shard: str) -> dict[str, TensorEntry]:
    where, size = f"{files.label}: {shard}", files.sizes[shard]
    head = bytes(files.read_bytes(shard, 0, min(FIRST_READ, size)))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(LONGEST_HEADER, size - 8):
        raise CheckpointError(f"{where} is not a safetensors file, or is truncated: {size} bytes, header of {length}.")
    if 8 + length > len(head):
        head += bytes(files.read_bytes(shard, len(head), 8 + length))
    content = parse_json(head[8 : 8 + length], where)
    entries = {n: _entry(n, v, shard, 8 + length, where) for n, v in content.items() if n != "__metadata__"}
    end = max((entry.stop for entry in entries.values()), default=8 + length)
    if end != size:
        problem = "is truncated" if end > size else "has bytes that its header does not name"
        raise CheckpointError(f"{where} {problem}: the header promises {end} bytes, the file has {size}.")
    return entries


def _entry(name: str, content: Any, shard: str, offset: int, where: str) -> TensorEntry:
    try:
        kind, shape = content["dtype"], tuple(int(size) for size in content["shape"])
        start, stop = (int(position) for position in content["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: the header's entry for {name!r} is broken: {content!r}.") from error
    if kind not in DTYPES:
        raise CheckpointError(f"{where}: {name!r} is stored as {kind}, which cannot be merged. Known: {', '.join(DTYPES)}.")
    entry = TensorEntry(DTYPES[kind], shape, shard, offset + start, offset + stop)
    if min((*shape, start), default=0) < 0 or entry.nbytes != entry.elements * entry.dtype.itemsize:
        raise CheckpointError(f"{where}: {name!r} of shape {shape} and dtype {kind} cannot fill {entry.nbytes} bytes.")
    return entry


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises `CheckpointError` that begins with `where`."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{where} does not parse as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}.")
    return content


def _some(names: Iterable[str], most: int = 5) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "none"
