"""A model in a local folder."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_merge.checkpoints.index import TensorEntry
from hf_merge.errors import CheckpointError


class LocalFiles:
    """The files of a folder; tensors are views of memory-mapped shards, read when they are used."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder.expanduser()
        self.label = label or str(folder)
        self._open: dict[str, Any] = {}
        self._lock = Lock()
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.label} is not a folder. Give the path of a saved model, or a Hub id.")

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file in the folder."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}

    def is_near(self, file: str) -> bool:
        """Every file is."""
        return True

    def read_bytes(self, file: str, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of a file."""
        try:
            with open(self.folder / file, "rb") as stream:
                stream.seek(start)
                data = bytearray(stream.read(stop - start))
        except OSError as error:
            raise CheckpointError(f"{self.label}: {file} cannot be read: {error}") from error
        if len(data) != stop - start:
            raise CheckpointError(f"{self.label}: {file} ends at byte {start + len(data)}, expected {stop}.")
        return data

    def read(self, name: str, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        try:
            with self._lock:
                if entry.file not in self._open:
                    self._open[entry.file] = safe_open(str(self.folder / entry.file), framework="pt")
            tensor: Tensor = self._open[entry.file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.label}: {entry.file} cannot be read: {error}") from error
        return tensor.reshape(-1)[start:stop] if tensor.numel() else torch.empty(0, dtype=entry.dtype)
