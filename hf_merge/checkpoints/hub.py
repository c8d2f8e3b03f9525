"""A model on the Hub, read by ranged requests: nothing is written to disk."""

import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from http import HTTPStatus
from pathlib import Path

import httpx2 as httpx
import torch
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from torch import Tensor

from hf_merge.checkpoints.index import MODULE_CONFIG, TensorEntry
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef
from hf_merge.patience import RETRIED, TRIES, patiently, retry_after, wait
from hf_merge.version import __version__

TIMEOUT = httpx.Timeout(60.0, connect=15.0)
LARGE = 2**20
"""Bytes from which a read has pages of its own: a process may have some 65,000 such mappings, and a model more tensors."""


class _Again(Exception):
    """A read that failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class HubFiles:
    """The files of a repository at one commit. Files that the local cache already holds are read from there."""

    def __init__(self, ref: ModelRef, api: HfApi) -> None:
        self.api, self.commit = api, resolve(ref, api)
        self.ref, self.label = ref.pinned(self.commit), f"{ref.id}@{self.commit[:8]}"
        self._headers = build_hf_headers(token=api.token, library_name="hf_merge", library_version=__version__)
        self._cached: dict[str, LocalFiles | None] = {}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file at the top of the repository, and of the `MODULE_CONFIG`s."""
        try:
            entries = list(self.api.list_repo_tree(self.ref.id, revision=self.commit, recursive=True))
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise _explained(error, self.ref, self.api, f"{self.label}: the list of files cannot be read") from error
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.size for file in files if "/" not in file.path or MODULE_CONFIG.fullmatch(file.path)}

    def read(self, name: str, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        cached = self._cache(entry.file)
        if cached is not None:
            return cached.read(name, entry, start, stop)
        width = entry.dtype.itemsize
        data = self.read_bytes(entry.file, entry.start + start * width, entry.start + stop * width)
        return torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)

    def is_near(self, file: str) -> bool:
        """Whether a file is in the local cache."""
        return self._cache(file) is not None

    def read_bytes(self, file: str, start: int, stop: int) -> bytearray | mmap.mmap:
        """The bytes [start, stop) of a file; a transfer that breaks goes on where it broke."""
        cached = self._cache(file)
        if cached is not None:
            return cached.read_bytes(file, start, stop)
        # Anonymous pages go back to the system when they are dropped; the allocator would keep much of what passes through it.
        data = mmap.mmap(-1, stop - start) if stop - start >= LARGE else bytearray(stop - start)
        have, failed = 0, 0
        while have < len(data):
            try:
                for chunk in self._stream(file, start + have, stop):
                    data[have : have + len(chunk)] = chunk
                    have += len(chunk)
                    failed = 0
                if have < len(data):
                    raise _Again(f"the transfer ended after {have} of {len(data)} bytes")
            except (_Again, httpx.RequestError) as error:
                failed += 1
                if failed == TRIES:
                    raise CheckpointError(
                        f"{self.label}: bytes {start}-{stop} of {file} cannot be read after {TRIES} tries: {error}"
                    ) from error
                wait(failed, error.wait if isinstance(error, _Again) else None)
        return data

    def store(self, files: list[str]) -> None:
        """Download files into the local cache, from where they are read from now on."""
        if missing := [file for file in files if self._cache(file) is None]:
            snapshot(self.ref, self.api, missing)
            self._cached.clear()

    def _stream(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        url = hf_hub_url(self.ref.id, file, revision=self.commit, endpoint=self.api.endpoint)
        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            # The Hub granted what it forwards to a storage: a refusal there may pass, with a new address.
            forwarded = response.url.host != httpx.URL(self.api.endpoint).host
            if response.status_code in RETRIED or (forwarded and response.is_error):
                raise _Again(f"the server answered {response.status_code}", retry_after(response))
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                response.read()
                try:
                    hf_raise_for_status(response)
                except HfHubHTTPError as error:
                    raise _explained(error, self.ref, self.api, f"{self.label}: {file} cannot be read") from error
            size = self.sizes.get(file)
            whole = response.status_code == HTTPStatus.OK and start == 0 and stop == size
            given = response.headers.get("Content-Range", "")
            part, _, total = given.partition("/")
            if not whole and (part != f"bytes {start}-{stop - 1}" or total not in ("*", str(size or total))):
                raise _Again(f"asked for bytes {start}-{stop - 1} of {size}, the server sent {given or 'the whole file'!r}")
            left = stop - start
            for chunk in response.iter_bytes():
                if len(chunk) > left:
                    raise CheckpointError(f"{self.label}: the server sent more bytes of {file} than were asked for.")
                left -= len(chunk)
                yield chunk

    def _cache(self, file: str) -> LocalFiles | None:
        if file not in self._cached:
            path = try_to_load_from_cache(self.ref.id, file, revision=self.commit)
            self._cached[file] = LocalFiles(Path(path).parents[file.count("/")], self.label) if isinstance(path, str) else None
        return self._cached[file]


def resolve(ref: ModelRef, api: HfApi) -> str:
    """The commit that a model's revision stands for now. Raises `CheckpointError`, saying what to do."""
    try:
        commit = patiently(lambda: api.resolve_revision(ref.id, revision=ref.revision).resolved)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RevisionResolutionError, httpx.HTTPError) as error:
        raise _explained(error, ref, api, f"{ref} cannot be looked up on {api.endpoint}") from error
    if commit is None:
        raise CheckpointError(f"{ref}: the Hub gave no commit for it.")
    return str(commit)


def snapshot(ref: ModelRef, api: HfApi, files: list[str] | None = None) -> Path:
    """The folder of a model's commit in the local cache, after `files` were downloaded into it; None takes it as it is."""
    try:
        folder = api.snapshot_download(ref.id, revision=ref.revision, allow_patterns=files, local_files_only=files is None)
    except (OSError, httpx.HTTPError) as error:
        raise _explained(error, ref, api, f"{ref} cannot be downloaded") from error
    return Path(folder)


def _explained(error: Exception, ref: ModelRef, api: HfApi, problem: str) -> CheckpointError:
    """The error for a `problem` with a model on the Hub: what to do, or else the reason as it was given."""
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{ref.id} is gated: accept its terms at {api.endpoint}/{ref.id} and log in.")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{ref.id} has no revision {ref.revision!r}.")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(f"{ref.id} is not on {api.endpoint}, or is private: check the name, or log in.")
    if isinstance(error, RevisionResolutionError | LocalEntryNotFoundError | OfflineModeIsEnabled):
        return CheckpointError(f"{ref} is not in the local cache, and the Hub cannot be reached: {error}")
    return CheckpointError(f"{problem}: {error}")
