"""A model in a local folder."""

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from hf_merge.checkpoints.index import MODULE_CONFIG, TensorEntry
from hf_merge.errors import CheckpointError


class LocalFiles:
    """The files of a folder. Shards that were read from stay open as long as this object lives.

    Tensors are read into memory of their own: pages of a mapped file would count as the process's and be slower to come by.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder.expanduser()
        self.label = label or str(folder)
        self._open: dict[str, int] = {}
        self._lock = Lock()
        weakref.finalize(self, _close, self._open)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.label} is not a folder. Give the path of a saved model, or a Hub id.")

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file in the folder, and of the `MODULE_CONFIG`s."""
        paths = sorted([*self.folder.iterdir(), *self.folder.glob("*/config.json")])
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
        return {name: size for name, size in sizes.items() if "/" not in name or MODULE_CONFIG.fullmatch(name)}

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
        values = torch.empty(stop - start, dtype=entry.dtype)
        if stop > start:
            view, position = values.view(torch.uint8).numpy().data, entry.start + start * entry.dtype.itemsize
            try:
                file = self._opened(entry.file)
                while view and (got := os.preadv(file, [view], position)):
                    view, position = view[got:], position + got
            except OSError as error:
                raise CheckpointError(f"{self.label}: {entry.file} cannot be read: {error}") from error
            if view:
                raise CheckpointError(f"{self.label}: {entry.file} ends at byte {position}, expected {position + len(view)}.")
        return values

    def _opened(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self.folder / file, os.O_RDONLY)
                size = os.fstat(self._open[file]).st_size
                if size != self.sizes.get(file):
                    os.close(self._open.pop(file))
                    raise OSError(f"it has {size} bytes, and had {self.sizes.get(file)} when its header was read")
            return self._open[file]


def _close(opened: dict[str, int]) -> None:
    for file in opened.values():
        os.close(file)
