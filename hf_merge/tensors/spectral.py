"""Matrices, their singular vectors, and what is left of a tensor that is none."""

import math

import torch
from torch import Tensor

RANK = 1e-5
"""Singular values up to this share of the largest are rounding errors of float32 deltas and no directions of the matrix."""


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How a tensor is seen as a matrix: a kernel as `(out, the rest)`; None for vectors and scalars."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `(rows, r)`, σ `(r,)` descending and V `(columns, r)` of a float64 matrix U diag(σ) Vᵀ of numerical rank r.

    From the eigenvectors of the smaller of AᵀA and AAᵀ, so that the table of an embedding costs what its width costs. That
    squares the condition, which float64 pays for down to `RANK`; what lies below is left out.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = singular(matrix.T)
        return left, values, right
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rank = int((squares > RANK**2 * squares[:1]).sum())
    values, right = squares[:rank].sqrt(), vectors[:, :rank]
    return matrix @ right / values, values, right


def orthonormal(columns: Tensor) -> Tensor:
    """The matrix of orthonormal columns that is nearest to `columns` (orthogonal Procrustes, Schönemann, 1966).

    Columns that depend on each other have no single one; it is then the one of least norm, where equal columns stay equal.
    """
    left, _, right = singular(columns)
    return left @ right.T
