"""The start of a search: networks that follow the models as they are."""

from collections.abc import Sequence
from math import log
from statistics import NormalDist

import torch
from torch import Tensor
from torch.distributions import Categorical

from hf_merge.recipes.path import Path
from hf_merge.search.layers.memory import tokens_of
from hf_merge.search.layers.policy import PathNets, PolicyKind
from hf_merge.search.layers.rewards import Floats

DEVIATIONS = 1.5
"""How many blocks of a path are other ones than the imitated, about, when the search begins."""


def nearness(kind: PolicyKind, steps: int) -> float:
    """How far around the next layer the policy begins to look in paths of so many steps, in units of `action_points`.

    A layer or a model more is 1 away and about four actions are that near: DEVIATIONS times in a path, a proto-action passes
    the middle to one of them, or a softmax over minus the squared distance picks it.
    """
    chance = min(DEVIATIONS / steps, 0.8) / 4
    return 0.5 / NormalDist().inv_cdf(1 - chance) if kind == "wolpertinger" else (-2 * log(chance)) ** -0.5


def imitate(
    nets: PathNets, paths: Sequence[Path], preferences: Floats, rewards: Floats, *, steps: int, rng: torch.Generator
) -> None:
    """Fits the policy to the `paths`, blurred by `nearness`, and the critic to their `rewards` `(paths, preferences)`.

    So a search begins with paths of layers in their order and a change of models here and there, not with garbage.
    """
    if not paths:
        return
    optimizer = torch.optim.Adam(nets.parameters(), lr=3e-3, fused=True)
    tokens, log_scales = tokens_of(nets.pool, list(paths), nets.longest)
    ends = torch.tensor([len(path) + 1 for path in paths])
    inside = torch.arange(tokens.shape[1])[None] <= ends[:, None]
    worth, weights = torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(preferences, dtype=torch.float32)
    for _ in range(steps):
        chosen = torch.randint(len(weights), (len(paths),), generator=rng)
        wanted = weights[chosen][:, None].expand(-1, tokens.shape[1], -1)
        losses = surprise(nets, tokens, log_scales, wanted, rng)[inside[:, 1:]]
        opinions = nets.opinions(nets.critic(tokens, log_scales), wanted)
        missed = (opinions - worth[torch.arange(len(paths)), chosen][:, None, None]).square()[inside]
        optimizer.zero_grad()
        (losses.mean() + missed.mean()).backward()
        optimizer.step()


def surprise(nets: PathNets, tokens: Tensor, log_scales: Tensor, wanted: Tensor, rng: torch.Generator) -> Tensor:
    """Minus the log likelihood `(n, T - 1)` of each token after the first, blurred by `nearness`."""
    states = nets.actor(tokens[:, :-1], log_scales[:, :-1])
    blur = nearness(nets.kind, tokens.shape[1] - 2)
    targets = nets.points[tokens[:, 1:]]
    masks = torch.ones(*targets.shape[:2], nets.pool.actions, dtype=torch.bool)
    main, scale = nets.distributions(states, wanted[:, :-1], masks)
    if isinstance(main, Categorical):
        around = torch.softmax(-torch.cdist(targets, nets.points).square() / (2 * blur**2), -1)
        total = -(around * main.logits).sum(-1)
    else:
        total = -main.log_prob(targets + blur * torch.randn(targets.shape, generator=rng)).sum(-1)
    return total if scale is None else total - scale.log_prob(log_scales[:, 1:])
