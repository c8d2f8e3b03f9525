"""Averages of models, drawn towards the base by the angle between them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.consensus import weighted_sum
from hf_merge.tensors.sphere import gram


def measure(blocks: Callable[[], Iterable[Tensor]], n: int) -> float:
    """The interpolation ratio t of one tensor, in [0, 1]."""
    models = len(next(iter(blocks())))
    if models == 1:
        return 1.0
    products = gram(blocks, models)
    norms = products.diagonal().sqrt()
    sizes = torch.outer(norms, norms)
    cosines = torch.where(sizes > 0, products / sizes.where(sizes > 0, 1.0), 0.0)
    mean = float((cosines.sum() - cosines.diagonal().sum()) / (models * (models - 1)))
    bottom = 1 + (models - 1) * mean
    return min(1.0, max(0.0, models * mean / bottom)) if bottom > 0 else 0.0


def model_stock(deltas: Tensor, *, measured: float) -> Tensor:
    """t mean_k δ_k with t = K cos θ / (1 + (K-1) cos θ), cos θ the mean cosine between the deltas (arXiv:2403.19522, eq. 2).

    Per tensor. For more than two models, where the paper is silent, cosines are averaged over the pairs; t is kept in [0, 1],
    outside of which deltas that point apart would blow the average up.
    """
    return weighted_sum(deltas, torch.full((len(deltas), 1), measured / len(deltas), dtype=deltas.dtype, device=deltas.device))


METHOD = Method(name="model_stock", merge=model_stock, measure=measure, title="Model Stock", paper="arXiv:2403.19522")
