"""What a layer changed against the base's same layer, in a few numbers."""

import numpy as np
import torch
from torch import nn

GROUPS = ("attention", "mlp", "norm")
_TINY = 1e-8


def differences(block: nn.Module, base: nn.Module) -> list[float]:
    """For each of `GROUPS` the logarithm of the norm of the difference from `base`, relative to that, and the cosine of the
    difference with it; zeros where there is nothing of the group."""
    there = dict(base.named_parameters())
    sums = {group: np.zeros(3) for group in GROUPS}
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            anchor = there[name].double()
            delta = parameter.double() - anchor
            sums[_group(name)] += [float((t * u).sum()) for t, u in ((delta, delta), (anchor, anchor), (delta, anchor))]
    found = []
    for own, its, both in sums.values():
        found += [float(np.log(np.sqrt(own / its) + _TINY)) if its else 0.0, both / np.sqrt(own * its) if own * its else 0.0]
    return found


def _group(name: str) -> str:
    if "norm" in name.lower() or name.startswith("ln_"):
        return "norm"
    return "attention" if "att" in name else "mlp"
