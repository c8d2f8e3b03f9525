"""The change of largest magnitude."""

import torch
from torch import Tensor

from hf_merge.methods.method import Method


def magmax(deltas: Tensor) -> Tensor:
    """Each element from the model that changed it most (arXiv:2407.06322, section 4.2); the positive of opposite equals."""
    highest, lowest = deltas.amax(0), deltas.amin(0)
    return torch.where(highest >= -lowest, highest, lowest)


METHOD = Method(name="magmax", merge=magmax, title="MagMax", paper="arXiv:2407.06322")
