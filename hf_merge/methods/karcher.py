"""The mean of models on the sphere."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import Blocks, per_model
from hf_merge.tensors.sphere import gram, spherical_mean


def measure(blocks: Blocks, n: int, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The models' coefficients, from their inner products."""
    models = len(next(iter(blocks())))
    found = spherical_mean(gram(blocks, models), [1 / models] * models, int(max_iter), tol)
    return torch.tensor(found, dtype=torch.float64)


def karcher(stack: Tensor, *, max_iter: int = 10, tol: float = 1e-5, measured: Tensor) -> Tensor:
    """The Riemannian mean of the flattened tensors' directions, times their mean norm (Karcher, 1977).

    At most `max_iter` steps, until one is shorter than `tol` radians. Every step is taken on the models' inner products, so it
    costs nothing whatever the tensor's size. See `spherical_mean` for tensors that are 0 or cancel.
    """
    return weighted_sum(stack, per_model(measured, stack))


METHOD = Method(
    name="karcher", merge=karcher, measure=measure, title="Karcher mean", paper="doi:10.1002/cpa.3160300502", space="weight"
)
