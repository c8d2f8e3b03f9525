"""Which numbers of a merge method a search varies, and between which ends."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from hf_merge.errors import unknown
from hf_merge.methods import METHODS
from hf_merge.recipes.parameters import UNIT_INTERVAL

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "weight": (0.0, 1.0),
        "density": (0.05, 1.0),
        "scaling": (0.3, 1.5),
        "t": (0.0, 1.0),
        "epsilon": (0.0, 0.2),
        "gamma": (0.0, 0.05),
        "select_topk": (0.05, 1.0),
        "threshold": (0.1, 0.8),
        "ratio": (0.02, 0.3),
        "r": (0.0, 0.5),
        "alpha": (0.0, 1.0),
        "ridge": (0.003, 0.3),
        "nearswap.t": (1e-6, 1e-2),
        "ram.epsilon": (1e-6, 1e-3),
    }
)
"""The range of each number that is searched. Weights are free in [0, 1], so their sum is free as well: the best sums often
add up to more than 1."""

LOGARITHMIC = frozenset({"ridge", "nearswap.t", "ram.epsilon"})
"""Ranges over orders of magnitude, whose logarithm is drawn evenly if they start above 0."""

REFUSED: Mapping[str, str] = MappingProxyType({"passthrough": "it only puts one model's layers together, with nothing to find"})
SEARCHED = tuple(method for method in METHODS if method not in REFUSED)
"""The merge methods that a search can vary."""

SPHERICAL = ("nuslerp", "multislerp")
"""Methods whose weights are proportions on a sphere: none can be negative."""

PROPORTIONS = frozenset(
    {name for name, m in METHODS.items() if "normalize" in m.parameters and m.parameters["normalize"].default} | {*SPHERICAL}
)
"""Methods that divide by the sum of the weights unless told otherwise, so that only their proportions matter."""

_OWN = {("nearswap", "t"): "nearswap.t", ("ram", "epsilon"): "ram.epsilon", ("ramplus_tl", "epsilon"): "ram.epsilon"}
"""Numbers that mean something else than others of their name."""

_SHARES = UNIT_INTERVAL | {"gamma", "select_topk", "ratio"}


def searched(method: str, base: bool) -> dict[str, str]:
    """The range that holds for each number of a method that a search varies, with or without a base.

    Switches, counts, and numbers of a solver rather than of what it solves stay at the method's default. `scaling` is searched
    where nothing else has its effect: a sum's would only repeat the weights, and PAINT's its `t`.
    """
    found = METHODS[method]
    repeats = method == "paint" or ("weight" in found.parameters and method not in PROPORTIONS and method != "consensus")
    ranges = {name: _OWN.get((method, name), name) for name in found.parameters}
    if repeats or not found.deltas(base):
        ranges.pop("scaling", None)
    return {name: ranges[name] for name in sorted(ranges, key=[*RANGES, *ranges].index) if ranges[name] in RANGES}


def wrong_ranges(given: Mapping[str, Any], methods: Iterable[str]) -> Iterable[str]:
    """What is wrong with the ranges that are given for a search of `methods`."""
    for name, bounds in given.items():
        if name not in RANGES:
            yield unknown("range", name, RANGES)
        elif not _is_range(bounds):
            yield f"The range of {name!r} is (low, high) with finite low <= high, got {bounds!r}."
        elif name == "weight":
            if bounds[0] < 0 and (spherical := [m for m in methods if m in SPHERICAL]):
                yield f"{' and '.join(spherical)} takes no negative weights: leave it out, or start the range at 0 or above."
        elif bounds[0] < 0 or (name in _SHARES and bounds[1] > 1):
            wanted = "lies in [0, 1]" if name in _SHARES else "starts at 0 or above"
            yield f"The range of {name!r} {wanted}, got {bounds!r}."


def _is_range(bounds: Any) -> bool:
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        return False
    return math.isfinite(low) and math.isfinite(high) and low <= high
