"""One model drawn towards another by a bounded step."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method


def nearswap(stack: Tensor, *, t: float = 1e-4) -> Tensor:
    """The first model, each element moved to the second by at most `t`, which is a distance between weights.

    Where the two are nearer than that, the result is the second model: similar weights are swapped, others nearly kept.
    mergekit's reading, which has no default for `t`; the method's first merge took 0.0001.
    """
    return torch.clamp(stack[1], stack[0] - t, stack[0] + t)


METHOD = Method(
    name="nearswap",
    merge=nearswap,
    title="NearSwap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    space="weight",
    models=(2, 2),
    ordered=True,
    free=frozenset({"t"}),
)
