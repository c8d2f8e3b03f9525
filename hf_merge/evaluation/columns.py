"""Columns of a dataset, by what they should hold."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from PIL.Image import Image

from hf_merge.errors import EvaluationError, unknown

Column = tuple[Any, ...]


def identity(value: Any) -> str:
    """What makes two input values the same: a text's words, an image's pixels."""
    if isinstance(value, Image):
        return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, str):
        return " ".join(value.split())
    return "\x1e".join(map(identity, value))


def texts(data: Dataset, column: str, label: str) -> Column:
    """Texts."""
    values = data[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise _expected("a text", value, column, label, row)
    return tuple(values)


def words(data: Dataset, column: str, label: str) -> Column:
    """Lists of words, as tuples."""
    values = data[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(word, str) for word in value):
            raise _expected("a list of words", value, column, label, row)
    return tuple(map(tuple, values))


def images(data: Dataset, column: str, label: str) -> Column:
    """Images, as PIL has them."""
    values = data[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, Image):
            raise _expected("an image (a column with the feature `datasets.Image`)", value, column, label, row)
    return tuple(values)


def classes(data: Dataset, column: str, label: str) -> tuple[Column, tuple[str, ...] | None]:
    """Classes as they are, and the names behind their numbers."""
    return tuple(data[column][:]), _names(data.features[column])


def tags(data: Dataset, column: str, label: str) -> tuple[Column, tuple[str, ...] | None]:
    """Lists of tags, by name or number, as tuples, and the names behind numbers."""
    values = data[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _expected("a list of tags", value, column, label, row)
    return tuple(map(tuple, values)), _names(getattr(data.features[column], "feature", None))


def numbers(data: Dataset, column: str, label: str) -> tuple[Column, None]:
    """Finite numbers."""
    values = data[column][:]
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise _expected("a finite number", value, column, label, row)
    return tuple(map(float, values)), None


def documents(data: Dataset, column: str, label: str) -> tuple[Column, None]:
    """One or more names of documents, as tuples of texts."""
    values = []
    for row, value in enumerate(data[column][:]):
        several = list(value) if isinstance(value, list | tuple) else [value]
        if not several or not all(isinstance(each, str | int) for each in several):
            raise _expected("the name of a document, or a list of them", value, column, label, row)
        values.append(tuple(str(each) for each in several))
    return tuple(values), None


def read_choices(data: Dataset, column: str, target: str, label: str) -> tuple[Column, Column]:
    """Each row's choices as a tuple of texts, and the position of the right one among them.

    Choices are a list of texts, or a list of `text` and one of `label` (as ARC has them). The right one is told by its
    position (a number, also as a text, or a letter: "A" is the first), by its label, or by its text.
    """
    choices, labels = [], []
    for row, value in enumerate(data[column][:]):
        labelled = isinstance(value, Mapping) and {"text", "label"} <= value.keys()
        found = value["text"] if labelled else value
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(each, str) and each.strip() for each in found):
            raise _expected("at least two texts, none of them empty", value, column, label, row)
        choices.append(tuple(each.strip() for each in found))
        labels.append(list(value["label"]) if labelled else None)
    targets = data[target][:]
    readings = [_readings(*each) for each in zip(targets, choices, labels, strict=True)]
    # One way to read them has to fit every row: "1" may be a position or a text.
    common = set[str]().union(*readings).intersection(*readings)
    found_by = {tuple(reading[way] for reading in readings) for way in common}
    if len(found_by) != 1:
        bad = next((i for i, reading in enumerate(readings) if not reading), 0)
        why = "can be read in several ways" if common else "is not the position, the label or the text of a choice"
        raise EvaluationError(
            f"Column {target!r} of {label} {why}: row {bad} has {targets[bad]!r} for {', '.join(choices[bad])!r:.200}."
        )
    return tuple(choices), found_by.pop()


def programs(data: Dataset, template: str, label: str) -> Column:
    """The template over each row's columns, lists of texts a line each, with `{completion}` left where it stands."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name not in (None, "completion")]
    if missing := [name for name in names if name not in data.column_names]:
        raise EvaluationError(unknown(f"column of {label} in the program", missing[0], data.column_names))
    filled = []
    for row, values in enumerate(data.select_columns(list(dict.fromkeys(names)))):
        parts = {name: "\n".join(value) if isinstance(value, list) else value for name, value in values.items()}
        for name, value in parts.items():
            if not isinstance(value, str):
                raise _expected("a text or a list of texts", value, name, label, row)
        filled.append(template.format(**parts, completion="{completion}"))
    return tuple(filled)


def same_lengths(inputs: Column, targets: Column, label: str) -> None:
    """Raises `EvaluationError` unless each row has one tag for each word."""
    for row, (given, wanted) in enumerate(zip(inputs, targets, strict=True)):
        if len(given) != len(wanted):
            raise EvaluationError(f"Row {row} of {label} has {len(given)} words and {len(wanted)} tags.")


INPUTS: Mapping[str, Callable[[Dataset, str, str], Column]] = {"text": texts, "words": words, "image": images}
TARGETS: Mapping[str, Callable[[Dataset, str, str], tuple[Column, tuple[str, ...] | None]]] = {
    "class": classes,
    "tags": tags,
    "text": lambda data, column, label: (texts(data, column, label), None),
    "number": numbers,
    "documents": documents,
}
"""Readers of input and of target columns by what they hold; a target's reader also gives the names behind its numbers."""


def _readings(target: Any, choices: Sequence[str], labels: Sequence[str] | None) -> dict[str, int]:
    """The positions that a target may stand for, by the way to read it."""
    if isinstance(target, int) and not isinstance(target, bool):
        return {"position": target} if 0 <= target < len(choices) else {}
    if not isinstance(target, str):
        return {}
    text, found = target.strip(), {}
    if labels is not None and text in labels:
        return {"label": labels.index(text)}
    if text in choices:
        found["text"] = choices.index(text)
    if text.isdecimal() and int(text) < len(choices):
        found["position"] = int(text)
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(choices):
        found["letter"] = ord(text.upper()) - ord("A")
    return found


def _names(feature: Any) -> tuple[str, ...] | None:
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _expected(what: str, value: Any, column: str, label: str, row: int) -> EvaluationError:
    found = "nothing" if value is None else f"{type(value).__name__} {value!r:.200}"
    return EvaluationError(f"Column {column!r} of {label} holds {found} in row {row}, expected {what}.")
