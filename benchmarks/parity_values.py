"""What parity.py and its random part compare: elements, folders and deltas."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_merge.merging.plan import TensorJob

TOLERANCE = 1e-6


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """|a - b| / max(|b|, RMS of b's tensor) by element, float64; 0 where both are equal, NaN included."""
    a, b = ours.double(), theirs.double()
    scale = torch.maximum(b.abs(), b.square().mean().sqrt())
    found = torch.where(a == b, 0.0, (a - b).abs() / scale)
    return torch.where(a.isnan() & b.isnan(), 0.0, found.nan_to_num(nan=torch.inf))


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def deltas(job: TensorJob) -> Tensor:
    """`(models, n)` float32."""
    stack = torch.stack([source.read(0, job.elements).float() for source in job.sources])
    return stack if job.base is None else stack - job.base.read(0, job.elements).float()
