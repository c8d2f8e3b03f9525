"""The notes of unfinished pushes: found again by the same push alone, never an obstacle, never a secret."""

import os
import time
from pathlib import Path

import pytest

from hf_merge.errors import PublishError
from hf_merge.publishing.resume import FORGOTTEN, PushState, UploadedShard

SHARD = UploadedShard(name="model-00001-of-00002.safetensors", size=12, sha256="ab" * 32, sample=b"\0\1first bytes")


@pytest.fixture
def state(tmp_path: Path) -> PushState:
    """Notes of one shard."""
    state = PushState(tmp_path / "pushes", "demo/merge", "a recipe")
    state.note(SHARD)
    return state


def test_an_upload_is_remembered_by_the_same_push(state: PushState) -> None:
    assert PushState(state.root, "demo/merge", "a recipe").noted(SHARD.name) == SHARD


@pytest.mark.parametrize("what", [("demo/other", "a recipe"), ("demo/merge", "another"), ("demo/mergea recipe",), ()])
def test_another_push_knows_nothing_of_it(what: tuple[str, ...], state: PushState) -> None:
    assert PushState(state.root, *what).noted(SHARD.name) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"size": 12}', '{"size": 12, "sha256": "xy", "sample": ""}'])
def test_damaged_notes_are_no_notes(damage: str, state: PushState) -> None:
    (state.folder / f"{SHARD.name}.json").write_text(damage)
    assert state.noted(SHARD.name) is None


def test_nothing_is_left_of_what_is_removed(state: PushState) -> None:
    state.remove()
    assert list(state.root.iterdir()) == []
    state.remove()


def test_a_killed_run_s_shards_are_removed_by_the_next_and_the_notes_are_kept(state: PushState) -> None:
    leftover = state.folder / "scratch-0-killed" / ".model.safetensors.part"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with state.scratch() as folder:
        assert not leftover.parent.exists()
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    assert state.noted(SHARD.name) == SHARD


def test_processes_have_folders_of_their_own(state: PushState) -> None:
    with state.scratch(0) as first, state.scratch(1) as second:
        assert first != second
        assert first.is_dir()


def test_the_same_push_twice_at_once_is_refused(state: PushState) -> None:
    with state.scratch(), pytest.raises(PublishError, match="by another process of this machine"), state.scratch():
        pass


@pytest.mark.parametrize(("age", "kept"), [(FORGOTTEN - 60, True), (FORGOTTEN + 60, False)])
def test_pushes_that_nobody_takes_up_are_cleared_away_in_time(age: float, kept: bool, state: PushState) -> None:
    then = time.time() - age
    os.utime(state.folder, (then, then))
    with PushState(state.root, "another").scratch():
        assert state.folder.exists() == kept
