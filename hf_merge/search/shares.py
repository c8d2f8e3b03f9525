"""Weights of which only the proportions matter."""

import math
from collections.abc import Sequence

DIGITS = 9
"""Digits after the point that a recipe's numbers keep, so that equal merges have equal recipes."""


def shares(weights: Sequence[float]) -> list[float]:
    """`weights` divided by the sum of their magnitudes, if that is not 0 or 1 already: rounded and never divided twice, so
    that proportional weights have one recipe."""
    size = size_of(weights) or 1.0
    return [rounded(w / size) for w in weights]


def within(weights: Sequence[float], low: float, high: float) -> list[float]:
    """Weights between `low` and `high` that have the `shares` of `weights`; near to that if there are none."""
    found = shares(weights)
    if all(low <= w <= high for w in found):
        return found
    # Rounded shares need not add up to 1: what is missing must not move a digit when they are divided by their sum again.
    missing = (1 - sum(abs(w) for w in found)) / sum(w != 0 for w in found) if any(found) else 0.0
    found = [math.copysign(abs(w) + missing, w) if w else w for w in found]
    ends = ((w, high if w > 0 else low) for w in found)
    factor = min((end / w for w, end in ends if end * w > 0), default=1.0)
    return [min(max(w * factor, low), high) for w in found]


def rounded(number: float, digits: int = DIGITS) -> float:
    """`number` with so many digits after the point, and 0 without a sign."""
    return round(number, digits) + 0.0


def size_of(weights: Sequence[float]) -> float:
    """The sum of the weights' magnitudes; 1 where rounding alone keeps it from that."""
    size = sum(abs(w) for w in weights)
    return 1.0 if is_one(size) else size


def is_one(total: float) -> bool:
    """Whether a sum of a recipe's rounded numbers is 1."""
    return math.isclose(total, 1, abs_tol=100 * 10**-DIGITS)
