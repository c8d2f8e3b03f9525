"""A model of one objective over a search space: a quadratic through a link, and a Gaussian process for what it leaves.

The quadratic and its links are MAP's (arXiv:2406.07529). What a quadratic cannot follow (a kink, a method's own densities) is
left to a Matérn-5/2 process whose coordinates are stretched by the quadratic's slope along each. Both are one process with the
sum of their kernels; its few numbers are those of a small grid that make the data most likely, and of the links the one
is taken that predicts each value best from all the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from hf_merge.pareto import Floats

EDGE = 1e-3
"""How near to the ends of its range a link takes a value at its word."""

LENGTHS = (0.7, 1.5, 3.0, 6.0)
"""Length scales; the steepest of the coordinates, which go from -1 to 1, keeps its own scale."""

NOISES = (1e-6, 1e-3, 1e-1)
"""Variances of the noise, where the quadratic and the process have 1."""

RIDGES = tuple(10.0 ** np.arange(-4, 4))

FLATTEST = 0.1
"""The least stretch: what looks flat to a quadratic may not be."""


class Link(NamedTuple):
    """A map of an objective's values to the real line and back, and which values it takes."""

    takes: Callable[[Floats], bool]
    to: Callable[[Floats], Floats]
    back: Callable[[Floats], Floats]


def _logit(values: Floats) -> Floats:
    inside = np.clip(values, EDGE, 1 - EDGE)
    return np.log(inside / (1 - inside))


LINKS = (
    Link(lambda v: True, lambda v: v, lambda z: z),
    Link(lambda v: bool(v.min() >= 0 and v.max() <= 1), _logit, lambda z: 1 / (1 + np.exp(-z))),
    Link(lambda v: bool(v.min() >= 0), lambda v: np.log(np.expm1(np.maximum(v, EDGE))), lambda z: np.logaddexp(0, z)),
)
"""None; the sigmoid, for accuracies; the softplus, for losses."""


class Surrogate:
    """A model of `values` `(n,)` at `features` `(n, k)` in [0, 1]. Without `process` it is the quadratic alone."""

    def __init__(self, features: Floats, values: Floats, *, process: bool = True) -> None:
        self.features, self.process = features, process
        terms = _terms(features)
        self.middle, self.spread = terms.mean(0), terms.std(0) + 1e-9
        found = [self._linked(link, values) for link in LINKS if link.takes(values)]
        self.fit = min(found, key=lambda fit: fit.error)

    @property
    def error(self) -> float:
        """The median error of predicting each value from all the others, in the objective's unit."""
        return self.fit.median

    def predict(self, features: Floats, optimism: float = 0.0) -> Floats:
        """The expected values `(n,)` at `features` in the objective's own unit, so many standard deviations above."""
        fit = self.fit
        cross = self._quadratic(features, self.features)
        own = (((_terms(features) - self.middle) / self.spread) ** 2).mean(1)
        if self.process:
            cross = cross * fit.quadratic + _matern(features * fit.stretch, self.features * fit.stretch, fit.length)
            own = own * fit.quadratic + 1.0
        mean = cross @ fit.pull
        if optimism:
            mean = mean + optimism * fit.scale * np.sqrt(np.maximum(own - ((cross @ fit.inverse) * cross).sum(1), 0.0))
        return fit.link.back(mean * fit.unit + fit.center)

    def _linked(self, link: Link, values: Floats) -> "_Fit":
        """The likeliest fit through `link`."""
        z = link.to(values)
        center, unit = float(z.mean()), float(z.std()) or 1.0
        y = (z - center) / unit
        quadratic = self._quadratic(self.features, self.features)
        stretch = self._stretch(quadratic, y)
        stretched = self.features * stretch
        lengths, shares = (LENGTHS, (0.0, 1.0)) if self.process else ((1.0,), (1.0,))
        likeliest, found = -np.inf, None
        for length, share, noise in product(lengths, shares, NOISES):
            kernel = share * quadratic + noise * np.eye(len(y))
            if self.process:
                kernel = kernel + _matern(stretched, stretched, length)
            sign, size = np.linalg.slogdet(kernel)
            inverse = np.asarray(np.linalg.inv(kernel), dtype=np.float64)
            variance = max(float(y @ inverse @ y) / len(y), 1e-12)
            likelihood = -0.5 * (len(y) * np.log(variance) + size)
            if sign > 0 and likelihood > likeliest:
                likeliest, found = likelihood, (length, share, inverse, variance)
        assert found is not None, "the largest noise makes every kernel positive"
        length, share, inverse, variance = found
        missed = np.abs(link.back(z - inverse @ y / np.diag(inverse) * unit) - values)
        return _Fit(
            link=link,
            stretch=stretch,
            length=length,
            quadratic=share,
            inverse=inverse,
            pull=inverse @ y,
            scale=float(np.sqrt(variance)),
            center=center,
            unit=unit,
            error=float((missed**2).mean()),
            median=float(np.median(missed)),
        )

    def _stretch(self, quadratic: Floats, y: Floats) -> Floats:
        """The root mean square slope of a ridge quadratic along each feature, as a part of the greatest."""
        values, vectors = np.linalg.eigh(quadratic)
        turned = vectors.T @ y
        best, weights = np.inf, np.zeros(len(y))
        for ridge in RIDGES:
            inverse = (vectors / (np.maximum(values, 0) + ridge)) @ vectors.T
            pull = (vectors / (np.maximum(values, 0) + ridge)) @ turned
            error = float(((pull / np.diag(inverse)) ** 2).mean())
            if error < best:
                best, weights = error, pull
        terms = (_terms(self.features) - self.middle) / self.spread
        coefficients = terms.T @ weights / self.spread
        k = self.features.shape[1]
        curvature = np.zeros((k, k))
        curvature[np.triu_indices(k)] = coefficients[k:]
        slopes = coefficients[:k] + (2 * self.features - 1) @ (curvature + curvature.T)
        steep = np.sqrt((slopes**2).mean(0))
        return np.maximum(steep / (steep.max() or 1.0), FLATTEST) * 2  # of features in [0, 1]

    def _quadratic(self, here: Floats, there: Floats) -> Floats:
        left, right = ((_terms(f) - self.middle) / self.spread for f in (here, there))
        return left @ right.T / left.shape[1]


@dataclass(frozen=True)
class _Fit:
    link: Link
    stretch: Floats
    length: float
    quadratic: float
    inverse: Floats
    pull: Floats
    scale: float
    center: float
    unit: float
    error: float
    median: float


def _terms(features: Floats) -> Floats:
    """Features, moved to [-1, 1], and all their products of two: a quadratic is linear in them."""
    moved = 2 * features - 1
    first, second = np.triu_indices(moved.shape[1])
    return np.concatenate([moved, moved[:, first] * moved[:, second]], axis=1)


def _matern(here: Floats, there: Floats, length: float) -> Floats:
    square = (here**2).sum(1)[:, None] + (there**2).sum(1) - 2 * here @ there.T
    far = np.sqrt(5 * np.maximum(square, 0.0)) / length
    return (1 + far + far**2 / 3) * np.exp(-far)
