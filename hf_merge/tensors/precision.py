"""Between the dtypes that tensors are stored in and the float32 that they are merged in, one pass over memory each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_merge.tensors import loops

_NOTHING = np.empty(0, np.float32)
_COMPILED = (torch.bfloat16, torch.float32)
"""What the compiled loops read and write; other dtypes go through float32."""


def widen(values: Tensor, base: Tensor | None, out: Tensor) -> bool:
    """`values` `(n,)` in the float32 `out`, less the float32 `base`. Returns whether all of it is finite."""
    if (rows := loops.served(out)) is not None:
        anchor = _NOTHING if base is None else base.numpy()
        return not loops.widen(_stored(values), anchor, rows)
    out.copy_(values)
    if base is not None:
        out -= base
    return bool(torch.isfinite(out).all())


def narrow(merged: Tensor, base: Tensor | None, scaling: float, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """base + scaling merged, all `(n,)` float32, in `dtype` on the CPU; and whether all of it is finite."""
    if (values := loops.served(merged)) is not None and dtype in _COMPILED:
        out = torch.empty(len(merged), dtype=dtype)
        anchor = _NOTHING if base is None else base.numpy()
        return out, not loops.narrow(values, np.float32(scaling), anchor, _stored(out))
    total = merged if base is None else torch.add(base, merged, alpha=scaling)
    result = total.to("cpu", dtype)
    return result, bool(torch.isfinite(result).all())


def mix(
    sources: Sequence[Tensor], factors: Sequence[float], base: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """Σ_k f_k x_k of the `sources` `(n,)` on the CPU, with a `base` base + scaling Σ_k f_k (x_k - base), in `dtype`; and
    whether all of it is finite."""
    inputs = [*sources] if base is None else [*sources, base]
    kinds = {tensor.dtype for tensor in inputs}
    arrays = [_stored(tensor if len(kinds) == 1 else tensor.float()) for tensor in inputs]
    out = torch.empty(len(sources[0]), dtype=dtype if dtype in _COMPILED else torch.float32)
    anchor = arrays[0][:0] if base is None else arrays.pop()
    broken = loops.mix(tuple(arrays), np.array(factors, np.float32), np.float32(scaling), anchor, _stored(out))
    result = out.to(dtype)
    return result, not broken and (result is out or bool(torch.isfinite(result).all()))


def _stored(values: Tensor) -> Any:
    """A tensor's numbers for the compiled loops, which see bfloat16 as its bits."""
    values = values if values.dtype in _COMPILED else values.float()
    return values.view(torch.uint16).numpy() if values.dtype is torch.bfloat16 else values.numpy()
