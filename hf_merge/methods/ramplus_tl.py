"""Changes that several models share averaged, changes of one model kept and enlarged."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method
from hf_merge.tensors.sparsify import Blocks


def measure(blocks: Blocks, n: int, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> list[float]:
    """What each model's unique changes are multiplied with."""
    unique, shared = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for block in blocks():
        changed = block.abs() > epsilon
        alone = changed.sum(0) == 1
        unique = unique + (changed & alone).sum(1).cpu()
        shared = shared + (changed & ~alone).sum(1).cpu()
    pairs = zip(unique.tolist(), shared.tolist(), strict=True)
    return [1 + r * min(common / own, alpha) if own else 1.0 for own, common in pairs]


def ramplus_tl(deltas: Tensor, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2, measured: list[float]) -> Tensor:
    """RAM+ (arXiv:2601.13572), per tensor: as `ram`, but what model k alone changes is multiplied by 1 + r min(ρ_k, alpha).

    ρ_k is how many of model k's changed elements another model changes too, over how many it alone changes.
    """
    total, scaled, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for values, factor in zip(deltas, measured, strict=True):
        changed = values.abs() > epsilon
        change = values * changed
        total += change
        scaled += change * factor
        count += changed
    return torch.where(count == 1, scaled, total / count.clamp_min(1))


METHOD = Method(name="ramplus_tl", merge=ramplus_tl, measure=measure, title="RAM+", paper="arXiv:2601.13572")
