"""A checkpoint: a model's files at one revision, and its tensors by name."""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from torch import Tensor

from hf_merge.checkpoints.hub import HubFiles, resolve, snapshot
from hf_merge.checkpoints.index import INDEX, SINGLE, CheckpointIndex, parse_json, read_index
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.checkpoints.pickles import Pickles, has_pickles
from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.version import __version__

READERS = 4
"""Reads under way at once."""


def hub_api(token: str | bool | None = None, endpoint: str | None = None) -> HfApi:
    """The Hub's client under our name. Raises `RecipeError` for a token that cannot be one."""
    if isinstance(token, str):
        token = token.strip()
        # A client that trips over such a token in a header repeats it in its message.
        if not (token.isascii() and token.isprintable()):
            raise RecipeError("The token has characters in it that no token has: copy it again.")
    return HfApi(endpoint=endpoint, token=token, library_name="hf_merge", library_version=__version__)


class Checkpoint:
    """A model's tensors and small files, pinned to one commit when it is opened: nothing that is pushed later is mixed in.

    `pickles` allows weights that are only pickled (`Pickles`). Raises `CheckpointError` if the model cannot be found, now, or
    read, later.
    """

    def __init__(self, ref: ModelRef, api: HfApi | None = None, *, pickles: bool = False) -> None:
        self.api = api = api or hub_api()
        self.files: LocalFiles | HubFiles
        if ref.is_local:
            self.files, self.commit = LocalFiles(ref.path, str(ref)), None
        elif is_offline_mode():
            self.commit = resolve(ref, api)
            self.files = LocalFiles(snapshot(ref.pinned(self.commit), api), f"{ref.id}@{self.commit[:8]}")
        else:
            self.files = HubFiles(ref, api)
            self.commit = self.files.commit
        self.ref = ref.pinned(self.commit)
        self.label = self.files.label
        self._held: dict[str, Tensor] = {}
        self.kept: dict[str, Any] = {}
        """What others have worked out from the headers, by name, to be worked out once."""
        self._allow_pickles = pickles

    @cached_property
    def _pickles(self) -> Pickles | None:
        """The reader of a model whose weights are only pickled, where that is allowed."""
        safe = SINGLE in self.files.sizes or INDEX in self.files.sizes
        return Pickles(self.files) if self._allow_pickles and not safe and has_pickles(self.files) else None

    @cached_property
    def index(self) -> CheckpointIndex:
        """Every tensor, from the headers alone."""
        return read_index(self.files) if self._pickles is None else self._pickles.index

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none."""
        return self.json("config.json") or {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        entry = self.index.tensors[name]
        if name in self._held:
            return self._held[name][start:stop]
        reader = self.files if self._pickles is None else self._pickles
        return reader.read(name, entry, start, entry.elements if stop is None else stop)

    def is_near(self, name: str) -> bool:
        """Whether a tensor is read from memory or a local disk."""
        return name in self._held or self.files.is_near(self.index.tensors[name].file)

    def hold(self) -> None:
        """Read every tensor into memory once; later reads come from there."""
        names = [name for name in self.index.tensors if name not in self._held]
        with ThreadPoolExecutor(READERS, thread_name_prefix="hold") as pool:
            self._held.update(zip(names, pool.map(self.read, names), strict=True))

    def store(self) -> None:
        """Download the shards into the Hub's cache once; later reads are memory-mapped from there."""
        if isinstance(self.files, HubFiles):
            self.files.store(sorted({entry.file for entry in self.index.tensors.values()}))

    def bytes(self, file: str) -> bytes | None:
        """The whole of a small file; None if there is none."""
        size = self.files.sizes.get(file)
        return None if size is None else bytes(self.files.read_bytes(file, 0, size))

    def json(self, file: str) -> dict[str, Any] | None:
        """The content of a JSON file; None if there is none."""
        data = self.bytes(file)
        return None if data is None else parse_json(data, f"{self.label}: {file}")

    def __repr__(self) -> str:
        return f"Checkpoint({self.label})"
