import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_merge.demo.data import PackageFile, Row
from hf_merge.demo.specialists import Data, Family, FamilyFolder, Task, build_family
from hf_merge.errors import HfMergeError

ROWS = [Row(f"{'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10]}", "letters:x") for i in range(100)]
SEED_FILE = "drawn.txt"


def load_rows() -> list[Row]:
    return ROWS


def stripped(text: str) -> str:
    return text.strip()


def build_base(family: Family, data: Data, folder: Path, progress: bool) -> None:
    (folder / SEED_FILE).write_text(str(torch.rand(3).tolist()))


def train(family: Family, task: Task, data: Data, base: Path, folder: Path, progress: bool) -> None:
    (folder / SEED_FILE).write_text(f"{(base / SEED_FILE).read_text()} {torch.rand(3).tolist()}")


def interrupted(family: Family, task: Task, data: Data, base: Path, folder: Path, progress: bool) -> None:
    (folder / SEED_FILE).write_text("half")
    raise KeyboardInterrupt


LETTERS = Family(
    name="letters",
    base="letters-base",
    tasks=(Task(name="letters", model="letters-x", labels=("letters:x",), load_rows=load_rows),),
    build_base=build_base,
    train=train,
)


def written(folder: Path) -> list[str]:
    """What a user of the cache sees; the locks are hidden."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_built_family_has_its_base_models_and_data_where_it_says(tmp_path: Path) -> None:
    folder = build_family(LETTERS, tmp_path, progress=False)
    assert (folder.base / SEED_FILE).is_file()
    assert [path.name for path in folder.models.values()] == ["letters-x"]
    assert (folder.models["letters"] / SEED_FILE).is_file()
    assert all(path.is_file() for path in folder.data["letters"].values())


def test_the_data_of_a_family_can_be_read_as_datasets(tmp_path: Path) -> None:
    folder = build_family(LETTERS, tmp_path, progress=False)
    texts = [text for name in ("train", "search", "held_out") for text in folder.dataset("letters", name)["text"]]
    assert sorted(texts) == sorted(row.text for row in ROWS)


@pytest.mark.parametrize(("task", "split"), [("lettres", "train"), ("letters", "heldout")])
def test_an_unknown_task_or_split_gets_a_suggestion(tmp_path: Path, task: str, split: str) -> None:
    folder = build_family(LETTERS, tmp_path, progress=False)
    with pytest.raises(HfMergeError, match="Did you mean"):
        folder.dataset(task, split)


def test_a_second_build_leaves_the_files_untouched(tmp_path: Path) -> None:
    before = files(build_family(LETTERS, tmp_path, progress=False).path)
    assert files(build_family(LETTERS, tmp_path, progress=False).path) == before


def test_a_built_family_is_found_without_the_packages_it_was_built_from(tmp_path: Path) -> None:
    gone = PackageFile(requirement="gone==1", package="gone_by_now", path="x", sha256="0" * 64)
    family = replace(LETTERS, files=(gone,))
    assert build_family(family, tmp_path, progress=False) == build_family(family, tmp_path, progress=False)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_family(replace(LETTERS, train=interrupted), tmp_path, progress=False)
    assert written(tmp_path) == []


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path) -> None:
    left = tmp_path / f".letters-{LETTERS.digest}.partial" / "letters-base"
    left.mkdir(parents=True)
    (left / "half").touch()
    folder = build_family(LETTERS, tmp_path, progress=False)
    assert written(tmp_path) == [folder.path.name]
    assert not (folder.base / "half").exists()


def test_two_that_want_the_same_family_build_it_once(tmp_path: Path) -> None:
    builders = []

    def slow_base(family: Family, data: Data, folder: Path, progress: bool) -> None:
        builders.append(threading.get_ident())
        time.sleep(0.3)

    family = replace(LETTERS, build_base=slow_base, tasks=())

    def build(_: int) -> FamilyFolder:
        return build_family(family, tmp_path, progress=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert first == second
    assert len(builders) == 1


def test_a_build_does_not_depend_on_the_state_of_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = build_family(LETTERS, tmp_path / "first", progress=False)
    torch.manual_seed(2)
    second = build_family(LETTERS, tmp_path / "second", progress=False)
    assert (first.models["letters"] / SEED_FILE).read_text() == (second.models["letters"] / SEED_FILE).read_text()


def test_a_build_leaves_the_global_generator_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    build_family(LETTERS, tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_build_leaves_the_number_of_threads_as_it_was(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build_family(LETTERS, tmp_path, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change",
    [
        lambda family: replace(family, seed=1),
        lambda family: replace(family, sizes={"train": 1, "search": 1, "held_out": 1}),
        lambda family: replace(family, files=(PackageFile(requirement="a==1", package="a", path="a", sha256="1" * 64),)),
        lambda family: replace(family, train=interrupted),
        lambda family: replace(family, tasks=(replace(family.tasks[0], labels=("letters:y",)),)),
        lambda family: replace(family, tasks=(replace(family.tasks[0], key=stripped),)),
    ],
    ids=["seed", "sizes", "file", "function", "labels", "key"],
)
def test_the_digest_follows_what_decides_the_bytes(change: Callable[[Family], Family]) -> None:
    assert change(LETTERS).digest != LETTERS.digest


def test_the_digest_follows_the_source_of_the_builder(tmp_path: Path) -> None:
    source = tmp_path / "builder.py"
    source.write_text("def build_base(family, data, folder, progress): ...\n")
    spec = importlib.util.spec_from_file_location("builder", source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    family = replace(LETTERS, build_base=module.build_base)
    before = family.digest
    source.write_text("def build_base(family, data, folder, progress): return 1\n")
    assert family.digest != before


def test_without_an_argument_the_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MERGE_CACHE", str(tmp_path / "mine"))
    assert build_family(LETTERS, progress=False).path.parent == tmp_path / "mine" / "demo"


def test_without_argument_and_environment_the_cache_is_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_MERGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_family(LETTERS, progress=False).path.parent == tmp_path / ".cache" / "hf_merge" / "demo"


def test_the_bars_say_what_is_being_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_family(LETTERS, tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "letters: reading and splitting the data" in shown
    assert "letters: making the base" in shown
    assert "letters: fine-tuning for letters" in shown
