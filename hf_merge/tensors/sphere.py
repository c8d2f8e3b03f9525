"""Means and angles of tensors seen as vectors, from their inner products alone: a mean is a combination of its tensors."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors.sparsify import Blocks

RUN = 8192
LEAST = 1e-20
"""Sum of squares of a run below which float32 may have lost some of them."""


def gram(blocks: Blocks, models: int) -> Tensor:
    """The inner products `(models, models)` of the flattened tensors, in float64.

    float32 within runs of `RUN` elements, which is exact to about 1e-8 of the norms, unless squares leave its range; float64
    between them. numpy's products are the same wherever in memory the numbers lie, torch's are not.
    """
    found = np.zeros((models, models))
    for block in blocks():
        rows = block.cpu().numpy()
        whole = rows.shape[1] // RUN * RUN
        runs = rows[:, :whole].reshape(models, -1, RUN)
        with np.errstate(over="ignore"):
            squares = np.vecdot(runs, runs)
        if whole and not (squares.min() > LEAST and squares.max() < np.inf):
            whole, runs = 0, runs[:, :0]
        rest = rows[:, whole:].astype(np.float64)
        found += rest @ rest.T
        for i in range(models):
            for j in range(i + 1):
                product = (squares[i] if i == j else np.vecdot(runs[i], runs[j])).sum(dtype=np.float64) if whole else 0.0
                found[i, j] += product
                found[j, i] += product if i != j else 0.0
    return torch.from_numpy(found)


def spherical_mean(products: Tensor, weights: Sequence[float], steps: int, tolerance: float) -> list[float]:
    """Coefficients of the tensors whose combination is their mean on the sphere, times the mean of their norms.

    From the normalized weighted mean of the directions, at most `steps` Newton steps through the tangent space (the Riemannian
    mean of Karcher, 1977), until one is not longer than `tolerance` radians. Weights add up to 1. Tensors that are 0 have no
    direction and are left out; directions that cancel have no mean, and the linear mean stands in for it.
    """
    norms = products.diagonal().sqrt()
    there = [i for i in range(len(norms)) if norms[i] > 0]
    share = sum(weights[i] for i in there)
    if not there or share == 0:
        return list(weights)
    cosines = (products / torch.outer(norms, norms).where(torch.outer(norms, norms) > 0, 1.0))[there][:, there]
    part = torch.tensor([weights[i] / share for i in there], dtype=torch.float64)
    if not _length(part, cosines) > 1e-8:
        return list(weights)
    mean = part / _length(part, cosines)
    for _ in range(steps):
        step = _tangent(mean, cosines, part)
        length = _length(step, cosines)
        if length <= tolerance:
            break
        mean = mean * math.cos(length) + step * (math.sin(length) / length)
        mean = mean / _length(mean, cosines)
    scale = float((part * norms[there]).sum())
    found = [0.0] * len(norms)
    for i, coefficient in zip(there, (mean * scale / norms[there]).tolist(), strict=True):
        found[i] = coefficient
    return found


def _tangent(mean: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the directions' logarithms at `mean`, as coefficients of the directions."""
    along = (cosines @ mean).clamp(-1.0, 1.0)
    angles = along.arccos()
    stretch = torch.where(angles > 1e-8, angles / angles.sin().clamp_min(1e-12), 1.0)
    return weights * stretch - mean * (weights * stretch * along).sum()


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))
