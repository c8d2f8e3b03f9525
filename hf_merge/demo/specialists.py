"""A family of demo models, one base and a fine-tune of it for each task, built once and kept in a cache.

A family says what its models are (`Family`, `Task`); `build_family` says when, where and how safely they are built.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm

from hf_merge.demo.data import SPLITS, PackageFile, Row, normalized, read_parquet, split, write_parquet
from hf_merge.errors import HfMergeError, unknown
from hf_merge.merging.architecture import without_bars

Data = Mapping[str, Mapping[str, list[Row]]]
"""The rows of a family: task name -> split name -> rows."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one member of a family is good at.

    Args:
        name: of the task, for example "sentiment".
        model: folder and repository name of the fine-tune for it.
        labels: the answers to choose from; empty where the answer is free text.
        load_rows: gives all rows, in any order, with duplicates.
        files: what `load_rows` reads; their pinned content goes into the digest, not the files on disk.
        about: one or two sentences for the model card: what the task is and where its data come from.
        key: texts with the same key count as one text, and never stand in two splits.
    """

    name: str
    model: str
    labels: tuple[str, ...] = ()
    load_rows: Callable[[], list[Row]]
    files: tuple[PackageFile, ...] = ()
    about: str = ""
    key: Callable[[str], str] = normalized


@dataclass(frozen=True, kw_only=True)
class Family:
    """A base model and how it and its fine-tunes are made.

    Args:
        name: of the family; its folder in the cache starts with it.
        base: folder and repository name of the base.
        tasks: one fine-tune each.
        build_base: `(family, data, folder, progress)` writes the base's repository files into an empty folder.
        train: `(family, task, data, base folder, folder, progress)` writes the fine-tune's. Both run on one thread with
            the global generator of torch seeded, so the same family has the same bytes on one machine.
        files: what `build_base` reads.
        namespace: before the repository names.
        seed: of the splits' order, of all fresh weights and of the training.
        sizes: the most rows of each split.
    """

    name: str
    base: str
    tasks: tuple[Task, ...]
    build_base: Callable[["Family", Data, Path, bool], None]
    train: Callable[["Family", Task, Data, Path, Path, bool], None]
    files: tuple[PackageFile, ...] = ()
    namespace: str = "demo"
    seed: int = 0
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 6000, "search": 1000, "held_out": 1000})

    def repo_id(self, model: str) -> str:
        """The repository that a model folder of this family stands for, for example "demo/bert-tiny-spam"."""
        return f"{self.namespace}/{model}"

    @property
    def digest(self) -> str:
        """16 hex digits over everything that decides the bytes: source code, pinned files, settings, library versions."""
        functions: list[Callable[..., object]] = [build_family, split, self.build_base, self.train]
        for task in self.tasks:
            functions += [task.load_rows, task.key]
        sources = sorted({Path(inspect.getfile(function)) for function in functions})
        facts = {
            "code": [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
            "files": [file.sha256 for files in (self.files, *(task.files for task in self.tasks)) for file in files],
            "family": [self.name, self.base, self.namespace, self.seed, dict(self.sizes)],
            "functions": [function.__qualname__ for function in functions],
            "tasks": [[task.name, task.model, task.labels, task.about] for task in self.tasks],
            "versions": [module.__version__ for module in (torch, transformers, tokenizers, safetensors)],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class FamilyFolder:
    """A built family on disk: model repositories, and the rows that they were trained and are to be judged on."""

    family: Family
    path: Path

    @property
    def base(self) -> Path:
        """The folder of the base."""
        return self.path / self.family.base

    @property
    def models(self) -> dict[str, Path]:
        """Task name -> the folder of its fine-tune."""
        return {task.name: self.path / task.model for task in self.family.tasks}

    @property
    def data(self) -> dict[str, dict[str, Path]]:
        """Task name -> split ("train", "search", "held_out") -> parquet file with the string columns text and label."""
        return {
            task.name: {name: self.path / "data" / task.name / f"{name}.parquet" for name in SPLITS}
            for task in self.family.tasks
        }

    def dataset(self, task: str, split: str) -> Dataset:
        """The rows of one split, in memory, with the string columns text and label.

        Raises:
            HfMergeError: there is no such task or split.
        """
        if task not in self.data:
            raise HfMergeError(unknown("task", task, self.data))
        if split not in SPLITS:
            raise HfMergeError(unknown("split", split, SPLITS))
        rows = read_parquet(self.data[task][split])
        return Dataset.from_dict({"text": [row.text for row in rows], "label": [row.label for row in rows]})


def build_family(family: Family, cache_dir: str | Path | None = None, progress: bool = True) -> FamilyFolder:
    """The family's folder, built now unless this very family was built before.

    It is built beside its final place and renamed when complete; processes that want the same one wait for each other.

    Args:
        family: what to build.
        cache_dir: where built families are kept; None takes the folder demo in $HF_MERGE_CACHE, or in ~/.cache/hf_merge.
        progress: show bars that say what is being done.

    Raises:
        HfMergeError: a package that the family reads from is missing or not the pinned one.
    """
    root = Path(cache_dir) if cache_dir is not None else _default_cache()
    name = f"{family.name}-{family.digest}"
    final = root / name
    if not final.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not final.is_dir():
                _build(family, root / f".{name}.partial", final, progress)
    return FamilyFolder(family=family, path=final)


def _default_cache() -> Path:
    return Path(os.environ.get("HF_MERGE_CACHE") or "~/.cache/hf_merge").expanduser() / "demo"


def _build(family: Family, partial: Path, final: Path, progress: bool) -> None:
    # A killed build could not clean up after itself; the lock says that nobody is at work in there.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    folder = FamilyFolder(family=family, path=partial)
    steps = tqdm(total=len(family.tasks) + 2, disable=not progress, unit="step")
    try:
        steps.set_description(f"{family.name}: reading and splitting the data")
        data = {task.name: split(task.load_rows(), seed=family.seed, sizes=family.sizes, key=task.key) for task in family.tasks}
        for name, parts in data.items():
            for part, rows in parts.items():
                write_parquet(rows, folder.data[name][part])
        steps.update()
        steps.set_description(f"{family.name}: making the base")
        folder.base.mkdir()
        with _reproducible(family.seed), without_bars():
            family.build_base(family, data, folder.base, progress)
        steps.update()
        for task in family.tasks:
            steps.set_description(f"{family.name}: fine-tuning for {task.name}")
            folder.models[task.name].mkdir()
            with _reproducible(family.seed), without_bars():
                family.train(family, task, data, folder.base, folder.models[task.name], progress)
            steps.update()
        steps.set_description(f"{family.name}: built")
        partial.rename(final)
    finally:
        steps.close()
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread, whose sums have one order, and a seeded global generator; both are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
