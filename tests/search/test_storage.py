"""Where studies are stored, and that one search at a time writes there."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage

from hf_merge.errors import HfMergeError
from hf_merge.search.storage import alone, backend


def test_a_path_is_a_journal_file_and_its_folder_is_made(tmp_path: Path) -> None:
    assert isinstance(backend(tmp_path / "new" / "study.log"), JournalStorage)
    assert (tmp_path / "new" / "study.log").exists()


def test_a_url_is_left_to_optuna(tmp_path: Path) -> None:
    store = backend(f"sqlite:///{tmp_path}/study.db")
    optuna.create_study(storage=store)
    assert (tmp_path / "study.db").exists()


def test_nothing_means_memory() -> None:
    assert isinstance(backend(None), InMemoryStorage)


def test_a_storage_of_optuna_s_is_taken_as_it_is(tmp_path: Path) -> None:
    store = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    assert backend(store) is store


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
