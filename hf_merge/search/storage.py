"""Where a study is stored: a journal file, any Optuna storage, or memory."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from hf_merge.errors import HfMergeError

if sys.platform != "win32":
    import fcntl

Storage = str | os.PathLike[str] | BaseStorage | None
"""A journal file's path, a URL that Optuna understands (`sqlite:///study.db`), one of its storages, or None for memory."""

log = logging.getLogger(__name__)


def backend(storage: Storage) -> BaseStorage:
    """The Optuna storage behind `storage`; the folder of a journal file is made."""
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if (path := journal(storage)) is None:
        return optuna.storages.get_storage(str(storage))
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def journal(storage: Storage) -> Path | None:
    """The journal file's path, if it is one."""
    if storage is None or isinstance(storage, BaseStorage) or "://" in str(storage):
        return None
    return Path(storage).expanduser()


@contextmanager
def alone(storage: Storage) -> Iterator[None]:
    """Keeps a second search out of the same journal file. Raises `HfMergeError` if one is running there.

    The lock is the kernel's, so a killed process cannot leave it behind; what it can leave, Optuna's own lock file and half a
    line at the end of the journal, is cleared away. Other storages, and Windows, are not guarded.
    """
    path = journal(storage)
    if path is None or sys.platform == "win32":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HfMergeError(
                f"Another process is searching in {path}. Wait for it or stop it, or give this search a storage of its own."
            ) from error
        except OSError as error:  # a file system without locks
            log.debug("Cannot lock %s: %s", path, error)
        else:
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
            _end_at_a_line(path)
        yield


def _end_at_a_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
