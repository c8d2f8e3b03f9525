"""The most important changes of one model put into another."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_merge.methods.method import Method, row_length
from hf_merge.tensors.sparsify import Blocks, cutoffs


def measure(blocks: Blocks, n: int, *, shape: tuple[int, ...]) -> float:
    """The importance from which on an element is taken: median + 1.5 (third - first quartile)."""
    if n == 0:
        return 0.0
    row = row_length(shape)

    def importances() -> Iterable[Tensor]:
        return (_importance(block, row).expand(3, -1) for block in blocks())

    from_top = [n - quarter * (n - 1) // 4 for quarter in (1, 2, 3)]
    cut = cutoffs(importances, [count / n for count in from_top], n)
    first, median, third = cut.bits.view(torch.float32)[:, 0].double().tolist()
    return median + 1.5 * (third - first)


def arcee_fusion(stack: Tensor, *, measured: float, shape: tuple[int, ...]) -> Tensor:
    """The first model with the elements of the second whose change is important.

    The importance of an element is |b - a| KL(softmax(b) ‖ softmax(a)), a and b being its rows (the last axis) in the first and
    the second model. Taken are those of at least median + 1.5 (third quartile - first quartile) of the tensor's
    importances; quartiles are the elements at ⌊q (n-1)⌋ of n in ascending order, as in mergekit, whose method this is. There
    they are estimated on a million elements of larger tensors, here they are exact.
    """
    return torch.where(_importance(stack, row_length(shape)) >= measured, stack[1], stack[0])


def _importance(block: Tensor, row: int) -> Tensor:
    """Of each element of a block `(2, b)` of whole rows."""
    # In float64: the divergence of two rows that are almost equal is a small difference of large numbers.
    base, other = block.double().reshape(2, -1, row)
    change = other - base
    base_top, top = base.amax(1, keepdim=True), other.amax(1, keepdim=True)
    chances = (other - top).exp_()
    total, base_total = chances.sum(1), (base - base_top).exp_().sum(1)
    grown = (top - base_top)[:, 0] + (total / base_total).log_()  # of the logarithm of the sum of exponentials
    divergence = chances.mul_(change).sum(1) / total - grown
    return change.abs_().mul_(divergence.clamp_min_(0)[:, None]).reshape(-1).to(block.dtype)


METHOD = Method(
    name="arcee_fusion",
    merge=arcee_fusion,
    measure=measure,
    title="Arcee Fusion",
    paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    space="weight",
    models=(2, 2),
    ordered=True,
    block="rows",
)
