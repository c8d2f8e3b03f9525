"""MM-MO's step: from the points scored so far to the next batch ("It's Morphing Time", arXiv:2407.00487, algorithm 1).

Corrected where the authors' code defeats it: there the outputs are standardized and the reference point is not, so that no
point can dominate it and the acquisition is 0 everywhere. Here both are in the surrogate's units. Everything is in float64.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.monte_carlo import qExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.errors import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor
from torch.quasirandom import SobolEngine

from hf_merge import pareto
from hf_merge.search.samplers.mmmo_encoding import Encoding

log = logging.getLogger(__name__)

# BoTorch would compile a kernel in the home folder at first use: a lock that a killed process left there makes it wait for
# ever, and points would depend on whether the machine has a compiler.
logei._load_attempted = True

Acquisition = Literal["qLogNEHVI", "qEHVI"]
FisherOrder = Literal["low", "high"]

SAME = 1e-6
"""Rows nearer than this are one point."""

APART = 0.02
"""How far apart the rows of a batch are where the pool allows it, per square root of the number of columns: the filter ranks
rows one by one, and near-duplicates could fill a batch."""

MARGIN = 0.1
"""How far below the worst value seen the reference point lies, as a part of the values' range."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of MM-MO. Raises `ValueError` for one that makes no sense.

    `initial` points come from the design (those that were queued count), then batches of `batch`, each chosen from
    `candidates` of the `acquisition` and as many offspring. The acquisition's best `sure` ones are taken; for the rest
    `fisher_order` says which Fisher information is kept: "low", the points that the surrogate knows least about, or "high".
    None takes the acquisition's best alone. (Without sure ones the filter alone would decide, and it knows nothing of what
    is worth evaluating: it prefers the corners of the space.)
    Small batches learn from every other evaluation, where the paper's batches of 5 chosen from 10 wait for five; with many
    workers take a batch for each round of theirs.
    `elites`, `scale` and `crossover` are those of DE/rand/1/bin. `samples`, `restarts`, `raw_samples` and `iterations` are what
    the acquisition and its optimizer may spend.

    `reference` is the point, in the objectives' own units, above which the hypervolume counts. None takes the study's (user
    attribute "reference", values by objective, as searches of this library store it), or else one below all that was seen. It
    matters: the acquisition seeks whatever adds volume above it, however useless.

    `published` follows the authors' code in what is not a mistake: uniform random points at first, the elites by the sum of
    the first two objectives, the offspring alone as the pool, nothing sure, and their reference point, now in the right units.
    """

    initial: int = 10
    candidates: int = 2
    batch: int = 2
    sure: int = 1
    acquisition: Acquisition = "qLogNEHVI"
    fisher_order: FisherOrder | None = "low"
    elites: int = 5
    scale: float = 0.5
    crossover: float = 0.5
    samples: int = 64
    restarts: int = 4
    raw_samples: int = 128
    iterations: int = 100
    reference: tuple[float, ...] | None = None
    published: bool = False

    def __post_init__(self) -> None:
        for name in ("initial", "candidates", "batch", "sure", "elites", "samples", "restarts", "raw_samples", "iterations"):
            least = {"initial": 3, "elites": 3, "sure": 0}.get(name, 1)
            if getattr(self, name) < least:
                raise ValueError(f"MM-MO's {name} is at least {least}, got {getattr(self, name)}.")
        if self.batch > self.candidates:
            raise ValueError(f"MM-MO's batch is chosen from its candidates: got {self.batch} from {self.candidates}.")
        if self.acquisition not in get_args(Acquisition):
            raise ValueError(f"MM-MO's acquisition is one of {', '.join(get_args(Acquisition))}; got {self.acquisition!r}.")
        if self.fisher_order not in (*get_args(FisherOrder), None):
            raise ValueError(f"MM-MO's fisher_order is 'low', 'high' or None, got {self.fisher_order!r}.")


@dataclass(frozen=True)
class Data:
    """What is known: rows `x` `(n, columns)`, values `y` `(n, objectives)`, all maximized, `slack` `(n, constraints)`, where
    above 0 is a violation, and the rows `pending` `(p, columns)` that are being evaluated. `reference` `(objectives,)`, in the
    units of `y`, is what the hypervolume is meant to be above; None leaves it to the values."""

    x: Tensor
    y: Tensor
    slack: Tensor
    pending: Tensor
    reference: Tensor | None = None

    @property
    def feasible(self) -> Tensor:
        """Mask `(n,)` of the rows that violate nothing."""
        return (self.slack <= 0).all(1)


class Surrogate:
    """One Gaussian process for each objective and each constraint, with hyperparameters of its own.

    Objectives are standardized: `z = (y - mean) / std`. Constraints are only scaled, so that 0 stays the limit. A standard
    deviation of 0 counts as 1.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.mean, self.std = data.y.mean(0), _floored(data.y.std(0))
        self.z = self.standardized(data.y)
        self.outcomes = torch.cat([self.z, data.slack / _floored(data.slack.abs().amax(0))], 1)
        self.model = SingleTaskGP(data.x, self.outcomes, outcome_transform=None)
        try:
            fit_gpytorch_mll(ExactMarginalLogLikelihood(self.model.likelihood, self.model))
        except ModelFittingError as error:
            log.debug("The surrogate keeps the hyperparameters of its priors: %s", error)
        self.model.eval()

    def standardized(self, y: Tensor) -> Tensor:
        """Values `(..., objectives)` in the surrogate's units."""
        return (y - self.mean) / self.std

    def predicted(self, x: Tensor) -> Tensor:
        """Posterior means of the objectives `(rows, objectives)`."""
        with torch.no_grad():
            mean: Tensor = self.model.posterior(x).mean
        return mean[:, : self.z.shape[1]]

    def information(self, x: Tensor) -> Tensor:
        """Fisher information `(rows,)`: the sum over the objectives of one over the posterior variance."""
        with torch.no_grad():
            variance = self.model.posterior(x).variance[:, : self.z.shape[1]]
        return (1 / variance.clamp_min(1e-12)).sum(1)


def reference(surrogate: Surrogate, *, published: bool = False) -> Tensor:
    """The hypervolume's reference point `(objectives,)` in the surrogate's units: the data's own, or without one `MARGIN` below
    the worst values seen. As published, the worst values times 0.9 where they are positive and 1.1 where not."""
    data = surrogate.data
    if published:
        return surrogate.standardized(published_reference(data.y))
    if data.reference is not None:
        return surrogate.standardized(data.reference)
    worst = surrogate.z.amin(0)
    return worst - MARGIN * _floored(surrogate.z.amax(0) - worst)


def published_reference(y: Tensor) -> Tensor:
    """The authors' reference point `(objectives,)`, in the units of `y`."""
    worst = y.amin(0)
    return torch.where(worst > 0, 0.9 * worst, 1.1 * worst)


def acquisition(surrogate: Surrogate, settings: Settings, corner: Tensor, seed: int) -> AcquisitionFunction:
    """How much hypervolume above `corner` (surrogate's units) points are expected to add; for a single objective, how much
    improvement. The logarithm of it, but for "qEHVI"."""
    data, m, model = surrogate.data, surrogate.z.shape[1], surrogate.model
    sampler = SobolQMCNormalSampler(torch.Size([settings.samples]), seed=seed)
    limits = [_outcome(i) for i in range(m, surrogate.outcomes.shape[1])] or None
    seen = torch.cat([data.x, data.pending])  # noisy acquisitions know a row that is being evaluated by its posterior
    if m == 1:
        first = GenericMCObjective(_first)
        return qLogNoisyExpectedImprovement(model, seen, sampler=sampler, objective=first, constraints=limits)
    objectives = IdentityMCMultiOutputObjective(outcomes=list(range(m)))
    if settings.acquisition == "qLogNEHVI":
        return qLogNoisyExpectedHypervolumeImprovement(
            model, corner, seen, sampler=sampler, objective=objectives, constraints=limits, prune_baseline=True
        )
    # As if what is being evaluated came out as predicted: the time for pending rows grows with two to their number.
    values = torch.cat([surrogate.z[data.feasible], surrogate.predicted(data.pending)])
    boxes: Any = FastNondominatedPartitioning(corner, values)  # BoTorch asks for its slower sibling by type
    return qExpectedHypervolumeImprovement(model, corner, boxes, sampler=sampler, objective=objectives, constraints=limits)


def propose(data: Data, encoding: Encoding, settings: Settings, seed: int) -> Tensor:
    """The next batch, rows `(settings.batch, columns)` of the space, for at least three rows of data.

    The same arguments give the same batch; torch's global generator is left as it was.
    """
    with manual_seed(seed), torch.enable_grad():
        surrogate = Surrogate(data)
        corner = reference(surrogate, published=settings.published)
        candidates, _ = optimize_acqf(
            acquisition(surrogate, settings, corner, seed),
            torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, encoding.width),
            q=settings.candidates,
            num_restarts=settings.restarts,
            raw_samples=settings.raw_samples,
            options={"maxiter": settings.iterations, "batch_limit": 4, "init_batch_limit": 16},  # the limits are for memory
            post_processing_func=encoding.snap,
            sequential=True,
        )
        children = encoding.snap(offspring(candidates, elites(data, settings), encoding.owner, settings))
        known = torch.cat([data.x, data.pending])
        pool = distinct(children if settings.published else torch.cat([candidates, children]), known)
        if len(pool) < settings.batch:
            spare = encoding.snap(design(seed, 4 * settings.batch, encoding.width))
            pool = torch.cat([pool, distinct(spare, torch.cat([known, pool]))[: settings.batch - len(pool)]])
        order = list(range(len(pool)))
        if settings.fisher_order is not None:
            ranked = surrogate.information(pool).argsort(descending=settings.fisher_order == "high").tolist()
            order = list(dict.fromkeys(order[: settings.sure] + ranked))
        return spread(pool[order], settings.batch)


def design(seed: int, rows: int, columns: int, start: int = 0) -> Tensor:
    """Rows `(rows, columns)` of a scrambled Sobol sequence from its place `start` on."""
    return SobolEngine(columns, scramble=True, seed=seed).fast_forward(start).draw(rows, dtype=torch.float64)


def elites(data: Data, settings: Settings) -> Tensor:
    """The best rows `(settings.elites or fewer, columns)`: front after front, in each the largest contributions to the
    hypervolume first, and rows that violate a constraint last. As published: the largest sums of the first two objectives."""
    y = data.y.numpy()
    if settings.published:
        order = np.argsort(-y[:, :2].sum(1), kind="stable")
        return data.x[torch.from_numpy(order[: settings.elites].copy())]
    best: list[int] = []
    for group in (data.feasible.numpy(), ~data.feasible.numpy()):
        left = np.flatnonzero(group)
        while len(left) and len(best) < settings.elites:
            front = left[pareto.non_dominated(y[left])]
            share = pareto.normalized(y[front])
            best += front[np.argsort(-pareto.contributions(share, np.full(y.shape[1], -MARGIN)), kind="stable")].tolist()
            left = np.setdiff1d(left, front)
    return data.x[best[: settings.elites]]


def offspring(weak: Tensor, strong: Tensor, owner: Tensor, settings: Settings) -> Tensor:
    """Each row of `weak` `(n, columns)` crossed with a mutant `clip(a + scale * (b - c))` of three different rows of `strong`
    (DE/rand/1/bin): every parameter is the mutant's with probability `crossover`, and at least one is."""
    children = []
    for row in weak:
        a, b, c = strong[torch.randperm(len(strong))[:3]]
        # The trifle decides at random between the two choices of a parameter that are on a par in a mutant.
        mutant = (a + settings.scale * (b - c) + 1e-9 * torch.rand_like(a)).clamp(0, 1)
        taken = torch.rand(int(owner.max()) + 1) < settings.crossover
        taken[torch.randint(len(taken), (1,))] |= ~taken.any()
        children.append(torch.where(taken[owner], mutant, row))
    return torch.stack(children)


def distinct(rows: Tensor, known: Tensor) -> Tensor:
    """The `rows` that differ from those `known` and from each other."""
    kept: list[Tensor] = []
    for row in rows:
        if _distance(row, torch.stack([*known, *kept])) > SAME:
            kept.append(row)
    return torch.stack(kept) if kept else rows[:0]


def spread(ranked: Tensor, size: int) -> Tensor:
    """The first `size` of the `ranked` rows that keep their distance from those before; the others only to fill up."""
    chosen: list[int] = []
    for i, row in enumerate(ranked):
        if not chosen or _distance(row, ranked[chosen]) > APART * ranked.shape[1] ** 0.5:
            chosen.append(i)
    others = [i for i in range(len(ranked)) if i not in chosen]
    return ranked[(chosen + others)[:size]]


def _distance(row: Tensor, others: Tensor) -> float:
    return float((others - row).norm(dim=1).min())


def _floored(std: Tensor) -> Tensor:
    return torch.where(std > 1e-12, std, 1.0)


def _outcome(place: int) -> Callable[[Tensor], Tensor]:
    return lambda samples: samples[..., place]


def _first(samples: Tensor, X: Tensor | None = None) -> Tensor:
    return samples[..., 0]
