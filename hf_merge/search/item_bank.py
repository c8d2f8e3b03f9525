"""An item bank: few rows that tell a candidate's mean outcome on all of them, found from what a study has measured already.

Item response theory with the study's own trials as test takers: P(row i is right for trial t) = σ(a_i · θ_t + b_i). MERGE³
(arXiv:2502.10436) estimates merges so, with item parameters that others fitted to fixed benchmarks (tinyBenchmarks,
arXiv:2402.14992); here no benchmark need be known. The estimate is their p-IRT: rows seen count as they are, rows not seen as
the model predicts them.

An option for tens of rows. On the demo trio, from 30 trials, it errs by 0.031 in accuracy on a 32nd of some 800 rows; the
regression of `racing` errs by 0.051 on as many random rows, and their plain mean by 0.073. On an eighth these are 0.026, 0.019
and 0.039: the model's own error does not shrink with more rows. `benchmarks/racing.py` measures it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from hf_merge.pareto import Floats

Integers = NDArray[np.int64]

DIFFICULTY = 3.0
"""Standard deviation of the prior of b: a row may be right or wrong for nearly every trial. Those of a and θ are 1."""

_STEPS, _ABILITIES = 20, 32  # Newton steps; trials that stand for all when rows are chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemBank:
    """Rows as test items: `slopes` `(rows, d)` (a), `intercepts` `(rows,)` (b); the trials' `abilities` `(trials, d)` (θ)."""

    slopes: Floats
    intercepts: Floats
    abilities: Floats

    @classmethod
    def fit(cls, outcomes: Floats, *, dimensions: int = 2, seed: int = 0) -> "ItemBank":
        """The most probable items and abilities for outcomes `(trials, rows)` between 0 (wrong) and 1 (right).

        Raises `ValueError` for outcomes that are not, or fewer than three trials.
        """
        given = np.asarray(outcomes, dtype=np.float64)
        if given.ndim != 2 or len(given) < 3 or not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"An item bank needs outcomes (3 or more trials, rows) within [0, 1], got {given.shape}.")
        trials, rows = given.shape
        cuts = (rows * dimensions, rows * (dimensions + 1))

        def parts(flat: Floats) -> tuple[Floats, Floats, Floats]:
            slopes, intercepts, abilities = np.split(flat, cuts)
            return slopes.reshape(rows, dimensions), intercepts, abilities.reshape(trials, dimensions)

        def loss(flat: Floats) -> tuple[float, Floats]:
            slopes, intercepts, abilities = parts(flat)
            logits = abilities @ slopes.T + intercepts
            wrong = expit(logits) - given
            value = -(given * log_expit(logits) + (1 - given) * log_expit(-logits)).sum()
            value += ((slopes**2).sum() + (abilities**2).sum() + (intercepts / DIFFICULTY) ** 2 @ np.ones(rows)) / 2
            by_row = wrong.sum(0) + intercepts / DIFFICULTY**2
            return value, np.concatenate([(wrong.T @ abilities + slopes).ravel(), by_row, (wrong @ slopes + abilities).ravel()])

        start = np.random.default_rng(seed).normal(0, 0.3, cuts[1] + trials * dimensions)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
        slopes, intercepts, abilities = parts(found.x)
        return cls(slopes=slopes, intercepts=intercepts, abilities=abilities)

    def probabilities(self, abilities: Floats) -> Floats:
        """How probably each row is right `(…, rows)` at abilities `(…, d)`."""
        found: Floats = expit(abilities @ self.slopes.T + self.intercepts)
        return found

    def choose(self, count: int) -> Integers:
        """The `count` rows that tell most about the mean over all rows, the most telling first.

        Greedy c-optimal design: each next row lowers the variance of the predicted mean the most, averaged over the abilities
        that the trials have.
        """
        abilities = self.abilities[np.linspace(0, len(self.abilities) - 1, min(_ABILITIES, len(self.abilities))).astype(int)]
        right = self.probabilities(abilities)
        weights = right * (1 - right)  # (abilities, rows)
        wanted = weights @ self.slopes / len(self.intercepts)  # d mean / dθ, (abilities, d)
        covariance = np.repeat(np.atleast_2d(np.cov(self.abilities.T))[None], len(abilities), axis=0)
        chosen: list[int] = []
        for _ in range(min(count, len(self.intercepts))):
            spread = covariance @ self.slopes.T  # (abilities, d, rows)
            doubt = 1 + weights * (self.slopes.T[None] * spread).sum(1)
            gains = (weights * (wanted[:, :, None] * spread).sum(1) ** 2 / doubt).mean(0)
            gains[chosen] = -1
            best = int(gains.argmax())
            column = spread[:, :, best]
            covariance -= (weights[:, best] / doubt[:, best])[:, None, None] * column[:, :, None] * column[:, None]
            chosen.append(best)
        return np.array(chosen, dtype=np.int64)

    def ability(self, rows: Integers, outcomes: Floats) -> Floats:
        """The most probable ability `(d,)` of a candidate with these outcomes on these rows; the trials' are its prior."""
        slopes, intercepts = self.slopes[rows], self.intercepts[rows]
        prior = self.abilities.mean(0)
        precision = np.linalg.inv(np.atleast_2d(np.cov(self.abilities.T)) + 1e-3 * np.eye(len(prior)))
        found = prior.copy()
        for _ in range(_STEPS):
            right = expit(slopes @ found + intercepts)
            slope = slopes.T @ (outcomes - right) - precision @ (found - prior)
            step = np.linalg.solve((slopes.T * (right * (1 - right))) @ slopes + precision, slope)
            found += step / max(1.0, float(np.abs(step).max()))  # a Newton step, at most 1 long: far off it overshoots
        return found

    def estimate(self, rows: Integers, outcomes: Floats) -> float:
        """The candidate's mean outcome over all rows: what was seen, and what its ability predicts for the others."""
        right = self.probabilities(self.ability(rows, outcomes))
        right[rows] = outcomes
        return float(right.mean())
