"""The search of HM3 in architecture space: networks trained once over many preferences, then refined for any other."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hf_merge.errors import RecipeError, unknown
from hf_merge.recipes.path import Path
from hf_merge.search.layers.edits import edited
from hf_merge.search.layers.imitation import imitate
from hf_merge.search.layers.ledger import BudgetSpentError, Ledger, Score
from hf_merge.search.layers.memory import Memory
from hf_merge.search.layers.policy import PathNets, PolicyKind
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.ppo import PPO, Batch, Inputs, gae, update
from hf_merge.search.layers.rewards import Floats, Scalarization, checked, spread
from hf_merge.search.layers.rollouts import Rollouts, roll

RewardKind = Literal["terminal", "spread"]
OnPath = Callable[[Path, Floats], None]
BROADEST, NARROWEST = 0.5, 0.02
"""Bounds of ε."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How paths are searched; the defaults are for pools of tens to hundreds of blocks.

    `longest` is T_max (1.5 times the deepest model if None), `length_cost` β (0.1 / the deepest model's layers if None).
    `reward` is all of it at the end ("terminal") or R/T at each step ("spread", the paper's, whose γ is 0.99).
    `neighbors` is how many actions around a proto-action are compared (the larger of 8 and a tenth of all if None). A new
    search begins with the nearest alone, close to the models as they are, and takes in one more after every `widening` batches
    (0: all at once): a critic that has seen little would choose among many at random.
    ε begins as `epsilon` and grows or shrinks by a tenth after each batch, so that a share `fresh` of the paths is new: the
    paper's fixed ε for each decision grows into random paths where they are long, and starves a search that has settled.
    A share `edits` of the episodes are not the policy's: the best paths known for a preference with one block changed. They
    are for the critic alone, never for PPO.
    `share` of the scored paths teaches each of the critic's `heads`; `remembered` of them come with each step of PPO.
    """

    kind: PolicyKind = "wolpertinger"
    scales: bool = False
    longest: int | None = None
    length_cost: float | None = None
    scalarization: Scalarization = "linear"
    reward: RewardKind = "terminal"
    gamma: float = 1.0
    smoothing: float = 0.95
    neighbors: int | None = None
    widening: int = 2
    epsilon: float = 0.1
    fresh: float = 0.4
    edits: float = 0.25
    batch: int = 32
    actor_rate: float = 1e-3
    critic_rate: float = 3e-3
    ppo: PPO = field(default_factory=PPO)
    imitation: int = 100
    heads: int = 4
    share: float = 0.7
    remembered: int = 192
    hidden: int = 64

    def __post_init__(self) -> None:
        for name, kind in (("kind", PolicyKind), ("scalarization", Scalarization), ("reward", RewardKind)):
            if (given := getattr(self, name)) not in get_args(kind):
                raise RecipeError(unknown(f"{name} of a path search", given, get_args(kind)))
        for name in ("longest", "neighbors", "batch", "heads", "remembered", "hidden"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise RecipeError(f"{name} is a whole number of at least 1, got {given}.")

    def reach(self, pool: Pool) -> int:
        """T_max for this pool."""
        return self.longest or -(-3 * max(pool.depths.values()) // 2)

    def cost(self, pool: Pool) -> float:
        """β for this pool."""
        return 0.1 / max(pool.depths.values()) if self.length_cost is None else self.length_cost


@dataclass(frozen=True, eq=False)
class PathSearch:
    """What a search has found: the paths and their objectives in `ledger`, and the trained `nets`."""

    nets: PathNets
    ledger: Ledger

    def best(self, preference: ArrayLike) -> Path:
        """The best scored path for a preference."""
        return self.ledger.best(checked(preference)[0])


def search_paths(
    score: Score,
    pool: Pool,
    preferences: ArrayLike,
    *,
    episodes: int,
    seed: int,
    evaluations: int | None = None,
    settings: Settings | None = None,
    on_path: OnPath | None = None,
) -> PathSearch:
    """Trains policy and critic over `preferences` `(N, K)` (HM3's offline phase); scores the identity paths first.

    Ends after `episodes` paths or `evaluations` distinct ones. The same seed asks for the same paths in the same order: a
    search that was killed goes on by being run again with a `score` that remembers.
    """
    chosen, wanted = settings or Settings(), checked(preferences)
    ledger = _ledger(score, pool, chosen, evaluations, {}, on_path)
    longest = chosen.reach(pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"kind": chosen.kind, "scales": chosen.scales, "heads": chosen.heads, "hidden": chosen.hidden}
        nets = PathNets(pool, wanted.shape[1], longest=longest, **shape)  # type: ignore[arg-type]
    trainer = Trainer(nets, ledger, chosen, seed)
    try:
        own = pool.identities(longest)
        for path in own:
            if len(ledger(path)) != wanted.shape[1]:
                raise RecipeError(f"Preferences have {wanted.shape[1]} weights, but paths have {len(ledger(path))} objectives.")
        rewards = np.array([[ledger.reward(path, preference) for preference in wanted] for path in own])
        if own and chosen.widening:
            trainer.widened = 1
        imitate(nets, own, wanted, rewards, steps=chosen.imitation, rng=trainer.rng)
        trainer.train(wanted, episodes)
    except BudgetSpentError:
        pass
    return PathSearch(nets, ledger)


def refine(
    nets: PathNets,
    score: Score,
    preference: ArrayLike,
    *,
    episodes: int,
    seed: int,
    evaluations: int | None = None,
    settings: Settings | None = None,
    known: Mapping[Path, Floats] | None = None,
    on_path: OnPath | None = None,
) -> PathSearch:
    """Goes on from trained `nets` (which stay as they are) for one preference (HM3's online phase).

    `known` paths, as from the first search's `ledger.values`, cost no evaluation and are learned from.
    """
    chosen = settings or Settings()
    ledger = _ledger(score, nets.pool, chosen, evaluations, known or {}, on_path)
    trainer = Trainer(deepcopy(nets), ledger, chosen, seed)
    with suppress(BudgetSpentError):
        trainer.train(checked(preference), episodes)
    return PathSearch(trainer.nets, ledger)


def _ledger(
    score: Score, pool: Pool, chosen: Settings, limit: int | None, known: Mapping[Path, Floats], on_path: OnPath | None
) -> Ledger:
    cost = chosen.cost(pool)
    return Ledger(score, limit=limit, length_cost=cost, scalarization=chosen.scalarization, known=known, on_path=on_path)


class Trainer:
    """PPO on the paths of a ledger. All that is random comes from `seed`."""

    def __init__(self, nets: PathNets, ledger: Ledger, settings: Settings, seed: int) -> None:
        self.nets, self.ledger, self.settings = nets, ledger, settings
        self.rng, self.draws = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        groups = [{"params": nets.policy(), "lr": settings.actor_rate}, {"params": nets.critics(), "lr": settings.critic_rate}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
        self.neighbors = settings.neighbors or max(8, nets.pool.actions // 10)
        self.widened = self.neighbors
        self.epsilon = settings.epsilon
        self.memory = Memory(
            nets.pool, ledger, longest=nets.longest, heads=len(nets.value), share=settings.share, rng=self.draws
        )

    def train(self, preferences: Floats, episodes: int) -> None:
        """So many episodes, each for one of `preferences` `(N, K)`. Raises BudgetSpentError where the ledger does."""
        chosen, nets, ledger = self.settings, self.nets, self.ledger
        for batch, done in enumerate(range(0, episodes, chosen.batch)):
            rows = self.draws.integers(len(preferences), size=min(chosen.batch, episodes - done))
            edits = int(chosen.edits * len(rows))
            for row in preferences[rows[:edits]]:
                path = edited(nets.pool, ledger, row, longest=nets.longest, scales=nets.scales, rng=self.draws)
                if path is not None:
                    ledger(path)
            before = ledger.evaluations
            wanted = preferences[rows[edits:]]
            rollouts = roll(nets, ledger, wanted, epsilon=self.epsilon, neighbors=self.widened, rng=self.rng)
            fresh = (ledger.evaluations - before) / len(wanted)
            self.epsilon = min(BROADEST, max(NARROWEST, self.epsilon * (1.1 if fresh < chosen.fresh else 1 / 1.1)))
            if chosen.widening and batch % chosen.widening == chosen.widening - 1:
                self.widened = min(self.neighbors, self.widened + 1)
            data = self.batch(rollouts)
            update(self.evaluate, self.optimizer, data, chosen.ppo, self.rng, lambda: self.lesson(preferences))

    def batch(self, done: Rollouts) -> Batch:
        """Episodes with their advantages and returns."""
        chosen, valid = self.settings, done.valid
        inputs = {"preferences": done.preferences, "tokens": done.tokens, "log_scales": done.log_scales, "masks": done.masks}
        with torch.no_grad():
            log_probs, _, values = self.evaluate(inputs, done.choices)
        values = values * valid
        rewards = torch.zeros(values.shape)
        for i, (total, steps) in enumerate(zip(done.rewards.tolist(), valid.sum(1).tolist(), strict=True)):
            rewards[i, :steps] = torch.tensor(
                spread(total, steps) if chosen.reward == "spread" else [0.0] * (steps - 1) + [total]
            )
        going_on = torch.cat([valid[:, 1:], torch.zeros(len(valid), 1, dtype=torch.bool)], 1).float()
        nothing = torch.zeros(len(valid))
        advantages = gae(
            rewards.T, values.T, going_on.T, nothing, gamma=chosen.gamma, smoothing=chosen.smoothing
        ).T.contiguous()
        return Batch(
            inputs=inputs,
            actions=done.choices,
            log_probs=log_probs,
            advantages=advantages,
            returns=advantages + values,
            valid=valid,
        )

    def evaluate(self, inputs: Inputs, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities, entropies and values `(B, T)` of what was drawn."""
        nets, before = self.nets, (inputs["tokens"], inputs["log_scales"])
        wanted = inputs["preferences"][:, None].expand(-1, before[0].shape[1], -1)
        log_probs, entropies = nets.log_probs(nets.actor(*before), wanted, inputs["masks"], choices)
        return log_probs, entropies, nets.opinions(nets.critic(*before), wanted).mean(-1)

    def lesson(self, preferences: Floats) -> Tensor:
        """The critic's squared error about scored paths: for some of the preferences and two new ones."""
        new = self.draws.dirichlet(np.ones(preferences.shape[1]), 2)
        some = preferences[self.draws.integers(len(preferences), size=6)]
        lessons = self.memory.lessons(self.settings.remembered, np.concatenate([some, new]))
        if lessons is None:
            return torch.zeros(())
        wanted = lessons.preferences[:, None].expand(-1, lessons.tokens.shape[1], -1)
        opinions = self.nets.opinions(self.nets.critic(lessons.tokens, lessons.log_scales), wanted)
        taught = (lessons.inside[..., None] & lessons.votes[:, None]).float()
        return ((opinions - lessons.targets[..., None]).square() * taught).sum() / taught.sum().clamp_min(1.0)
