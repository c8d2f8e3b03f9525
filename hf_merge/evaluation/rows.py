"""An objective's rows: loaded, checked, and dealt out to the search and to what no search sees."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.columns import INPUTS, TARGETS, identity, programs, read_choices, same_lengths
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.tasks import TASKS

SEARCH, HELD_OUT = "search", "held_out"
SPLITS = (SEARCH, HELD_OUT)
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one split in the dataset's order.

    `inputs` holds the values of each input column (texts, tuples of words, images) or the rendered prompts, and behind them
    the choices, if there are any, as tuples of texts. `targets` holds the target column (None for tasks without one);
    `class_names` the names behind its numbers, if it is a `ClassLabel`; `corpus` the documents among which queries look for
    theirs, by name. `label` says where the rows are from.
    """

    label: str
    inputs: tuple[tuple[Any, ...], ...]
    targets: tuple[Any, ...] | None
    class_names: tuple[str, ...] | None = None
    corpus: Mapping[str, str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def identities(self) -> list[str]:
        """Each row's input with whitespace normalized: rows with equal identities count as the same row."""
        return ["\x1f".join(identity(value) for value in row) for row in zip(*self.inputs, strict=True)]

    def take(self, chosen: Iterable[int], label: str | None = None) -> "Rows":
        """The rows at these positions, in this order."""
        at = list(chosen)
        return replace(
            self,
            label=label or self.label,
            inputs=tuple(tuple(texts[i] for i in at) for texts in self.inputs),
            targets=None if self.targets is None else tuple(self.targets[i] for i in at),
        )


def load_rows(objective: Objective) -> dict[str, Rows]:
    """The rows of an objective by "search" and "held_out".

    Rows of tasks without a target that hold no text, as raw corpora have them between paragraphs, are left out.

    Raises:
        EvaluationError: the dataset cannot be loaded, a split or column does not exist, a value is missing or of the wrong
            type, a split is empty, or an input stands in both splits (whitespace aside).
    """
    search, held_out = _choose(objective, _open(objective.dataset, objective))
    rows = _read(objective, *search)
    aside = held_out if isinstance(held_out, float) else _read(objective, *held_out)
    return deal(rows, aside, objective.limit)


def deal(search: Rows, held_out: Rows | float, limit: int | None = None) -> dict[str, Rows]:
    """Rows by "search" and "held_out", at most `limit` of each. A share as `held_out` is set aside from `search`.

    Raises:
        EvaluationError: a split is empty, or an input stands in both.
    """
    rows = _divide(search, held_out) if isinstance(held_out, float) else {SEARCH: search, HELD_OUT: held_out}
    if limit is not None:
        rows = {split: _limit(part, limit) for split, part in rows.items()}
    for part in rows.values():
        if not len(part):
            raise EvaluationError(f"{part.label} has no rows. Give a split with rows, or another share as `held_out`.")
    _refuse_overlap(rows[SEARCH], rows[HELD_OUT])
    return rows


def _open(source: Any, objective: Objective) -> Dataset | DatasetDict:
    if isinstance(source, Dataset | DatasetDict):
        return source
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise EvaluationError(f"{path} is not a data file that can be read. Known suffixes: {', '.join(_FORMATS)}.")
        return _loaded(source, lambda: _load_files({"train": [path]}))
    if path.is_dir():
        return _loaded(source, lambda: _open_folder(path))
    if isinstance(source, Path) or str(source).startswith(("/", "./", "../", "~")) or path.suffix in _FORMATS:
        raise EvaluationError(f"The dataset {str(source)!r} does not exist on this machine.")
    return _loaded(source, lambda: load_dataset(str(source), objective.config, revision=objective.revision))


def _loaded(source: object, load: Callable[[], Any]) -> Dataset | DatasetDict:
    # datasets raises whatever its builders, pyarrow, fsspec or the Hub client raise.
    try:
        return load()
    except Exception as error:
        raise EvaluationError(f"The dataset {str(source)!r} could not be loaded: {type(error).__name__}: {error}") from error


def _open_folder(folder: Path) -> Dataset | DatasetDict:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return load_from_disk(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in _FORMATS)
    if (folder / "README.md").exists() or not files:
        return load_dataset(str(folder))
    # `load_dataset` would know only train, validation and test by their file names, and pass over the rest.
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_SHARD.sub("", file.stem).replace("-", "_"), []).append(file)
    return _load_files(splits)


def _load_files(splits: dict[str, list[Path]]) -> DatasetDict:
    suffixes = {file.suffix for files in splits.values() for file in files}
    if len({_FORMATS[suffix] for suffix in suffixes}) > 1:
        raise ValueError(f"the folder mixes {', '.join(sorted(suffixes))} files")
    options = {"sep": "\t"} if ".tsv" in suffixes else {}
    files = {name: [str(file) for file in files] for name, files in splits.items()}
    return load_dataset(_FORMATS[suffixes.pop()], data_files=files, **options)


def _choose(objective: Objective, data: Dataset | DatasetDict) -> tuple[tuple[Dataset, str], tuple[Dataset, str] | float]:
    """The data of the search split and of the held-out one, each with its label; for a share, the share."""
    held_out = objective.held_out
    if isinstance(data, Dataset):
        name, search = objective.dataset_label, data
        held_out = 0.5 if held_out is None else held_out
    else:
        name = objective.split or next((n for n in (SEARCH, "validation", "train") if n in data), "")
        if name not in data:
            given = objective.split or f"{SEARCH}, validation or train"
            raise EvaluationError(unknown(f"split of {objective.dataset_label}", given, data))
        search = data[name]
        if held_out is None:
            held_out = next((n for n in (HELD_OUT, "test") if n in data and n != name), 0.5)
        if isinstance(held_out, str):
            if held_out not in data:
                raise EvaluationError(unknown(f"split of {objective.dataset_label}", held_out, data))
            if held_out == name:
                raise EvaluationError(
                    f"The search takes the split {name!r}, and so does `held_out`. Give another split, or a share in (0, 1)."
                )
            return (search, name), (data[held_out], held_out)
    if isinstance(held_out, Dataset):
        return (search, name), (held_out, held_out.info.dataset_name or "a dataset in memory")
    assert isinstance(held_out, float)
    return (search, name), held_out


def _read(objective: Objective, data: Dataset, label: str) -> Rows:
    task = TASKS[objective.task]
    columns = [*objective.inputs, *objective.prompt_columns]
    columns += [objective.choices] if task.target == "choice" else []
    columns += [objective.target] if task.target is not None else []
    for column in columns:
        if column not in data.column_names:
            raise EvaluationError(unknown(f"column of {label}", column, data.column_names))
    if objective.prompt is None:
        inputs = [INPUTS[task.input](data, column, label) for column in objective.inputs]
    else:
        chosen = data.select_columns(list(dict.fromkeys(objective.prompt_columns)))
        inputs = [tuple(objective.prompt.format(**row) for row in chosen)]
    if task.target is None:
        return Rows(label=label, inputs=(tuple(text for text in inputs[0] if text.strip()),), targets=None)
    if task.target == "choice":
        choices, targets = read_choices(data, objective.choices, objective.target, label)
        return Rows(label=label, inputs=(*inputs, choices), targets=targets)
    if task.target == "program":
        whole = f"{{{objective.inputs[0]}}}{{completion}}\n{{{objective.target}}}\n"
        template = str(objective.task_arguments.get("program") or whole)
        return Rows(label=label, inputs=tuple(inputs), targets=programs(data, template, label))
    targets, class_names = TARGETS[task.target](data, objective.target, label)
    rows = Rows(label=label, inputs=tuple(inputs), targets=targets, class_names=class_names)
    if task.target == "tags":
        same_lengths(inputs[0], targets, label)
    return rows if objective.corpus is None else replace(rows, corpus=_corpus(objective, rows))


def _corpus(objective: Objective, rows: Rows) -> dict[str, str]:
    """The documents of a retrieval by their names. Raises `EvaluationError` unless they hold all that are relevant."""
    data = _open(objective.corpus, replace(objective, config=None, revision=None))
    if isinstance(data, DatasetDict):
        name = next((n for n in ("corpus", "train") if n in data), "")
        if name not in data:
            raise EvaluationError(unknown("split of the corpus", "corpus or train", data))
        data = data[name]
    names = next((column for column in ("id", "_id") if column in data.column_names), "id")
    for column in (names, "text"):
        if column not in data.column_names:
            raise EvaluationError(unknown("column of the corpus", column, data.column_names))
    corpus = dict(zip(map(str, data[names][:]), INPUTS["text"](data, "text", "the corpus"), strict=True))
    missing = [document for found in rows.targets or () for document in found if document not in corpus]
    if missing:
        raise EvaluationError(
            f"{rows.label}: {len(missing)} relevant documents are not in the corpus, for example {missing[0]!r:.100}."
        )
    return corpus


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _divide(rows: Rows, share: float) -> dict[str, Rows]:
    """Held-out rows set aside by their input's hash: equal inputs land on one side, whatever else the dataset holds."""
    aside = np.array([_hash(f"held_out {text}") < share for text in rows.identities()], dtype=bool)
    return {
        SEARCH: rows.take(np.flatnonzero(~aside), f"{1 - share:.0%} of {rows.label}"),
        HELD_OUT: rows.take(np.flatnonzero(aside), f"the other {share:.0%} of {rows.label}"),
    }


def _limit(rows: Rows, most: int) -> Rows:
    if len(rows) <= most:
        return rows
    order = np.argsort([_hash(f"limit {text}") for text in rows.identities()], kind="stable")
    return rows.take(np.sort(order[:most]))


def _refuse_overlap(search: Rows, held_out: Rows) -> None:
    common = set(search.identities()) & set(held_out.identities())
    if common:
        example = min(common).replace("\x1f", " | ")
        raise EvaluationError(
            f"{len(common)} inputs stand both in the search rows ({search.label}) and in the held-out rows ({held_out.label}), "
            f"for example {example[:200]!r}. A held-out score would flatter the search: remove them from one of the two, or "
            "set a share of one split aside with `held_out=0.5`, which keeps equal inputs together."
        )
