"""The margins behind a trial's scores, kept with the trial, for samplers that learn from more than its values.

They are by how much right answers lead (`Score.margins`), so only objectives whose answer is one of several have them. Any
storage keeps them, so a search that is resumed and workers on other machines learn from them as well.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from hf_merge.pareto import Floats
from hf_merge.scores import Score

LEADS = "hf_merge:leads"
"""The system attribute of a trial that holds them: for each objective a text, or None."""

ROWS = 1024
"""Rows of an objective that are kept, evenly spread over all: some 3 kB. A model of the others' share hardly needs more."""

_KIND = np.dtype("<f2")


def leads(scores: Iterable[Score]) -> list[str | None]:
    """What is kept of scores; for one that a race stopped, what is expected of all rows."""
    return [_written(score.margins if score.rows is None else score.expected) for score in scores]


def leads_of(trials: Sequence[FrozenTrial], objective: int) -> Floats | None:
    """The margins `(trials, rows)` behind an objective's values; None if a trial has none, or other rows."""
    texts = [trial.system_attrs[LEADS][objective] if LEADS in trial.system_attrs else None for trial in trials]
    found = [np.frombuffer(base64.b85decode(text), _KIND) for text in texts if text is not None]
    if not found or len(found) < len(texts) or len({len(row) for row in found}) > 1:
        return None
    return np.array(found, dtype=np.float64)


def _written(margins: NDArray[np.floating[Any]] | None) -> str | None:
    if margins is None:
        return None
    if len(margins) > ROWS:
        margins = margins[np.linspace(0, len(margins) - 1, ROWS).round().astype(int)]
    most = float(np.finfo(_KIND).max)
    return base64.b85encode(np.clip(margins, -most, most).astype(_KIND).tobytes()).decode()
