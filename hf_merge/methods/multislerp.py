"""Spherical interpolation between any number of models."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model
from hf_merge.tensors.sphere import gram, spherical_mean


def measure(blocks: Callable[[], Iterable[Tensor]], n: int, weights: PerModel = 1.0) -> list[float]:
    """The models' coefficients, from their inner products and weights."""
    first = next(iter(blocks()))
    share = per_model(weights, first).double()[:, 0]
    share = share / share.sum() if float(share.sum()) != 0 else share
    return spherical_mean(gram(blocks, len(first)), share.tolist(), steps=1, tolerance=0.0)


def multislerp(stack: Tensor, *, weights: PerModel = 1.0, measured: list[float]) -> Tensor:
    """SLERP for any number of models: from the normalized weighted mean of the directions one step to their weighted mean
    in the tangent space, times the weighted mean norm (the first iteration of Buss and Fillmore, 2001, algorithm A1).

    Weights count in proportion to their sum. See `spherical_mean` for tensors that are 0 or cancel.
    """
    return weighted_sum(stack, torch.tensor(measured, dtype=stack.dtype, device=stack.device).reshape(-1, 1))


METHOD = Method(
    name="multislerp", merge=multislerp, measure=measure, title="Multi-SLERP", paper="doi:10.1145/502122.502124", space="weight"
)
