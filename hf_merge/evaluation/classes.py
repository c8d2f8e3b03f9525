"""Right answers of classification tasks as positions among labels."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.rows import Rows


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
