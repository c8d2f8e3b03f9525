"""One model as it is."""

from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import PerModel, per_model


def passthrough(stack: Tensor, *, scale: PerModel = 1.0) -> Tensor:
    """The only model's tensor times `scale`: for recipes that put layers together (arXiv:2312.15166, section 2)."""
    return (stack * per_model(scale, stack))[0]


METHOD = Method(
    name="passthrough", merge=passthrough, title="Passthrough", paper="arXiv:2312.15166", space="weight", models=(1, 1)
)
