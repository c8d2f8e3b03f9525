"""Whether the values in a recipe are ones that its method takes."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_merge.errors import unknown
from hf_merge.methods.method import Method
from hf_merge.recipes.value import Value, numbers

UNIT_INTERVAL = frozenset({"density", "t"})


def wrong_number(method: Method, models: int) -> Iterable[str]:
    """What is wrong with merging so many models."""
    least, most = method.models
    if not least <= models <= (most or models):
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        yield f"{method.name} merges {wanted} model{'s' if wanted != 'exactly 1' else ''}, got {models}."


def wrong_parameters(method: Method, given: Mapping[str, Value], where: str, per_model: bool) -> Iterable[str]:
    """What is wrong with the values that are given for a method in one place of a recipe (`where`)."""
    for name, value in given.items():
        parameter = method.parameters.get(name)
        if parameter is None:
            yield f"In {where}: {unknown(f'parameter of {method.name}', name, method.parameters)}"
        elif per_model and not parameter.per_model:
            yield f"In {where}: {name!r} is one number for the whole merge; move it to the recipe's parameters."
        elif value == ():
            yield f"In {where}: {name!r} is an empty list."
        else:
            unit = name in UNIT_INTERVAL and name not in method.free
            wrong = (_wrong_value(name, n, isinstance(parameter.default, bool), unit) for n in numbers(value))
            yield from (f"In {where}: {problem}" for problem in dict.fromkeys(wrong) if problem)


def _wrong_value(name: str, value: Any, truth: bool, unit: bool) -> str | None:
    if truth:
        return None if isinstance(value, bool) else f"{name!r} is true or false, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"{name!r} is a finite number, got {value!r}."
    return f"{name!r} lies between 0 and 1, got {value!r}." if unit and not 0 <= value <= 1 else None
