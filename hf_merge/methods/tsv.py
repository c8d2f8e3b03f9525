"""The leading singular vectors of every model, made orthogonal to each other."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model
from hf_merge.tensors.spectral import orthonormal, rows_and_columns, singular


def tsv(deltas: Tensor, *, weights: PerModel = 1.0, shape: tuple[int, ...]) -> Tensor:
    """Û diag(σ) V̂ᵀ, where U, σ and V are the leading min(rows, columns) // K singular vectors and values of each of the
    K w_k δ_k, side by side, and Û and V̂ the nearest orthonormal matrices (TSV-Merge, arXiv:2412.00081).

    Every matrix, embeddings included, and kernels as `(out, the rest)`; vectors, and matrices too small to give each model a
    direction, are averaged. Directions in which a delta is 0 take no part, and models that share one exactly have
    equal parts of it; both are arbitrary in the paper, whose `scaling` is 1. Needs the whole tensor, in float64.
    """
    matrix, column, models = rows_and_columns(shape), per_model(weights, deltas), len(deltas)
    if models == 1 or matrix is None or min(matrix) < models:
        return weighted_sum(deltas, column / models)
    rank = min(matrix) // models
    found = [singular((delta.double() * weight.double()).reshape(matrix)) for delta, weight in zip(deltas, column, strict=True)]
    left, values, right = (torch.cat([part[..., :rank] for part in parts], -1) for parts in zip(*found, strict=True))
    return ((orthonormal(left) * values) @ orthonormal(right).T).reshape(-1).to(deltas.dtype)


METHOD = Method(name="tsv", merge=tsv, title="TSV-Merge", paper="arXiv:2412.00081", block="tensor")
