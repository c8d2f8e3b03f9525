"""Spherical interpolation between two models by their weights, of whole tensors, rows or columns."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model
from hf_merge.tensors.sphere import gram

PARALLEL = 1e-16
"""Squared sine of the angle from which on down the interpolation is linear."""


def measure(
    blocks: Blocks,
    n: int,
    weights: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    *,
    shape: tuple[int, ...],
) -> Tensor | None:
    """Both models' coefficients `(2, vectors)` of the tensor or of each column; None for rows, which `merge` sees whole."""
    if not nuslerp_flatten and not nuslerp_row_wise:
        return None
    t = _position(weights, next(iter(blocks())))
    if nuslerp_flatten:
        products = gram(blocks, 2)
        return _coefficients(products[(0, 0, 1), (0, 1, 1)][:, None], t)
    columns = max(1, n // max(1, shape[0] if shape else 1))
    products, start = torch.zeros(3, columns, dtype=torch.float64), 0
    for block in blocks():
        places = torch.arange(start, start + block.shape[1]) % columns
        products.index_add_(1, places, _products(block.double()).cpu())
        start += block.shape[1]
    return _coefficients(products, t)


def nuslerp(
    stack: Tensor,
    *,
    weights: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    measured: Tensor | None,
    start: int = 0,
    shape: tuple[int, ...],
) -> Tensor:
    """sin((1-t)Ω)/sin(Ω) a + sin(tΩ)/sin(Ω) b with t = w_b / (w_a + w_b), 1/2 if the sum is below 1e-6 (Shoemake, 1985).

    On deltas if there is a base. Ω is the angle between the flattened tensors; without `nuslerp_flatten` each vector along
    the last axis has its own, with `nuslerp_row_wise` along the first. Linear where the vectors are parallel; one that is 0
    counts as at right angles. This is mergekit's method, and its defaults but for the weights, which it requires.
    """
    first, second = stack
    if measured is None:
        rows = stack.reshape(2, -1, row_length(shape))
        found = _coefficients(_products(rows.double()).sum(2), _position(weights, stack))
        first, second = (rows * found.to(stack)[:, :, None]).reshape(2, -1)
        return first + second
    found = measured.to(stack)
    if found.shape[1] > 1:
        found = found[:, torch.arange(start, start + stack.shape[1], device=stack.device) % found.shape[1]]
    return first * found[0] + second * found[1]


def _position(weights: PerModel, stack: Tensor) -> float:
    first, second = per_model(weights, stack[:, :0].double())[:, 0].tolist()
    return second / (first + second) if abs(first + second) >= 1e-6 else 0.5


def _products(pair: Tensor) -> Tensor:
    """a·a, a·b and b·b by element."""
    return torch.stack([pair[0] * pair[0], pair[0] * pair[1], pair[1] * pair[1]])


def _coefficients(products: Tensor, t: float) -> Tensor:
    """Of both vectors `(2, vectors)`, from their inner products `(3, vectors)`."""
    sizes = products[0].sqrt() * products[2].sqrt()
    cosines = torch.where(sizes > 0, products[1] / sizes.where(sizes > 0, 1.0), 0.0).clamp(-1.0, 1.0)
    angles = cosines.arccos()
    shares = torch.tensor([[1 - t], [t]], dtype=torch.float64, device=products.device)
    curved = (shares * angles).sin() / angles.sin().where(angles.sin() != 0, 1.0)
    return torch.where(1 - cosines**2 > PARALLEL, curved, shares.expand_as(curved))


METHOD = Method(
    name="nuslerp",
    merge=nuslerp,
    measure=measure,
    title="NuSLERP",
    paper="doi:10.1145/325165.325242",
    space="any",
    models=(2, 2),
    block="rows",
)
