"""Which elements stay, kept in packed bits from one pass over a tensor to the next."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.uint8]
"""A mask `(…, b)` with eight elements of the last axis in a byte."""


def pack(mask: Tensor) -> Bits:
    """`mask` `(…, b)`, boolean or of 1 and 0 in uint8."""
    return np.packbits(mask.cpu().numpy(), axis=-1)


def only(deltas: Tensor, mask: Bits) -> Tensor:
    """`deltas` `(models, b)` with 0 where `mask`, one for all or one for each model, has it."""
    stays = torch.from_numpy(np.unpackbits(mask, axis=-1, count=deltas.shape[1])).to(deltas.device)
    # Numbers to multiply with: masks of booleans are several times slower.
    return stays.to(deltas.dtype).expand(deltas.shape) * deltas
