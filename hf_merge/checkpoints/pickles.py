"""Weights that torch pickled: read with its loader for weights alone, which makes tensors and calls nothing else."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hf_merge.checkpoints.hub import HubFiles, snapshot
from hf_merge.checkpoints.index import DTYPES, CheckpointIndex, Files, TensorEntry, weight_map
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_ZIP = b"PK\x03\x04"
_READABLE = frozenset(DTYPES.values())


def has_pickles(files: Files) -> bool:
    """Whether a model has pickled weights under the names that `Pickles` reads."""
    return SINGLE in files.sizes or INDEX in files.sizes


class Pickles:
    """The tensors of `pytorch_model.bin`, or of the shards of its index.

    Shards of a model on the Hub are downloaded into its cache first. A shard is memory-mapped; one in the format from before
    torch 1.6 is read whole.
    """

    def __init__(self, files: LocalFiles | HubFiles) -> None:
        self.files = files

    @cached_property
    def index(self) -> CheckpointIndex:
        """Every tensor; its place is the shard's name and its size, for a pickle's tensors may be views of each other.

        Raises `CheckpointError` for a shard that holds anything but tensors by name, or does not load as weights alone, and
        for an index that its shards do not keep.
        """
        tensors = self._tensors
        return CheckpointIndex(
            {
                name: TensorEntry(tensor.dtype, tuple(tensor.shape), shard, 0, tensor.numel() * tensor.dtype.itemsize)
                for name, (shard, tensor) in tensors.items()
            }
        )

    def read(self, name: str, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor in the order of its shape, flat, in its own dtype; not to be written to."""
        tensor = self._tensors[name][1]
        if tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        # A view with gaps or in another order: only the rows that are asked for are copied.
        row = math.prod(tensor.shape[1:])
        first = start // row
        return tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]

    @cached_property
    def _tensors(self) -> Mapping[str, tuple[str, Tensor]]:
        promised = {} if SINGLE in self.files.sizes else weight_map(self.files, INDEX, ".bin")
        shards = sorted(set(promised.values())) or [SINGLE]
        folder, label = self._folder(shards), self.files.label
        found: dict[str, tuple[str, Tensor]] = {}
        for shard in shards:
            for name, tensor in _load(folder / shard, f"{label}: {shard}"):
                if name in found:
                    raise CheckpointError(f"{label}: tensor {name!r} stands in both {found[name][0]} and {shard}.")
                found[name] = shard, tensor
        if absent := sorted(name for name, shard in promised.items() if name not in found or found[name][0] != shard):
            raise CheckpointError(f"{label}: {INDEX} names tensors that its shards do not hold: {absent[0]!r} and others.")
        if not found:
            raise CheckpointError(f"{label} holds no tensors.")
        return found

    def _folder(self, shards: list[str]) -> Path:
        if isinstance(self.files, LocalFiles):
            return self.files.folder
        self.files.store(shards)
        return snapshot(self.files.ref, self.files.api, shards)


def _load(path: Path, where: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard by name."""
    try:
        with open(path, "rb") as stream:
            mapped = stream.read(len(_ZIP)) == _ZIP
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what a broken or hostile pickle makes the loader raise is anything
        raise CheckpointError(
            f"{where} does not load as weights alone: {_reason(error)} Only tensors are read from pickles; convert the model "
            "with transformers (`save_pretrained`) where you trust it, and use the safetensors."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, expected tensors by name (a state dict).")
    size = path.stat().st_size
    for name, tensor in content.items():
        problem = None
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            problem = f"is a {type(tensor).__name__}, expected tensors by name (a state dict)"
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in _READABLE or tensor.is_meta:
            problem = f"is a {tensor.layout} tensor of {tensor.dtype}, which cannot be merged"
        elif tensor.numel() * tensor.dtype.itemsize > size:
            problem = f"of shape {tuple(tensor.shape)} is larger than the file"
        if problem:
            raise CheckpointError(f"{where}: {name!r} {problem}.")
        yield name, tensor.detach()


def _reason(error: Exception) -> str:
    """What the loader refused, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "GLOBAL" in line or line.startswith("WeightsUnpickler error")]
    other = [line for line in lines if line and not line.startswith("Weights only")]
    return [*told, *other, type(error).__name__][0].partition(" Please use")[0]
