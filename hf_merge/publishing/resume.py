"""What an unfinished push has uploaded, noted on this machine: even after a kill no shard is merged or sent again."""

import base64
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import build_hf_headers

from hf_merge.errors import PublishError

FORGOTTEN = 30 * 24 * 3600
"""Seconds after which an unfinished push that nobody took up again is cleared away."""


@dataclass(frozen=True, kw_only=True)
class UploadedShard:
    """A file that the Hub holds though no commit shows it: all that a commit needs to name it.

    `sample` is its first 512 bytes, by which the Hub tells texts from others. A file too small for LFS is not on the Hub
    yet, and has its `content` here.
    """

    name: str
    size: int
    sha256: str
    sample: bytes
    content: bytes | None = None

    @classmethod
    def of(cls, operation: CommitOperationAdd) -> "UploadedShard":
        """What an operation was about, after its upload."""
        info, kept = operation.upload_info, operation.path_or_fileobj
        content = kept if isinstance(kept, bytes) and kept else None
        return cls(name=operation.path_in_repo, size=info.size, sha256=info.sha256.hex(), sample=info.sample, content=content)

    def operation(self) -> CommitOperationAdd:
        """Its part of a commit. Bytes that the Hub holds are not needed for that; if it lost them, the commit fails."""
        operation = CommitOperationAdd(self.name, self.content or b"")
        if self.content is None:
            operation.path_or_fileobj, operation.upload_info = _Elsewhere(), self._info()
        return operation

    def is_held(self, api: HfApi, repo_id: str, revision: str | None) -> bool:
        """Whether the Hub, asked for an address to upload to, sees no need."""
        answers, _, _ = post_lfs_batch_info(
            [self._info()],
            token=None,  # it is in the headers
            repo_type="model",
            repo_id=repo_id,
            revision=revision,
            endpoint=api.endpoint,
            headers=build_hf_headers(token=api.token, library_name=api.library_name, library_version=api.library_version),
        )
        return any(answer["oid"] == self.sha256 and not answer.get("actions") for answer in answers)

    def _info(self) -> UploadInfo:
        return UploadInfo(size=self.size, sample=self.sample, sha256=bytes.fromhex(self.sha256))


class _Elsewhere(io.BytesIO):
    """Stands for bytes that only the Hub holds: who wants to send them all the same is refused."""

    def tell(self) -> int:
        raise OSError("the Hub does not hold this file any more, do the same again")


class PushState:
    """The notes of one push below `root`, told from all others by `what` it is: its repository, its models, its recipe.

    No token is in them, and no name of a model or a repository.
    """

    def __init__(self, root: Path, *what: str) -> None:
        self.root = root
        self.folder = root / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    @contextmanager
    def scratch(self, process: int = 0) -> Iterator[Path]:
        """A new folder for the shards under way of one `process` of the push; what a killed one left is removed.

        Raises `PublishError` while another process of this machine is at the same work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"scratch-{process}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PublishError("This merge is being pushed by another process of this machine: wait until it ends.") from None
        with lock:
            self._clear_away(f"scratch-{process}-*")
            folder = Path(tempfile.mkdtemp(prefix=f"scratch-{process}-", dir=self.folder))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def note(self, shard: UploadedShard) -> None:
        """Remember an upload."""
        content = {"size": shard.size, "sha256": shard.sha256, "sample": base64.b64encode(shard.sample).decode()}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{shard.name}.part"
        part.write_text(json.dumps(content))
        os.replace(part, self._note(shard.name))

    def noted(self, name: str) -> UploadedShard | None:
        """What is remembered of a shard; None for nothing, or nothing readable."""
        try:
            found = json.loads(self._note(name).read_text())
            sample = base64.b64decode(found["sample"], validate=True)
            return UploadedShard(name=name, size=int(found["size"]), sha256=bytes.fromhex(found["sha256"]).hex(), sample=sample)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self) -> None:
        """Forget everything, once the commit is made."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _clear_away(self, leftovers: str) -> None:
        for folder in self.folder.glob(leftovers):
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self.root.iterdir():
            # A folder changes with each note in it. Another process may be clearing away as well.
            with suppress(FileNotFoundError):
                if folder != self.folder and folder.stat().st_mtime < time.time() - FORGOTTEN:
                    shutil.rmtree(folder, ignore_errors=True)
