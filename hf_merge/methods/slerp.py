"""Spherical interpolation between two models."""

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.sphere import gram

PARALLEL = 0.9995
"""Above this |cosine| the angle is too small to divide by its sine, and the interpolation is linear."""


def measure(blocks: Callable[[], Iterable[Tensor]], n: int) -> float | None:
    """Angle between the two tensors in radians, None if it is undefined (a zero tensor) or next to 0 or π."""
    products = gram(blocks, 2)
    norms = math.sqrt(float(products[0, 0])) * math.sqrt(float(products[1, 1]))
    cosine = float(products[0, 1]) / norms if norms > 0 else 1.0
    return math.acos(cosine) if abs(cosine) <= PARALLEL else None


def slerp(models: int, *, t: float = 0.5, measured: float | None) -> Sequence[float]:
    """sin((1-t)Ω)/sin(Ω) a + sin(tΩ)/sin(Ω) b, with Ω the angle between the flattened tensors (Shoemake, 1985).

    `t` = 0 is the first model, 1 the second; linear where the angle is undefined or its |cosine| is above `PARALLEL`.
    """
    shares = (1.0 - t, t)
    return shares if measured is None else [math.sin(s * measured) / math.sin(measured) for s in shares]


METHOD = Method(
    name="slerp",
    coefficients=slerp,
    measure=measure,
    title="SLERP",
    paper="doi:10.1145/325165.325242",
    space="weight",
    models=(2, 2),
    ordered=True,
)
