"""Averages of models, drawn towards the base by the angle between them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.sparsify import Blocks
from hf_merge.tensors.sphere import gram


def measure(blocks: Blocks, n: int, filter_wise: bool = False, clamp: bool = True) -> float | None:
    """The interpolation ratio t of one tensor; None if each row has its own."""
    return None if filter_wise else float(_ratio(gram(blocks, len(next(iter(blocks())))), clamp))


def model_stock(
    models: int, *, filter_wise: bool = False, clamp: bool = True, measured: float | None
) -> Sequence[float] | None:
    """t mean_k δ_k with t = K cos θ / (1 + (K-1) cos θ), cos θ the mean cosine between the deltas (arXiv:2403.19522, eq. 2).

    Per tensor, or with `filter_wise` per row (the last axis). For more than two models, where the paper is silent, cosines
    are averaged over the pairs. `clamp` keeps t in [0, 1], outside of which deltas that point apart would blow the average
    up; mergekit does not, and draws deltas with norms below 1e-3 further to the base.
    """
    return None if measured is None else [measured / models] * models


def by_rows(deltas: Tensor, *, clamp: bool = True, shape: tuple[int, ...]) -> Tensor:
    """Each row with a t of its own."""
    rows = deltas.reshape(len(deltas), -1, row_length(shape))
    double = rows.double().transpose(0, 1)
    ratios = _ratio(double @ double.transpose(1, 2), clamp).to(deltas.dtype)
    return (rows.mean(0) * ratios[:, None]).reshape(-1)


def _ratio(products: Tensor, clamp: bool) -> Tensor:
    """t from inner products `(*, models, models)`; 0 where it is undefined."""
    models = products.shape[-1]
    if models == 1:
        return torch.ones(products.shape[:-2], dtype=products.dtype, device=products.device)
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    sizes = norms[..., None] * norms[..., None, :]
    cosines = torch.where(sizes > 0, products / sizes.where(sizes > 0, 1.0), 0.0)
    mean = (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (models * (models - 1))
    bottom = 1 + (models - 1) * mean
    ratio = torch.where(bottom > 0, models * mean / bottom.where(bottom > 0, 1.0), 0.0)
    return ratio.clamp(0.0, 1.0) if clamp else ratio


METHOD = Method(
    name="model_stock",
    coefficients=model_stock,
    merge=by_rows,
    measure=measure,
    title="Model Stock",
    paper="arXiv:2403.19522",
    block="rows",
)
