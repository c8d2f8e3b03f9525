"""Episodes of a policy in the environment, many at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from hf_merge.search.layers.env import PathEnv, rounded_scale
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.policy import PathNets, nearest, wolpertinger
from hf_merge.search.layers.rewards import Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """B episodes of at most T decisions. `tokens` and `log_scales` `(B, T)` are what was taken before each decision, from
    the start on, `masks` `(B, T, A)` what was allowed, `choices` `(B, T, C)` what the policy drew, `valid` `(B, T)` where
    there was a decision, and `rewards` `(B,)` what the paths got for the `preferences` `(B, K)`."""

    preferences: Tensor
    tokens: Tensor
    log_scales: Tensor
    masks: Tensor
    choices: Tensor
    valid: Tensor
    rewards: Tensor

    @classmethod
    def empty(cls, nets: PathNets, preferences: Floats) -> "Rollouts":
        """Nothing done yet."""
        count, steps, actions = len(preferences), nets.longest + 1, nets.pool.actions
        width = (nets.points.shape[1] if nets.kind == "wolpertinger" else 1) + nets.scales
        return cls(
            preferences=torch.as_tensor(preferences, dtype=torch.float32),
            tokens=torch.full((count, steps), actions),
            log_scales=torch.zeros(count, steps),
            masks=torch.ones(count, steps, actions, dtype=torch.bool),
            choices=torch.zeros(count, steps, width),
            valid=torch.zeros(count, steps, dtype=torch.bool),
            rewards=torch.zeros(count),
        )


def roll(
    nets: PathNets, ledger: Ledger, preferences: Floats, *, epsilon: float, neighbors: int, rng: torch.Generator
) -> Rollouts:
    """One episode for each of `preferences` `(B, K)`, all at the same step. Raises BudgetSpentError where the ledger does."""
    envs = [PathEnv(nets.pool, ledger.reward, nets.objectives, longest=nets.longest, scales=nets.scales) for _ in preferences]
    for env, preference in zip(envs, preferences, strict=True):
        env.reset(options={"preference": preference})
    done = Rollouts.empty(nets, preferences)
    heads = torch.randint(len(nets.value), (len(envs),), generator=rng)
    actor = critic = None
    for t in range(nets.longest + 1):
        live = [i for i, env in enumerate(envs) if not env.over]
        if not live:
            break
        rows = torch.tensor(live)
        done.valid[rows, t] = True
        done.masks[rows, t] = torch.stack([torch.as_tensor(envs[i].action_mask) for i in live])
        with torch.no_grad():
            latest = done.tokens[:, t : t + 1], done.log_scales[:, t : t + 1]
            actor, critic = nets.actor(*latest, actor)[:, 0], nets.critic(*latest, critic)[:, 0]
            deciding = Deciding(nets, [envs[i] for i in live], ledger, done.preferences[rows], done.masks[rows, t])
            drawn, taken = deciding(actor[rows], critic[rows], heads[rows], epsilon, neighbors, rng)
        done.choices[rows, t] = drawn
        for i, action, log_scale in zip(live, taken.tolist(), drawn[:, -1].tolist(), strict=True):
            done.rewards[i] += envs[i].step((action, log_scale) if nets.scales else action)[1]
            if not envs[i].over:
                done.tokens[i, t + 1] = action
                done.log_scales[i, t + 1] = torch.tensor(rounded_scale(log_scale)).log() if nets.scales else 0.0
    return done


@dataclass(frozen=True, eq=False)
class Deciding:
    """One decision in each of some environments."""

    nets: PathNets
    envs: Sequence[PathEnv]
    ledger: Ledger
    preferences: Tensor
    masks: Tensor

    def __call__(
        self, actor: Tensor, critic: Tensor, heads: Tensor, epsilon: float, neighbors: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the policy draws `(B, C)`, and the actions `(B,)` that this leads to."""
        main, scale = self.nets.distributions(actor, self.preferences, self.masks)
        if isinstance(main, Categorical):
            taken = torch.multinomial(main.probs, 1, generator=rng)[:, 0]
            drawn = taken[:, None].float()
        else:
            drawn = torch.normal(main.mean, main.stddev, generator=rng)
            near, real = nearest(self.nets.points, drawn, self.masks, neighbors)
            worth = self.known(self.nets.ahead(critic, self.preferences, near, heads), near)
            taken = wolpertinger(near, real, worth, epsilon, rng)
        if scale is None:
            return drawn, taken
        return torch.cat([drawn, torch.normal(scale.mean, scale.stddev, generator=rng)[:, None]], 1), taken

    def known(self, worth: Tensor, near: Tensor) -> Tensor:
        """Q̃ with the true reward of a stop where the path was scored before: it needs no guess."""
        for i, j in (near == self.nets.pool.stop).nonzero().tolist():
            if self.envs[i].path in self.ledger.values:
                worth[i, j] = self.ledger.reward(self.envs[i].path, self.envs[i].preference)
        return worth
