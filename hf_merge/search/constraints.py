"""Constraints of a search: how far an objective may fall, as a number or against a model that is tried first."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hf_merge.errors import RecipeError, unknown

BEST_PARENT = "best parent"
"""Stands for the best score that a parent has in the objective."""

ROUNDING = 1e-9
"""What a bound may be missed by: 0.9 - 0.01 is not quite 0.89."""

FORM = "'>= 0.9', '<= 3', '>= base - 0.01' or '>= best parent - 0.01'"

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_OFFSET = re.compile(rf"(?P<name>.+?)\s*(?P<sign>[+-])\s*(?P<number>{_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An objective's lowest (`sign` 1) or highest (-1) allowed value: `offset`, or that above the score of `anchor`."""

    sign: int
    offset: float
    anchor: str | None = None

    def violation(self, value: float, anchor: float | None) -> float:
        """How far `value` is beyond the bound, in the objective's unit: positive if it breaks it, else 0 or below.

        `anchor` is the anchor's score. Where it is None, for there is none yet, nothing is broken; where it is NaN, for it
        could not be scored, everything is.
        """
        if self.anchor is None:
            anchor = 0.0
        if anchor is None:
            return 0.0
        beyond = self.sign * (anchor + self.offset - value)
        return math.inf if math.isnan(beyond) else 0.0 if abs(beyond) < ROUNDING else beyond


def bounds(constraints: Mapping[str, str], objectives: Iterable[str], anchors: Iterable[str]) -> dict[str, Bound]:
    """The bounds that `constraints`, texts by objective, say. A text is `>=` or `<=`, and a number, an anchor, or an anchor
    plus or minus a number; an anchor is one of `anchors` (labels of the first trials) or "best parent".

    Raises `RecipeError` for an objective, a text or an anchor that is none.
    """
    known, allowed = list(objectives), [*anchors, BEST_PARENT]
    found = {}
    for name, text in constraints.items():
        if name not in known:
            raise RecipeError(unknown("objective in a constraint", name, known))
        found[name] = _bound(name, text, allowed)
    return found


def _bound(name: str, text: object, anchors: list[str]) -> Bound:
    wrong = RecipeError(f"A constraint is a text such as {FORM}; that of {name!r} is {text!r}.")
    if not isinstance(text, str) or text.strip()[:2] not in (">=", "<="):
        raise wrong
    sign, rest = 1 if text.strip()[0] == ">" else -1, text.strip()[2:].strip()
    if re.fullmatch(rf"[+-]?{_NUMBER}", rest):
        return Bound(sign=sign, offset=float(rest))
    if rest in anchors:  # a name may itself look like a sum
        return Bound(sign=sign, offset=0.0, anchor=rest)
    parts = _OFFSET.fullmatch(rest)
    if not rest:
        raise wrong
    anchor = parts["name"] if parts else rest
    if anchor not in anchors:
        raise RecipeError(f"{unknown(f'model in the constraint of {name!r}', anchor, anchors)} Expected is {FORM}.")
    assert parts is not None
    return Bound(sign=sign, offset=float(parts["sign"] + parts["number"]), anchor=anchor)
