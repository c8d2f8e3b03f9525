"""File contents on disk, addressed by hash: plain files by git blob id, LFS files by sha256."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CHUNK = 1 << 20
REGULAR_LIMIT = 10 * 1000 * 1000
_LFS_NAMES = """
.7z .arrow .bin .bz2 .ckpt .ftz .gguf .gz .h5 .joblib .mlmodel .model .msgpack .npy .npz .onnx .ot .parquet .pb
.pickle .pkl .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .xz .zip .zst
"""
_LFS_SUFFIXES = frozenset(_LFS_NAMES.split())


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a commit: git blob id (of the pointer for an LFS file), size in bytes, sha256 of an LFS file."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def content_id(self) -> str:
        """What ETag and the client's comparison of contents use."""
        return self.sha256 or self.oid


def goes_to_lfs(path: str, size: int, sample: bytes) -> bool:
    """The Hub's rule: known binary suffixes, large files, and whatever does not look like text. Never empty files."""
    if size == 0:
        return False
    return PurePosixPath(path).suffix.lower() in _LFS_SUFFIXES or size > REGULAR_LIMIT or b"\0" in sample


def pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def blob_id(content: bytes) -> str:
    """git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_entry(sha256: str, size: int) -> FileEntry:
    """The entry of an LFS file."""
    return FileEntry(blob_id(pointer(sha256, size)), size, sha256)


class Objects:
    """The contents of one repository under `root`. Writing is atomic: a file is complete or absent."""

    def __init__(self, root: Path, temporary: Callable[[], Path]) -> None:
        self.root = root
        self._temporary = temporary

    def path(self, content_id: str) -> Path:
        """Where content of this hash lies, or would lie."""
        return self.root / content_id[:2] / content_id

    def has(self, content_id: str) -> bool:
        """Whether the content is stored."""
        return self.path(content_id).is_file()

    def adopt(self, source: Path, content_id: str) -> None:
        """Move a complete file, whose hash the caller has computed, into the store."""
        target = self.path(content_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)

    def add_bytes(self, content: bytes) -> FileEntry:
        """Store a plain file."""
        oid = blob_id(content)
        if not self.has(oid):
            temporary = self._temporary()
            temporary.write_bytes(content)
            self.adopt(temporary, oid)
        return FileEntry(oid, len(content))

    def add_file(self, path: str, source: Path, *, move: bool = False) -> FileEntry:
        """Store a file that will be called `path`, reading it in chunks; `move` consumes the source."""
        size = source.stat().st_size
        with source.open("rb") as file:
            sample = file.read(512)
        if not goes_to_lfs(path, size, sample):
            entry = self.add_bytes(source.read_bytes())
            if move:
                source.unlink()
            return entry
        temporary = self._temporary()
        if move:
            shutil.move(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        sha256 = sha256_of(temporary)
        self.adopt(temporary, sha256)
        return lfs_entry(sha256, size)


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
