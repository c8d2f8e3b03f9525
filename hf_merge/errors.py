"""The exceptions of hf_merge. Each message says what was given, what was expected and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class HfMergeError(Exception):
    """Root of every error that hf_merge raises on purpose."""


class RecipeError(HfMergeError, ValueError):
    """A recipe, a space or an argument does not make sense."""


class CheckpointError(HfMergeError):
    """A checkpoint cannot be found or read, or is not what its headers say."""


class MergeError(HfMergeError):
    """Models do not fit each other, or a tensor cannot be merged."""


class EvaluationError(HfMergeError):
    """An objective cannot be measured."""


class PublishError(HfMergeError):
    """A repository cannot be written."""


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist: `kind` in words, the close matches, and all that is known."""
    names = sorted(known)
    close = get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {given!r}.{hint} Known: {', '.join(names) or 'none'}."
