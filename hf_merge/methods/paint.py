"""Part of the way from the base to the mean of the models."""

from collections.abc import Sequence

from hf_merge.methods.method import Method


def paint(models: int, *, t: float = 0.5) -> Sequence[float]:
    """t mean_k δ_k, which makes the model (1-t) base + t mean_k θ_k (PAINT, arXiv:2208.05592; for one model
    WiSE-FT, arXiv:2109.01903, eq. 1).

    `t` in [0, 1] is the whole trade-off, from the base's abilities (0) to the new ones (1). Both papers try t = 0, 0.1, …, 1 on
    validation data; without any, WiSE-FT takes 0.5.
    """
    return [t / models] * models


METHOD = Method(name="paint", coefficients=paint, title="PAINT", paper="arXiv:2208.05592")
