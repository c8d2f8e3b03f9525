"""The mean of models on the sphere."""

from collections.abc import Sequence

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import Blocks
from hf_merge.tensors.sphere import gram, spherical_mean


def measure(blocks: Blocks, n: int, max_iter: int = 10, tol: float = 1e-5) -> Sequence[float]:
    """The models' coefficients, from their inner products."""
    models = len(next(iter(blocks())))
    return spherical_mean(gram(blocks, models), [1 / models] * models, int(max_iter), tol)


def karcher(models: int, *, max_iter: int = 10, tol: float = 1e-5, measured: Sequence[float]) -> Sequence[float]:
    """The Riemannian mean of the flattened tensors' directions, times their mean norm (Karcher, 1977).

    At most `max_iter` steps, until one is shorter than `tol` radians. Every step is taken on the models' inner products, so it
    costs nothing whatever the tensor's size. See `spherical_mean` for tensors that are 0 or cancel.
    """
    return measured


METHOD = Method(
    name="karcher",
    coefficients=karcher,
    measure=measure,
    title="Karcher mean",
    paper="doi:10.1002/cpa.3160300502",
    space="weight",
)
