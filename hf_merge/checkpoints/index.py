"""What a checkpoint holds, from the headers of its safetensors files alone."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import PurePosixPath
from typing import Any, Protocol

import torch

from hf_merge.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODULE_CONFIG = re.compile(r"\d+_\w+/config\.json")
"""Configs in folders that count: those of a sentence-transformers model's modules."""
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
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Files(Protocol):
    """The files of one model at one revision: their sizes in bytes, and ranges of their bytes."""

    @property
    def label(self) -> str:
        """Name of the model for messages."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file at the top of the repository, and of the `MODULE_CONFIG`s."""

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


def read_index(files: Files, single: str = SINGLE, index: str = INDEX) -> CheckpointIndex:
    """The index of a checkpoint, read from its headers and checked against its files' sizes.

    It is the file `single`, or else the shards that the file `index` names. Raises `CheckpointError` for pickles, missing or
    truncated shards, names that leave the folder, and headers that contradict themselves.
    """
    promised: Mapping[str, str] = {}
    if single in files.sizes:
        shards = [single]
    elif index in files.sizes:
        promised = weight_map(files, index, ".safetensors")
        shards = sorted(set(promised.values()))
    else:
        raise CheckpointError(_no_weights(files, single, index))
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        found = _header(files, shard)
        if twice := next((name for name in found if name in tensors), None):
            raise CheckpointError(f"{files.label}: tensor {twice!r} stands in both {tensors[twice].file} and {shard}.")
        tensors.update(found)
    absent = sorted(name for name in promised if name not in tensors or tensors[name].file != promised[name])
    if absent:
        raise CheckpointError(f"{files.label}: {index} names tensors that its shards do not hold: {some(absent)}.")
    if not tensors:
        raise CheckpointError(f"{files.label} holds no tensors.")
    return CheckpointIndex(tensors)


def weight_map(files: Files, index: str, suffix: str) -> dict[str, str]:
    """The shard of every tensor, from the file `index`.

    Raises `CheckpointError` if it does not parse, or names shards that are missing, lie elsewhere, or do not end on `suffix`.
    """
    content = parse_json(bytes(files.read_bytes(index, 0, files.sizes[index])), f"{files.label}: {index}")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{files.label}: {index} has no usable 'weight_map'.")
    names = sorted(set(shards.values()))
    hostile = [name for name in names if PurePosixPath(name).name != name or "\\" in name or not name.endswith(suffix)]
    if hostile:
        raise CheckpointError(f"{files.label}: {index} names files that are not shards beside it: {some(hostile)}. Refused.")
    missing = [name for name in names if name not in files.sizes]
    if missing:
        raise CheckpointError(f"{files.label}: shards named in {index} are missing: {some(missing)}.")
    return shards


def _no_weights(files: Files, single: str, index: str) -> str:
    pickles = sorted(name for name in files.sizes if name.endswith(PICKLES))
    if pickles:
        return (
            f"{files.label} has its weights only as pickles ({some(pickles)}), which can run code when they are loaded. "
            "Convert them once with transformers (`save_pretrained`) and use the safetensors; or pass pickles=True (--pickles) "
            "to read them with torch's loader for weights alone, which runs no code."
        )
    if ggufs := sorted(name for name in files.sizes if name.endswith(".gguf")):
        return (
            f"{files.label} has its weights only as GGUF ({some(ggufs)}), quantized for llama.cpp, which cannot be merged: "
            "take the model it was made from."
        )
    return f"{files.label} has neither {single} nor {index}. Its files: {some(sorted(files.sizes))}."


def _header(files: Files, shard: str) -> dict[str, TensorEntry]:
    where, size = f"{files.label}: {shard}", files.sizes[shard]
    head = bytes(files.read_bytes(shard, 0, min(FIRST_READ, size)))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(LONGEST_HEADER, size - 8):
        raise CheckpointError(f"{where} is not a safetensors file, or is truncated: {size} bytes, header of {length}.")
    if 8 + length > len(head):
        head += bytes(files.read_bytes(shard, len(head), 8 + length))
    content = parse_json(head[8 : 8 + length], where)
    content.pop("__metadata__", None)
    entries = {name: _entry(name, described, shard, 8 + length, where) for name, described in content.items()}
    _check_tiling(entries, 8 + length, size, where)
    return entries


def _check_tiling(entries: Mapping[str, TensorEntry], position: int, size: int, where: str) -> None:
    """Raise unless the tensors fill the file from `position` to its end, each byte once."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{where}: {name!r} {problem}: it starts at byte {entry.start}, expected {position}.")
        position = entry.stop
    if position != size:
        problem = "is truncated" if position > size else "has bytes that its header does not name"
        raise CheckpointError(f"{where} {problem}: the header promises {position} bytes, the file has {size}.")


def _entry(name: str, content: Any, shard: str, offset: int, where: str) -> TensorEntry:
    try:
        kind, shape, (start, stop) = content["dtype"], content["shape"], content["data_offsets"]
        whole = all(type(number) is int for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: the header's entry for {name!r} is broken: {content!r:.200}.") from error
    if not whole or not isinstance(kind, str):
        raise CheckpointError(f"{where}: the header's entry for {name!r} is broken: {content!r:.200}.")
    if kind not in DTYPES:
        raise CheckpointError(f"{where}: {name!r} is stored as {kind}, which cannot be merged. Known: {', '.join(DTYPES)}.")
    dtype = DTYPES[kind]
    if min((*shape, start)) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where}: {name!r} of shape {tuple(shape)} and dtype {kind} cannot fill {stop - start} bytes.")
    return TensorEntry(dtype, tuple(shape), shard, offset + start, offset + stop)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises `CheckpointError` that begins with `where`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} does not parse as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}.")
    return content


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of `names` in words, and how many more there are."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "none"
