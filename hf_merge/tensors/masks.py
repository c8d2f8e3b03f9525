"""Which elements stay, kept in packed bits from one pass over a tensor to the next."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_merge.tensors import loops

Bits = Sequence[npt.NDArray[np.uint8]]
"""A mask `(…, b)`, one array for each of its rows, with eight elements in a byte."""


def pack(mask: Tensor) -> Bits:
    """`mask` `(models, b)`, of 1 and 0 in uint8 or boolean."""
    found = []
    for row in mask.to(torch.uint8).cpu().contiguous():
        found.append(np.empty(-(-len(row) // loops.CHUNK) * (loops.CHUNK // 8), np.uint8))
        loops.pack(row.numpy(), found[-1])
    return found


def only(deltas: Tensor, mask: Bits, factors: Sequence[float] | None = None) -> Tensor:
    """`deltas` `(models, b)`, times the models' `factors`, with 0 where `mask`, one for all or one for each model, has it."""
    rows = deltas.cpu().contiguous()
    stayed = torch.empty_like(rows)
    for k, (row, out) in enumerate(zip(rows, stayed, strict=True)):
        factor = np.float32(1.0 if factors is None else factors[k])
        loops.only(row.numpy(), mask[k if len(mask) > 1 else 0], factor, out.numpy())
    return stayed.to(deltas.device)
