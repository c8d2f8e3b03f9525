"""Spherical interpolation between any number of models."""

from collections.abc import Sequence

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import Blocks, PerModel, per_model
from hf_merge.tensors.sphere import gram, spherical_mean


def measure(blocks: Blocks, n: int, weights: PerModel = 1.0, normalize_weights: bool = True, steps: int = 1) -> Sequence[float]:
    """The models' coefficients, from their inner products and weights."""
    first = next(iter(blocks()))
    weight = per_model(weights, first[:, :0].double())[:, 0]
    total = float(weight.sum())
    share = weight / total if total != 0 else weight
    found = spherical_mean(gram(blocks, len(first)), share.tolist(), int(steps), tolerance=0.0)
    scale = 1.0 if normalize_weights or total == 0 else total
    return [coefficient * scale for coefficient in found]


def multislerp(
    models: int,
    *,
    weights: PerModel = 1.0,
    normalize_weights: bool = True,
    steps: int = 1,
    measured: Sequence[float],
) -> Sequence[float]:
    """SLERP for any number of models: from the normalized weighted mean of the directions one step to their weighted mean
    in the tangent space, times the weighted mean norm (the first iteration of Buss and Fillmore, 2001, algorithm A1).

    On deltas if there is a base. Weights count in proportion to their sum; without `normalize_weights` the result is
    multiplied by it. More `steps` come nearer to the weighted Riemannian mean; none is what mergekit computes, where the sum
    of the vectors projected on the tangent space is 0. See `spherical_mean` for tensors that are 0 or cancel.
    """
    return measured


METHOD = Method(
    name="multislerp",
    coefficients=multislerp,
    measure=measure,
    title="Multi-SLERP",
    paper="doi:10.1145/502122.502124",
    space="any",
)
