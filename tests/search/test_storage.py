"""Where studies are stored, and that one search at a time writes there."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import optuna
import psycopg
import pytest
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study._frozen import FrozenStudy
from sqlalchemy.exc import OperationalError

from hf_merge.errors import HfMergeError
from hf_merge.search import storage as storage_module
from hf_merge.search.storage import Patient, alone, backend


def test_a_path_is_a_journal_file_and_its_folder_is_made(tmp_path: Path) -> None:
    assert isinstance(backend(tmp_path / "new" / "study.log"), JournalStorage)
    assert (tmp_path / "new" / "study.log").exists()


def test_a_url_is_left_to_optuna(tmp_path: Path) -> None:
    store = backend(f"sqlite:///{tmp_path}/study.db")
    optuna.create_study(storage=store)
    assert (tmp_path / "study.db").exists()


def test_nothing_means_memory() -> None:
    assert isinstance(backend(None), InMemoryStorage)


@pytest.mark.parametrize("kind", ["memory", "journal"])
def test_a_storage_of_optuna_s_is_taken_as_it_is(tmp_path: Path, kind: str) -> None:
    store = InMemoryStorage() if kind == "memory" else JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    assert backend(store) is store


def test_a_database_of_optuna_s_is_used_patiently(tmp_path: Path) -> None:
    store = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    optuna.create_study(storage=backend(store), study_name="here")
    assert optuna.get_all_study_names(store) == ["here"]


class Away(InMemoryStorage):
    """A storage whose server is away for the next few calls."""

    def __init__(self, calls: int, error: Exception) -> None:
        super().__init__()
        self.calls, self.error = calls, error

    def get_all_studies(self) -> list[FrozenStudy]:
        self.calls -= 1
        if self.calls >= 0:
            raise self.error
        return super().get_all_studies()


def gone(text: str = "server closed the connection unexpectedly") -> Exception:
    """What Optuna makes of a lost connection."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("SELECT 1", {}, psycopg.OperationalError(text))
    return error


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses take no time; their seconds."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: sum(pauses))
    monkeypatch.setattr(storage_module, "time", clock)
    return pauses


def test_a_server_that_is_away_is_waited_for(no_time: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert Patient(Away(6, gone()), "the database").get_all_studies() == []
    assert len(no_time) == 6
    assert "The storage the database is away; waiting for it." in caplog.text
    assert "The storage the database is back." in caplog.text


def test_a_server_that_does_not_come_back_is_given_up(no_time: list[float]) -> None:
    with pytest.raises(HfMergeError, match="the database has been away for 30 minutes"):
        Patient(Away(10**6, gone()), "the database").get_all_studies()
    assert max(no_time) == 5.0


@pytest.mark.parametrize(
    "error",
    [KeyError("study"), ValueError("bad"), StorageInternalError("too long")],
    ids=["missing", "bad", "other"],
)
def test_an_error_that_will_not_pass_is_raised_at_once(no_time: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        Patient(Away(1, error), "the database").get_all_studies()
    assert no_time == []


def test_a_database_that_cannot_be_reached_at_all_is_an_error_without_its_password(no_time: list[float]) -> None:
    with pytest.raises(HfMergeError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:1/x cannot be used: connection") as caught:
        backend("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_a_server_that_goes_down_while_a_database_is_opened_is_asked_again(
    tmp_path: Path, no_time: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [gone(), gone()]

    def opened(*args: object, **options: object) -> RDBStorage:
        if errors:
            raise errors.pop()
        return RDBStorage(f"sqlite:///{tmp_path}/study.db")

    monkeypatch.setattr(storage_module, "RDBStorage", opened)
    assert storage_module._database("postgresql://me@127.0.0.1/x").get_all_studies() == []
    assert len(no_time) == 2


@pytest.mark.parametrize("url", ["postgresql://me:secret@host:port/x", "nothing://me:secret@host/x"])
def test_what_is_no_database_is_an_error_without_its_password(url: str) -> None:
    with pytest.raises(HfMergeError) as caught:
        backend(url)
    assert "secret" not in str(caught.value)


def test_a_database_takes_a_waiting_trial_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    made = optuna.create_study(storage=backend(url), study_name="s", sampler=RandomSampler())
    for number in range(40):
        made.enqueue_trial({"x": number / 40})
    took: list[int] = []

    def worker() -> None:
        study = optuna.load_study(storage=backend(url), study_name="s", sampler=RandomSampler())
        took.extend(study.ask().number for _ in range(10))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(took) == list(range(40))


def test_shared_searches_are_let_into_one_journal(tmp_path: Path) -> None:
    with alone(tmp_path / "study.log", shared=True), alone(tmp_path / "study.log", shared=True):
        pass


@pytest.mark.parametrize("first", [False, True])
def test_a_journal_is_for_one_search_or_for_shared_ones(tmp_path: Path, first: bool) -> None:
    with (
        alone(tmp_path / "study.log", shared=first),
        pytest.raises(HfMergeError, match="Another process is searching in"),
        alone(tmp_path / "study.log", shared=not first),
    ):
        pass


def test_a_second_search_in_the_same_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    code = f"from hf_merge.search.storage import alone\nwith alone({str(path)!r}): print('in')"
    with alone(path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Another process is searching in" in other.stderr
    assert other.returncode != 0


def test_a_journal_is_free_again_after_a_search(tmp_path: Path) -> None:
    with alone(tmp_path / "study.log"):
        pass
    with alone(tmp_path / "study.log"):
        pass


def test_a_journal_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "study.log"):
        _ = 1 / 0
    with alone(tmp_path / "study.log"):
        pass


def test_the_lock_that_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    optuna.create_study(storage=backend(path), study_name="before")
    os.close(os.open(f"{path}.lock", os.O_CREAT))
    with alone(path):
        assert not os.path.lexists(f"{path}.lock")
        optuna.create_study(storage=backend(path), study_name="after")
    assert set(optuna.get_all_study_names(backend(path))) == {"before", "after"}


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "wor', b"{", b'{"op_code":0,"worker_id":"w","study_name":"torn"}'])
def test_half_a_line_at_the_end_of_a_journal_is_cleared_away(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "study.log"
    optuna.create_study(storage=backend(path), study_name="before")
    with path.open("ab") as file:
        file.write(torn)
    with alone(path):
        optuna.create_study(storage=backend(path), study_name="after")
    assert set(optuna.get_all_study_names(backend(path))) == {"before", "after"}


def test_a_whole_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    optuna.create_study(storage=backend(path), study_name="before")
    content = path.read_bytes()
    with alone(path):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("storage", [None, "sqlite:///never-made.db", InMemoryStorage()], ids=["memory", "url", "storage"])
def test_other_storages_are_not_guarded(storage: object) -> None:
    with alone(storage), alone(storage):  # type: ignore[arg-type]
        pass
    assert not Path("never-made.db").exists()


def test_the_error_names_the_file(tmp_path: Path) -> None:
    with alone(tmp_path / "study.log"), pytest.raises(HfMergeError, match=r"study\.log"), alone(tmp_path / "study.log"):
        pass
