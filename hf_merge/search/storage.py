"""Where a study is stored: a journal file, a database, any Optuna storage, or memory."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, PendingRollbackError, SQLAlchemyError

from hf_merge.errors import HfMergeError, RecipeError

if sys.platform != "win32":
    import fcntl

Storage = str | os.PathLike[str] | BaseStorage | None
"""A journal file's path, a database's URL (`postgresql://user@host/name`, `sqlite:///study.db`), an Optuna storage, or None for
memory."""

OUTAGE = 1800.0
"""Seconds that a database which was there before may be away."""

TRIES = 5
"""Times that a database is asked for at first: several workers may make its tables at once, and its server may restart."""

log = logging.getLogger(__name__)


def backend(storage: Storage) -> BaseStorage:
    """The Optuna storage behind `storage`; the folder of a journal file is made. A server that goes away is waited for (see
    `OUTAGE`). Raises `HfMergeError` for a database that cannot be reached at all."""
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, InMemoryStorage | JournalStorage | _Waits):
        return storage
    if isinstance(storage, BaseStorage):
        return _patient(storage, shown(storage))
    if (path := journal(storage)) is None:
        return _patient(_database(str(storage)), shown(storage))
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def journal(storage: Storage) -> Path | None:
    """The journal file's path, if it is one."""
    if storage is None or isinstance(storage, BaseStorage) or "://" in str(storage):
        return None
    return Path(storage).expanduser()


def shown(storage: Storage) -> str:
    """`storage` in words, without a database's password."""
    if isinstance(storage, BaseStorage):
        return type(storage).__name__
    if storage is None or journal(storage) is not None:
        return str(storage or "memory")
    try:
        return sqlalchemy.make_url(str(storage)).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return f"{str(storage).partition('://')[0]}://…"


@contextmanager
def alone(storage: Storage, *, shared: bool = False) -> Iterator[None]:
    """Keeps a second search out of the same journal file, or lets in only those that are `shared` as well.

    Raises `HfMergeError` if a search is running there that does not allow this one. The lock is the kernel's, so a killed
    process cannot leave it behind; what it can leave, Optuna's own lock file and half a line at the end of the journal, the
    first one clears away. Other storages, and Windows, are not guarded.
    """
    path = journal(storage)
    if path is None or sys.platform == "win32":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            if _locked(file.fileno(), fcntl.LOCK_EX):
                path.with_name(path.name + ".lock").unlink(missing_ok=True)
                _end_at_a_line(path)
            elif not shared:
                raise _taken(path)
            if shared and not _locked(file.fileno(), fcntl.LOCK_SH):
                raise _taken(path)
        except OSError as error:  # a file system without locks
            log.debug("Cannot lock %s: %s", path, error)
        yield


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(path: Path) -> HfMergeError:
    return HfMergeError(
        f"Another process is searching in {path}. Wait for it or stop it, or give this search a storage of its own. "
        "Several processes search one study together as workers (hf-merge worker)."
    )


def _end_at_a_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _patient(storage: BaseStorage, name: str) -> BaseStorage:
    if isinstance(storage, RDBStorage) and storage.engine.dialect.name == "sqlite":
        _one_at_a_time(storage.engine)
    patient: BaseStorage = Patient(optuna.storages.get_storage(storage), name, storage.remove_session)
    return patient


def _database(given: str) -> RDBStorage:
    try:
        url = sqlalchemy.make_url(given)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": 60}
        return _reached(lambda: RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options), shown(given))
    except (ImportError, NoSuchModuleError) as error:
        raise HfMergeError(
            f"There is no driver for {shown(given)}: {error}. For PostgreSQL: pip install 'hf_merge[postgres]'."
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        raise RecipeError(f"{shown(given)} is not the URL of a database, such as postgresql://user@host/name.") from error


def _reached(connect: Callable[[], RDBStorage], name: str) -> RDBStorage:
    for tries in range(1, TRIES + 1):
        try:
            return connect()
        except (DBAPIError, StorageInternalError) as error:
            said = error if isinstance(error, DBAPIError) else error.__cause__
            if not isinstance(said, DBAPIError):
                raise
            if tries == TRIES:
                reason = str(said.orig).strip().partition("\n")[0]
                raise HfMergeError(f"The storage {name} cannot be used: {reason}") from error
            time.sleep(0.5 * tries)
    raise AssertionError("counting ends never")


def _one_at_a_time(engine: sqlalchemy.Engine) -> None:
    """Makes every transaction of SQLite's take the write lock first. Without it the driver begins none until something is
    written, and two processes may both see a trial waiting and both take it."""

    if not sqlalchemy.event.contains(engine, "begin", _begin):
        sqlalchemy.event.listen(engine, "connect", _by_hand)
        sqlalchemy.event.listen(engine, "begin", _begin)
        engine.dispose()


def _by_hand(connection: Any, _: object) -> None:
    connection.isolation_level = None


def _begin(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is a server that is away or busy, by an error or its causes: Optuna wraps what the driver said."""
    while error is not None:
        if isinstance(error, PendingRollbackError):
            return True
        if isinstance(error, DBAPIError):
            text = str(error.orig)
            lost = error.connection_invalidated or isinstance(
                error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
            )
            return lost and ("locked" in text or "busy" in text or "sqlite" not in type(error.orig).__module__)
        code = getattr(error, "code", None)
        if type(error).__module__.startswith("grpc") and callable(code):
            return getattr(code(), "name", "") == "UNAVAILABLE"
        error = error.__cause__
    return False


class _Waits(BaseStorage):
    """A storage behind a network: every call is repeated while its server is away, for up to `OUTAGE` seconds.

    A call whose answer was lost is repeated as well. What that may leave (a trial that nobody runs, a recipe that is queued
    twice, a trial that has ended already) is what a killed worker may leave, and is treated in the same way.
    """

    def __init__(self, behind: BaseStorage, name: str, forget: Callable[[], None] = lambda: None) -> None:
        self.behind = behind
        self.name = name
        self.forget = forget  # the connection that was lost: SQLAlchemy goes on with its broken transaction otherwise

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        began, pause, waited = time.monotonic(), 0.1, False
        while True:
            try:
                answer = getattr(self.behind, method)(*args, **kwargs)
            except Exception as error:
                if not _may_pass(error):
                    raise
                if time.monotonic() - began > OUTAGE:
                    raise HfMergeError(f"The storage {self.name} has been away for {OUTAGE / 60:.0f} minutes.") from error
                if pause > 1 and not waited:
                    waited = True
                    log.warning("The storage %s is away; waiting for it.", self.name)
                with suppress(SQLAlchemyError):
                    self.forget()
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
            else:
                if waited:
                    log.warning("The storage %s is back.", self.name)
                return answer


def _forwarded(method: str) -> Callable[..., Any]:
    def call(self: _Waits, *args: Any, **kwargs: Any) -> Any:
        return self._call(method, *args, **kwargs)

    call.__name__ = method
    return call


Patient: Any = type(
    "Patient",
    (_Waits,),
    {"__module__": __name__, "__doc__": _Waits.__doc__}
    | {name: _forwarded(name) for name, value in vars(BaseStorage).items() if callable(value) and not name.startswith("__")},
)
"""`_Waits` with every method of Optuna's storages."""


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its greetings: a new study's INFO line, and the warning that names of objectives are experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
