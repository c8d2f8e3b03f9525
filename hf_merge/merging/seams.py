"""Maps of the residual stream between layers of different models, in closed form from activations (no training).

Where a layer follows one that it does not follow in its own model, what the path delivers differs from what the layer met
there. A seam's map takes the mean and the spread of the first to those of the second: one scale, one scale and shift a channel,
or a whole matrix (CORAL: A = Σ_t^½ Σ_s^-½, b = μ_t - A μ_s; arXiv:1607.01719).
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

from hf_merge.errors import RecipeError, unknown

Kind = Literal["scalar", "diag", "coral"]
KINDS: tuple[Kind, ...] = ("scalar", "diag", "coral")
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Seam:
    """x -> x·A + b of the residual stream: `weight` is one number `()`, one a channel `(d,)`, or a matrix `(d, d)`."""

    kind: Kind
    weight: Tensor
    bias: Tensor

    @property
    def digest(self) -> str:
        """16 hex digits that are the same for the same map."""
        numbers = (tensor.detach().cpu().double().numpy().tobytes() for tensor in (self.weight, self.bias))
        return sha256(self.kind.encode() + b"".join(numbers)).hexdigest()[:16]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """The map of `(..., d)`, in its dtype."""
        weight, bias = (t.to(hidden_states.device, hidden_states.dtype) for t in (self.weight, self.bias))
        return (hidden_states @ weight if weight.dim() == 2 else hidden_states * weight) + bias


def fitted(kind: Kind, source: Tensor, target: Tensor, shrinkage: float = 0.1) -> Seam:
    """The map that takes activations `source` to the mean and spread of `target`, both `(tokens, d)`; computed in float64.

    "scalar" matches the root mean square, "diag" each channel's mean and standard deviation, "coral" the mean and the
    covariance; each covariance is first shrunk by `shrinkage` in [0, 1] towards the identity times its mean variance. Raises
    `RecipeError` for another kind, or for too few tokens.
    """
    if kind not in KINDS:
        raise RecipeError(unknown("alignment", kind, KINDS))
    if not 0 <= shrinkage <= 1:
        raise RecipeError(f"`shrinkage` lies between 0 and 1, got {shrinkage!r}.")
    source, target = source.double(), target.double()
    tokens, width = min(len(source), len(target)), source.shape[1]
    if tokens < 2 or (kind == "coral" and shrinkage == 0 and tokens <= width):
        raise RecipeError(f"{tokens} tokens are too few for a {kind} map of {width} channels: give more, or shrinkage.")
    if kind == "scalar":
        ratio = target.square().mean().sqrt() / source.square().mean().sqrt().clamp_min(_LEAST)
        return Seam(kind, ratio, torch.zeros(()))
    means = source.mean(0), target.mean(0)
    if kind == "diag":
        weight = target.std(0) / source.std(0).clamp_min(_LEAST)
        return Seam(kind, weight, means[1] - weight * means[0])
    spreads = [_shrunk(torch.cov(values.T), shrinkage) for values in (source, target)]
    # Rows are tokens, so the matrix stands on the right: A = Σ_s^-½ Σ_t^½.
    matrix = _power(spreads[0], -0.5) @ _power(spreads[1], 0.5)
    return Seam(kind, matrix, means[1] - means[0] @ matrix)


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    mean = covariance.diagonal().mean()
    return (1 - shrinkage) * covariance + shrinkage * mean * torch.eye(len(covariance), dtype=covariance.dtype)


def _power(covariance: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(_LEAST).pow(exponent)) @ vectors.T
