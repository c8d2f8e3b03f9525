"""The networks: what has been taken so far and the preference go in; what to take next, and what it is worth, come out."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from hf_merge.search.layers.pool import Pool

PolicyKind = Literal["wolpertinger", "categorical"]
EMBEDDING = 32
NARROWEST, BROADEST = -2.5, 0.0
"""Bounds of the log standard deviation of a proto-action; neighboring actions are about 1 apart."""
SCALE_SPREAD = -2.0
"""The log standard deviation of the log scale at the start: a factor of about 1.14."""


def action_points(pool: Pool) -> Tensor:
    """Where each action lies `(actions, models + 2)`, so that distance means something: model as one-hot, layer, stop.

    One layer further and another model are both 1 away (the one-hot has √½ in place of 1). The stop lies behind the deepest
    layer, 1 away in a coordinate of its own, and between the models.
    """
    models, deepest = list(pool.models), max(pool.depths.values())
    points = torch.zeros(pool.actions, len(models) + 2)
    for i, block in enumerate(pool.blocks):
        points[i, models.index(block.model)] = 0.5**0.5
        points[i, -2] = block.layer
    points[-1, : len(models)] = 0.5**0.5 / len(models)
    points[-1, -2:] = torch.tensor([float(deepest), 1.0])
    return points


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of tanh; orthogonal weights, those of the last layer with this gain."""
    sizes, gains = (inputs, hidden, hidden, outputs), (2**0.5, 2**0.5, gain)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer, own in zip(layers, gains, strict=True):
        nn.init.orthogonal_(layer.weight, own)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Encoder(nn.Module):
    """A GRU over the blocks taken: each is the sum of embeddings of its model, its layer, its statistics and its scale.

    Tokens are actions; `pool.actions` is the start.
    """

    blocks: Tensor
    statistics: Tensor

    def __init__(self, pool: Pool, hidden: int) -> None:
        super().__init__()
        models, deepest = list(pool.models), max(pool.depths.values())
        ends = [(len(models), deepest), (len(models) + 1, deepest)]
        self.register_buffer("blocks", torch.tensor([(models.index(b.model), b.layer) for b in pool.blocks] + ends))
        known = torch.as_tensor(pool.statistics, dtype=torch.float32)
        known = (known - known.mean(0)) / known.std(0, correction=0).clamp_min(1e-6)
        self.register_buffer("statistics", torch.cat([known, torch.zeros(2, known.shape[1])]))
        self.model, self.layer = nn.Embedding(len(models) + 2, EMBEDDING), nn.Embedding(deepest + 1, EMBEDDING)
        self.fact, self.scale = nn.Linear(known.shape[1], EMBEDDING, bias=False), nn.Linear(1, EMBEDDING, bias=False)
        self.gru = nn.GRU(EMBEDDING, hidden, batch_first=True)

    def forward(self, tokens: Tensor, log_scales: Tensor, before: Tensor | None = None) -> Tensor:
        """`tokens` and `log_scales` `(B, T)`, after the state `before` `(B, H)` -> the states after each `(B, T, H)`."""
        models, layers = self.blocks[tokens].unbind(-1)
        x = self.model(models) + self.layer(layers) + self.fact(self.statistics[tokens]) + self.scale(log_scales[..., None])
        states: Tensor = self.gru(x, None if before is None else before[None].contiguous())[0]
        return states


class PathNets(nn.Module):
    """Policy and critic, each with an encoder of its own; both see the preference `(…, objectives)`.

    `kind` "wolpertinger": a Gaussian proto-action in the space of `action_points`, exchanged for a real action by
    `wolpertinger` (HM3; arXiv 1512.07679). "categorical": a masked softmax over the actions. With `scales`, one more Gaussian
    for the log of the next block's scale. The critic has several `heads`, whose disagreement is what an episode explores by
    following one of them (bootstrapped value functions, arXiv 1602.04621); V is their mean.
    """

    points: Tensor

    def __init__(
        self,
        pool: Pool,
        objectives: int,
        *,
        longest: int,
        kind: PolicyKind = "wolpertinger",
        scales: bool = False,
        heads: int = 4,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.pool, self.longest, self.kind, self.scales, self.objectives = pool, longest, kind, scales, objectives
        self.register_buffer("points", action_points(pool))
        outputs = 2 * self.points.shape[1] if kind == "wolpertinger" else pool.actions
        self.actor, self.critic = Encoder(pool, hidden), Encoder(pool, hidden)
        self.choose = mlp(hidden + objectives, hidden, outputs + scales, 0.01)
        self.value = nn.ModuleList(mlp(hidden + objectives, hidden, 1, 1.0) for _ in range(heads))
        self.scale_spread = nn.Parameter(torch.tensor(SCALE_SPREAD))

    @property
    def shape(self) -> dict[str, object]:
        """What a net of the same shape is made with, beside the pool."""
        hidden = self.actor.gru.hidden_size
        own = {"objectives": self.objectives, "longest": self.longest, "kind": self.kind, "scales": self.scales}
        return {**own, "heads": len(self.value), "hidden": hidden}

    def policy(self) -> list[nn.Parameter]:
        """The policy's parameters."""
        return [*self.actor.parameters(), *self.choose.parameters(), self.scale_spread]

    def critics(self) -> list[nn.Parameter]:
        """The critic's parameters."""
        return [*self.critic.parameters(), *self.value.parameters()]

    def distributions(self, states: Tensor, preferences: Tensor, masks: Tensor) -> tuple[Normal | Categorical, Normal | None]:
        """What comes next, for the actor's states `(…, H)`: the proto-action or the action, and the log scale."""
        out = self.choose(torch.cat([states, preferences], -1))
        scale = Normal(out[..., -1], self.scale_spread.exp()) if self.scales else None
        out = out[..., :-1] if self.scales else out
        if self.kind == "categorical":
            return Categorical(logits=out.masked_fill(~masks, -1e9), validate_args=False), scale
        mean, width = out.chunk(2, -1)
        mean = self.points.mean(0) + self.points.std(0, correction=0) * mean
        middle, reach = (NARROWEST + BROADEST) / 2, (BROADEST - NARROWEST) / 2
        return Normal(mean, (middle + reach * torch.tanh(width)).exp(), validate_args=False), scale

    def log_probs(self, states: Tensor, preferences: Tensor, masks: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities and entropies `(…)` of `choices` `(…, C)`: the proto-action or action, then the log scale."""
        main, scale = self.distributions(states, preferences, masks)
        if isinstance(main, Categorical):
            log_prob, entropy = main.log_prob(choices[..., 0]), main.entropy()
        else:
            size = self.points.shape[1]
            log_prob, entropy = main.log_prob(choices[..., :size]).sum(-1), main.entropy().sum(-1)
        if scale is not None:
            log_prob, entropy = log_prob + scale.log_prob(choices[..., -1]), entropy + scale.entropy()
        return log_prob, entropy

    def opinions(self, states: Tensor, preferences: Tensor) -> Tensor:
        """V of the critic's states `(…, H)` by each head `(…, heads)`. Behind a stop: what the path will be rewarded with."""
        seen = torch.cat([states, preferences], -1)
        return torch.cat([head(seen) for head in self.value], -1)

    def ahead(self, states: Tensor, preferences: Tensor, actions: Tensor, heads: Tensor) -> Tensor:
        """Q̃ `(B, N)` of `actions` `(B, N)` in the critic's states `(B, H)`: V one step later, by one of the `heads` `(B,)`."""
        count = actions.shape[1]
        later = self.critic(actions.reshape(-1, 1), torch.zeros(actions.numel(), 1), states.repeat_interleave(count, 0))[:, 0]
        opinions = self.opinions(later, preferences.repeat_interleave(count, 0))
        return opinions.gather(1, heads.repeat_interleave(count)[:, None]).reshape(actions.shape)


def nearest(points: Tensor, protos: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` allowed actions nearest to each proto-action `(B, count)`, nearest first, and which of them are real (fewer
    may be allowed). `points` `(A, D)`, `protos` `(B, D)`, `masks` `(B, A)`."""
    distances = torch.cdist(protos, points).masked_fill(~masks, torch.inf)
    found = distances.topk(min(count, len(points)), largest=False)
    return found.indices, found.values.isfinite()


def wolpertinger(actions: Tensor, real: Tensor, worth: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Of each row of `actions` `(B, N)` the one that is worth most, or with probability `epsilon` any of the `real` ones."""
    best = worth.masked_fill(~real, -torch.inf).argmax(1)
    any_of = torch.multinomial(real.float(), 1, generator=rng)[:, 0]
    explores = torch.rand(len(actions), generator=rng) < epsilon
    return actions.gather(1, torch.where(explores, any_of, best)[:, None])[:, 0]
