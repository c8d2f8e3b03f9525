"""A sum of deltas in which all directions count the same."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model
from hf_merge.tensors.spectral import rows_and_columns, singular


def iso_c(deltas: Tensor, *, weights: PerModel = 1.0, shape: tuple[int, ...]) -> Tensor:
    """σ̄ U Vᵀ with U diag(σ) Vᵀ the SVD of Σ_k w_k δ_k and σ̄ the mean of σ (Iso-C, arXiv:2502.04959, section 4.1).

    Every matrix, embeddings included, and kernels as `(out, the rest)`; all else is averaged. Directions in which the sum is 0
    stay 0 and are not in the mean: the singular vectors there, which the paper would use, are arbitrary. The paper searches
    `scaling` on validation data. Needs the whole tensor, in float64.
    """
    matrix, column = rows_and_columns(shape), per_model(weights, deltas)
    if matrix is None:
        return weighted_sum(deltas, column / len(deltas))
    total = weighted_sum(deltas.double(), column.double())
    left, values, right = singular(total.reshape(matrix))
    flat = (left * values.mean()) @ right.T if len(values) else torch.zeros_like(total)
    return flat.reshape(-1).to(deltas.dtype)


METHOD = Method(name="iso_c", merge=iso_c, title="Iso-C", paper="arXiv:2502.04959", block="tensor")
