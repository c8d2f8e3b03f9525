"""The delta that interferes least with what each model's delta reacts to."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sparsify import PerModel, per_model
from hf_merge.tensors.spectral import rows_and_columns

LEAST_RIDGE = 1e-9
"""Enough for float64 to invert what deltas of low rank leave singular."""


def wudi(
    deltas: Tensor,
    *,
    weights: PerModel = 1.0,
    closed_form: bool = True,
    ridge: float = 0.03,
    steps: int = 300,
    step_size: float = 1e-5,
    shape: tuple[int, ...],
) -> Tensor:
    """The δ that minimizes Σ_k ‖(δ - δ_k) δ_kᵀ‖² / ‖δ_k‖², where each δ_k is first multiplied by w_k
    (WUDI-Merging, arXiv:2503.08099): the rows of a linear layer's delta span what its inputs were.

    The loss is quadratic: δ = Σ_j δ_j + R (G + ridge tr(G)/n)⁻¹ with G = Σ_k δ_kᵀδ_k / ‖δ_k‖² over the n columns and
    R = Σ_k (δ_k - Σ_j δ_j) δ_kᵀδ_k / ‖δ_k‖². `ridge` draws δ to the sum, from which the paper starts, where the loss
    hardly cares: at 0 δ is the minimum, at the default it is about as far from the sum as where the paper stops, at a loss as
    low. With `closed_form` false it is the paper's own `steps` of Adam of at most about `step_size` per element, which depend
    on the deltas' units and cost as many products of matrices.

    Every matrix `(out, in)`, embeddings included, and kernels as `(out, the rest)`; all else is averaged. The paper's `scaling`
    is 1. Needs the whole tensor, in float64.
    """
    matrix, column = rows_and_columns(shape), per_model(weights, deltas)
    if matrix is None:
        return weighted_sum(deltas, column / len(deltas))
    weighted = (deltas.double() * column.double()).reshape(len(deltas), *matrix)
    total = weighted.sum(0)
    gram, pull = total.new_zeros(matrix[1], matrix[1]), torch.zeros_like(total)
    for delta in weighted:
        inner = delta.T @ delta
        size = inner.trace()
        if size > 0:
            gram += inner / size
            pull += (delta - total) @ inner / size
    move = _minimum(gram, pull, ridge) if closed_form else _adam(gram, pull, int(steps), step_size)
    return (total + move).reshape(-1).to(deltas.dtype)


def _minimum(gram: Tensor, pull: Tensor, ridge: float) -> Tensor:
    level = gram.diagonal().mean()
    if not level > 0:
        return torch.zeros_like(pull)
    gram.diagonal().add_(max(ridge, LEAST_RIDGE) * level)
    return torch.cholesky_solve(pull.T, torch.linalg.cholesky(gram)).T


def _adam(gram: Tensor, pull: Tensor, steps: int, step_size: float) -> Tensor:
    """Adam (arXiv:1412.6980, algorithm 1) from 0, on the loss whose gradient is 2 (δ G - R)."""
    move, first, second = (torch.zeros_like(pull) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = 2 * (move @ gram - pull)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        move -= step_size * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return move


METHOD = Method(name="wudi", merge=wudi, title="WUDI-Merging", paper="arXiv:2503.08099", block="tensor")
