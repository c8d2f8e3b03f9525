"""A model on the Hub, read by ranged requests: nothing is written to disk."""

import random
import time
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
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from torch import Tensor

from hf_merge.checkpoints.index import TensorEntry
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef
from hf_merge.version import __version__

TRIES = 6
LONGEST_WAIT = 30.0
"""Seconds between two tries at most, a server's Retry-After included."""
TIMEOUT = httpx.Timeout(60.0, connect=15.0)
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Again(Exception):
    """A read that failed in a way that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class HubFiles:
    """The files of a repository at one commit. Files that the local cache already holds are read from there."""

    def __init__(self, ref: ModelRef, api: HfApi) -> None:
        self.repo_id, self.api = ref.id, api
        self.commit = resolve(ref, api)
        self.label = f"{ref.id}@{self.commit[:8]}"
        self._headers = build_hf_headers(token=api.token, library_name="hf_merge", library_version=__version__)
        self._cached: dict[str, LocalFiles | None] = {}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every file at the top of the repository."""
        try:
            entries = list(self.api.list_repo_tree(self.repo_id, revision=self.commit))
        except (HfHubHTTPError, httpx.HTTPError) as error:
            raise CheckpointError(f"{self.label}: the list of files cannot be read: {error}") from error
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}

    def read(self, name: str, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in its own dtype."""
        cached = self._cache(entry.file)
        if cached is not None:
            return cached.read(name, entry, start, stop)
        width = entry.dtype.itemsize
        data = self.read_bytes(entry.file, entry.start + start * width, entry.start + stop * width)
        return torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)

    def read_bytes(self, file: str, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of a file; a transfer that breaks goes on where it broke."""
        cached = self._cache(file)
        if cached is not None:
            return cached.read_bytes(file, start, stop)
        data, have, failed = bytearray(stop - start), 0, 0
        while have < len(data):
            try:
                for chunk in self._stream(file, start + have, stop):
                    data[have : have + len(chunk)] = chunk
                    have += len(chunk)
                    failed = 0
                if have < len(data):
                    raise _Again(f"the transfer ended after {have} of {len(data)} bytes")
            except (_Again, httpx.TransportError) as error:
                failed += 1
                if failed == TRIES:
                    raise CheckpointError(
                        f"{self.label}: bytes {start}-{stop} of {file} cannot be read after {TRIES} tries: {error}"
                    ) from error
                asked = error.wait if isinstance(error, _Again) else None
                time.sleep(min(LONGEST_WAIT, asked if asked is not None else random.uniform(0.5, 1.0) * 2 ** (failed - 2)))
        return data

    def _stream(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        url = hf_hub_url(self.repo_id, file, revision=self.commit, endpoint=self.api.endpoint)
        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            if response.status_code in RETRIED:
                raise _Again(f"the server answered {response.status_code}", _retry_after(response))
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                response.read()
                try:
                    hf_raise_for_status(response)
                except HfHubHTTPError as error:
                    raise CheckpointError(f"{self.label}: {file} cannot be read: {error}") from error
            whole = response.status_code == HTTPStatus.OK and start == 0 and stop == self.sizes.get(file)
            given = response.headers.get("Content-Range", "")
            if not whole and not given.startswith(f"bytes {start}-{stop - 1}/"):
                raise _Again(f"asked for bytes {start}-{stop - 1}, the server sent {given or 'the whole file'!r}")
            left = stop - start
            for chunk in response.iter_bytes():
                if len(chunk) > left:
                    raise CheckpointError(f"{self.label}: the server sent more bytes of {file} than were asked for.")
                left -= len(chunk)
                yield chunk

    def _cache(self, file: str) -> LocalFiles | None:
        if file not in self._cached:
            path = try_to_load_from_cache(self.repo_id, file, revision=self.commit)
            self._cached[file] = LocalFiles(Path(path).parent, self.label) if isinstance(path, str) else None
        return self._cached[file]


def resolve(ref: ModelRef, api: HfApi) -> str:
    """The commit that a model's revision stands for now. Raises `CheckpointError`, saying what to do."""
    try:
        commit = api.resolve_revision(ref.id, revision=ref.revision).resolved
    except GatedRepoError as error:
        raise CheckpointError(f"{ref} is gated: accept its terms at {api.endpoint}/{ref.id} and log in.") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{ref.id} has no revision {ref.revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{ref.id} is not on {api.endpoint}, or is private: check the name, or log in.") from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"{ref} is not in the local cache, and the Hub cannot be reached: {error}") from error
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
        raise CheckpointError(f"{ref} cannot be looked up on {api.endpoint}: {error}") from error
    if commit is None:
        raise CheckpointError(f"{ref}: the Hub gave no commit for it.")
    return str(commit)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
