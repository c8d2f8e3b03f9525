"""An objective's rows: loaded, checked, and dealt out to the search and to what no search sees."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from numpy.typing import NDArray

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.objective import LANGUAGE_MODELING, TEXT_GENERATION, Objective

SEARCH, HELD_OUT = "search", "held_out"
SPLITS = (SEARCH, HELD_OUT)
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one split in the dataset's order.

    `inputs` holds one list of texts for each input column, or the rendered prompts. `targets` holds the target column as it
    is (None for language modeling); `class_names` the names behind its numbers, if it is a `ClassLabel`. `label` says
    where the rows are from.
    """

    label: str
    inputs: tuple[tuple[str, ...], ...]
    targets: tuple[Any, ...] | None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def identities(self) -> list[str]:
        """Each row's input with whitespace normalized: rows with equal identities count as the same row."""
        return ["\x1f".join(" ".join(text.split()) for text in row) for row in zip(*self.inputs, strict=True)]

    def take(self, chosen: Iterable[int], label: str | None = None) -> "Rows":
        """The rows at these positions, in this order."""
        at = list(chosen)
        return Rows(
            label=label or self.label,
            inputs=tuple(tuple(texts[i] for i in at) for texts in self.inputs),
            targets=None if self.targets is None else tuple(self.targets[i] for i in at),
            class_names=self.class_names,
        )


def load_rows(objective: Objective) -> dict[str, Rows]:
    """The rows of an objective by "search" and "held_out".

    Rows for language modeling that hold no text, as raw corpora have them between paragraphs, are left out.

    Raises:
        EvaluationError: the dataset cannot be loaded, a split or column does not exist, a value is missing or of the wrong
            type, a split is empty, or an input stands in both splits (whitespace aside).
    """
    search, held_out = _choose(objective, _open(objective))
    rows = {SEARCH: _read(objective, *search)}
    if isinstance(held_out, float):
        rows = _divide(rows[SEARCH], held_out)
    else:
        rows[HELD_OUT] = _read(objective, *held_out)
    if objective.limit is not None:
        rows = {split: _limit(part, objective.limit) for split, part in rows.items()}
    for part in rows.values():
        if not len(part):
            raise EvaluationError(f"{part.label} has no rows. Give a split with rows, or another share as `held_out`.")
    _refuse_overlap(rows[SEARCH], rows[HELD_OUT])
    return rows


def _open(objective: Objective) -> Dataset | DatasetDict:
    source = objective.dataset
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
    columns = list(dict.fromkeys((*objective.inputs, *objective.prompt_columns)))
    if objective.task != LANGUAGE_MODELING:
        columns.append(objective.target)
    for column in columns:
        if column not in data.column_names:
            raise EvaluationError(unknown(f"column of {label}", column, data.column_names))
    if objective.task == LANGUAGE_MODELING:
        inputs: tuple[tuple[str, ...], ...] = (
            tuple(text for text in _texts(data, objective.inputs[0], label) if text.strip()),
        )
        return Rows(label=label, inputs=inputs, targets=None)
    if objective.prompt is None:
        inputs = tuple(tuple(_texts(data, column, label)) for column in objective.inputs)
    else:
        chosen = data.select_columns(list(dict.fromkeys(objective.prompt_columns)))
        inputs = (tuple(objective.prompt.format(**row) for row in chosen),)
    if objective.task == TEXT_GENERATION:
        return Rows(label=label, inputs=inputs, targets=tuple(_texts(data, objective.target, label)))
    feature = data.features[objective.target]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return Rows(label=label, inputs=inputs, targets=tuple(data[objective.target][:]), class_names=names)


def _texts(data: Dataset, column: str, label: str) -> Sequence[str]:
    values = data[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found = "nothing" if value is None else f"{type(value).__name__} {value!r}"
            raise EvaluationError(f"Column {column!r} of {label} holds {found} in row {row}, expected a text.")
    return values


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


def class_ids(rows: Rows, names: Sequence[str], *, positional: bool) -> NDArray[np.int64]:
    """The targets `(n,)` as positions in `names`. Names match exactly, or else without case where that is unambiguous.

    Args:
        rows: rows of a classification task.
        names: the labels among which a class is chosen.
        positional: whether the numbers of a `ClassLabel` whose names are all unknown stand for positions in `names`.

    Raises:
        EvaluationError: a target is missing or not among the names; all that are not are listed.
    """
    exact = {name: i for i, name in enumerate(names)}
    times = Counter(name.casefold() for name in names)
    folded = {name.casefold(): i for i, name in enumerate(names) if times[name.casefold()] == 1}

    def place(target: Any) -> int | None:
        if isinstance(target, str):
            return exact.get(target, folded.get(target.casefold()))
        return _index(target, len(names))

    targets: Sequence[Any] = rows.targets or ()
    classes = rows.class_names
    if classes is not None and any(place(name) is not None for name in classes):
        targets = [classes[target] if _index(target, len(classes)) is not None else target for target in targets]
    elif classes is not None and not (positional and len(classes) == len(names)):
        raise EvaluationError(
            f"The target of {rows.label} has the {len(classes)} classes {', '.join(classes)}, and none of them is among the "
            f"{len(names)} labels {', '.join(names)}. Give `labels` in the order of the dataset's classes."
        )
    found = [place(target) for target in targets]
    wrong = list(dict.fromkeys(target for target, at in zip(targets, found, strict=True) if at is None))
    if wrong:
        raise EvaluationError(_unknown_classes(rows.label, wrong, names))
    return np.array(found, dtype=np.int64)


def _index(target: Any, count: int) -> int | None:
    if isinstance(target, bool | np.bool_):
        return int(target) if count == 2 else None
    return int(target) if isinstance(target, int | np.integer) and 0 <= target < count else None


def _unknown_classes(label: str, wrong: list[object], names: Sequence[str]) -> str:
    shown = ", ".join(repr(value) for value in wrong[:10]) + (", …" if len(wrong) > 10 else "")
    if wrong == [-1]:
        hint = " A -1 marks a hidden answer: take a split that has answers, or set a share aside with `held_out=0.5`."
    elif wrong == [None]:
        hint = " Some rows have no answer: remove them."
    else:
        close = [match for value in wrong[:3] for match in get_close_matches(str(value), names, n=1)]
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
    return f"The targets of {label} hold {shown}, expected one of {', '.join(names)} or its position.{hint}"
