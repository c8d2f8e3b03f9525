"""Models of objectives over a search space: a quadratic and a Gaussian process for what it leaves.

The quadratic and its links are MAP's (arXiv:2406.07529). What a quadratic cannot follow (a kink, a method's own densities) is
left to a Matérn-5/2 process whose coordinates are stretched by the quadratic's slope along each. Both are one process with the
sum of their kernels, and its few numbers are those of a small grid that make the data most likely.

Where an answer is one of several it is not the share of right ones that is modeled but each row's margin, by how much the right
one leads: that changes smoothly with a merge's numbers, and hundreds of rows say how. Of uniform merges of the demo trio
(256 rows, the better half of them) the smoothed share is then predicted with a median error of 0.019 from 20 trials and 0.015
from 40; from the shares themselves, of 0.030 and 0.020 (`benchmarks/smoothing.py`).
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np

from hf_merge.pareto import Floats
from hf_merge.scores import smoothed

EDGE = 1e-3
"""How near to the ends of its range a link takes a value at its word."""

LENGTHS = (0.7, 1.5, 3.0, 6.0)
"""Length scales; the steepest of the coordinates, which go from -1 to 1, keeps its own scale."""

NOISES = (1e-6, 1e-3, 1e-1)
"""Variances of the noise, where the quadratic and the process have 1."""

RIDGES = tuple(10.0 ** np.arange(-4, 4))

FLATTEST = 0.1
"""The least stretch: what looks flat to a quadratic may not be."""


class Process:
    """Gaussian processes over `features` `(n, k)` in [0, 1], one for each column of `outputs` `(n, r)`, with one kernel.

    Without `matern` they are quadratics alone.
    """

    def __init__(self, features: Floats, outputs: Floats, *, matern: bool = True) -> None:
        self.features, self.outputs, self.matern = features, outputs, matern
        terms = _terms(features)
        self.middle, self.spread = terms.mean(0), terms.std(0) + 1e-9
        self.center = outputs.mean(0)
        left = outputs - self.center
        unit = float(np.sqrt((left**2).mean())) or 1.0
        quadratic = self._quadratic(features, features)
        gram = left @ left.T / (unit**2 * left.shape[1])
        self.stretch = self._stretch(quadratic, gram)
        stretched = features * self.stretch
        lengths, shares = (LENGTHS, (0.0, 1.0)) if matern else ((1.0,), (1.0,))
        likeliest, n = -np.inf, len(features)
        for length, share in product(lengths, shares):
            kernel = share * quadratic + (_matern(stretched, stretched, length) if matern else 0.0)
            values, vectors = np.linalg.eigh(kernel)
            turned = ((vectors.T @ gram) * vectors.T).sum(1)
            for noise in NOISES:
                noisy = np.maximum(values, 0) + noise
                variance = max(float((turned / noisy).sum()) / n, 1e-12)
                likelihood = -0.5 * (n * np.log(variance) + np.log(noisy).sum())
                if likelihood > likeliest:
                    likeliest, self.length, self.share, self.noise = likelihood, length, share, noise
                    self.scale, self.inverse = float(np.sqrt(variance)) * unit, (vectors / noisy) @ vectors.T
        self.pull = self.inverse @ left

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """At `features` `(m, k)` the expected outputs `(m, r)`, and any one's standard deviation `(m,)`, noise apart."""
        cross = self._quadratic(features, self.features)
        own = (((_terms(features) - self.middle) / self.spread) ** 2).mean(1)
        if self.matern:
            cross = cross * self.share + _matern(features * self.stretch, self.features * self.stretch, self.length)
            own = own * self.share + 1.0
        left = np.maximum(own - ((cross @ self.inverse) * cross).sum(1), 0.0)
        return self.center + cross @ self.pull, self.scale * np.sqrt(left)

    def left_out(self) -> tuple[Floats, Floats]:
        """What all others say of each of the outputs `(n, r)`, and the standard deviation `(n,)` of that, noise included."""
        kept = np.diag(self.inverse)
        return self.outputs - self.pull / kept[:, None], self.scale / np.sqrt(kept)

    def _stretch(self, quadratic: Floats, gram: Floats) -> Floats:
        """The root mean square slope of ridge quadratics along each feature, as a part of the greatest. Slopes and errors are
        summed over the outputs, so `n` rotations of them, which their products of two `gram` `(n, n)` give, stand for all."""
        sizes, axes = np.linalg.eigh(gram)
        y = axes * np.sqrt(np.maximum(sizes, 0))
        values, vectors = np.linalg.eigh(quadratic)
        turned = vectors.T @ y
        best, weights = np.inf, np.zeros_like(y)
        for ridge in RIDGES:
            inverse = (vectors / (np.maximum(values, 0) + ridge)) @ vectors.T
            pull = (vectors / (np.maximum(values, 0) + ridge)) @ turned
            error = float(((pull / np.diag(inverse)[:, None]) ** 2).mean())
            if error < best:
                best, weights = error, pull
        terms = (_terms(self.features) - self.middle) / self.spread
        coefficients = terms.T @ weights / self.spread[:, None]
        k = self.features.shape[1]
        curvature = np.zeros((k, k, y.shape[1]))
        curvature[np.triu_indices(k)] = coefficients[k:]
        both = curvature + curvature.transpose(1, 0, 2)
        slopes = coefficients[:k] + np.tensordot(2 * self.features - 1, both, 1)
        steep = np.sqrt((slopes**2).mean((0, 2)))
        return np.maximum(steep / (steep.max() or 1.0), FLATTEST) * 2  # of features in [0, 1]

    def _quadratic(self, here: Floats, there: Floats) -> Floats:
        left, right = ((_terms(f) - self.middle) / self.spread for f in (here, there))
        return left @ right.T / left.shape[1]


class Link(NamedTuple):
    """A map of an objective's values to the real line and back, and which values it takes."""

    takes: Callable[[Floats], bool]
    to: Callable[[Floats], Floats]
    back: Callable[[Floats], Floats]


def _logit(values: Floats) -> Floats:
    inside = np.clip(values, EDGE, 1 - EDGE)
    return np.log(inside / (1 - inside))


def _softplus_inverse(values: Floats) -> Floats:
    # From 30 on it is the value itself to thirteen digits, and the exponential of a size or a distance has no double.
    return np.where(values > 30, values, np.log(np.expm1(np.clip(values, EDGE, 30))))


LINKS = (
    Link(lambda v: True, lambda v: v, lambda z: z),
    Link(lambda v: bool(v.min() >= 0 and v.max() <= 1), _logit, lambda z: 1 / (1 + np.exp(-z))),
    Link(lambda v: bool(v.min() >= 0), _softplus_inverse, lambda z: np.logaddexp(0, z)),
)
"""None; the sigmoid, for accuracies; the softplus, for losses."""


class Surrogate:
    """A model of `values` `(n,)` at `features` `(n, k)` in [0, 1], through the link that predicts each value best from all the
    others. Without `process` it is the quadratic alone.

    `error` is the median error of these predictions, in the objective's unit.
    """

    def __init__(self, features: Floats, values: Floats, *, process: bool = True) -> None:
        self.values, least = values, np.inf
        for link in LINKS:
            if not link.takes(values):
                continue
            fit = Process(features, link.to(values)[:, None], matern=process)
            missed = np.abs(link.back(fit.left_out()[0][:, 0]) - values)
            if (missed**2).mean() < least:
                least, self.link, self.fit, self.error = (missed**2).mean(), link, fit, float(np.median(missed))

    def predict(self, features: Floats, optimism: float = 0.0) -> Floats:
        """The expected values `(n,)` at `features` in the objective's own unit, so many standard deviations above."""
        expected, deviations = self.fit.predict(features)
        return self.link.back(expected[:, 0] + optimism * deviations)


class MarginSurrogate:
    """A model of `values` `(n,)` at `features` `(n, k)`, by the `margins` `(n, rows)` of the answers behind them.

    Values are taken to follow the smoothed share of right rows (`hf_merge.scores.smoothed`) in a straight line, as accuracies
    and error rates do, and what is off that line to be chance: a search that follows it finds merges that are good at these
    rows alone. `follows` says how much of the values' variance the line explains.

    `values` are those on the line; `error` is the median error of predicting each from all the others.
    """

    def __init__(self, features: Floats, margins: Floats, values: Floats) -> None:
        # A margin far from 0 says no more than that its row is right or wrong.
        self.unit = float(np.median(np.abs(margins))) or 1.0
        self.fit = Process(features, np.arcsinh(margins / self.unit))
        shares = smoothed(margins).mean(1)
        left = shares - shares.mean()
        self.slope = float(left @ values / max(left @ left, 1e-12))
        self.start = float(values.mean() - self.slope * shares.mean())
        self.values = self._valued(shares)
        self.follows = 1 - float(((values - self.values) ** 2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-12))
        found, deviations = self.fit.left_out()
        missed = np.abs(self._valued(self._shares(found)) - self.values)
        self.error = float(np.median(missed))
        self.doubt = float(np.median(missed / deviations))

    def predict(self, features: Floats, optimism: float = 0.0) -> Floats:
        """The expected values `(n,)` at `features` in the objective's own unit, so many standard deviations above."""
        expected, deviations = self.fit.predict(features)
        return self._valued(self._shares(expected)) + optimism * self.doubt * deviations

    def _shares(self, found: Floats) -> Floats:
        return np.asarray(smoothed(np.sinh(found) * self.unit).mean(1), dtype=np.float64)

    def _valued(self, shares: Floats) -> Floats:
        return self.start + self.slope * shares


def _terms(features: Floats) -> Floats:
    """Features, moved to [-1, 1], and all their products of two: a quadratic is linear in them."""
    moved = 2 * features - 1
    first, second = np.triu_indices(moved.shape[1])
    return np.concatenate([moved, moved[:, first] * moved[:, second]], axis=1)


def _matern(here: Floats, there: Floats, length: float) -> Floats:
    square = (here**2).sum(1)[:, None] + (there**2).sum(1) - 2 * here @ there.T
    far = np.sqrt(5 * np.maximum(square, 0.0)) / length
    return (1 + far + far**2 / 3) * np.exp(-far)
