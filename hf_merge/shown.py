"""How objects look in a notebook."""

from typing import Any


def as_printed(value: object, printer: Any, cycle: bool) -> None:
    """A class whose `_repr_pretty_` this is shows in a notebook as it prints, and not as it is written in code."""
    printer.text(str(value))
