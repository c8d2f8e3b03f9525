"""Proximal policy optimization with generalized advantages: arXiv 1707.06347, arXiv 1506.02438."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Evaluate = Callable[[Inputs, Tensor], tuple[Tensor, Tensor, Tensor]]
"""The policy and critic as they are now: (inputs, actions) -> log probabilities, entropies, values, shaped as `Batch.valid`."""


@dataclass(frozen=True, kw_only=True)
class PPO:
    """How an update goes: the clip of the ratio, the weights c1 and c2 of the value loss and the entropy, the passes over the
    data and the parts that each is cut into, the greatest gradient norm."""

    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    epochs: int = 4
    minibatches: int = 1
    max_norm: float = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What was done and what came of it. All tensors begin with the same dimension, along which minibatches are cut;
    `log_probs`, `advantages`, `returns` and `valid` have one shape, and where `valid` is False nothing was done (padding)."""

    inputs: Inputs
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor

    def part(self, rows: Tensor) -> "Batch":
        """These rows of it."""
        return Batch(
            inputs={name: tensor[rows] for name, tensor in self.inputs.items()},
            actions=self.actions[rows],
            log_probs=self.log_probs[rows],
            advantages=self.advantages[rows],
            returns=self.returns[rows],
            valid=self.valid[rows],
        )


def gae(rewards: Tensor, values: Tensor, going_on: Tensor, last: Tensor, *, gamma: float, smoothing: float) -> Tensor:
    """Advantages Â_t = Σ_i (γ β)^i ζ_{t+i}, ζ_t = R_t + γ V(S_{t+1}) - V(S_t), time first: all `(T, …)`.

    `going_on` is 0 where the episode ends with the step, so that nothing behind it counts; `last` `(…)` is V of the state after
    the last step. `smoothing` is β (λ in the paper). Returns are the advantages plus `values`.
    """
    advantages = torch.zeros_like(values)
    ahead, advantage = last, torch.zeros_like(last)
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + gamma * ahead * going_on[t] - values[t]
        advantage = surprise + gamma * smoothing * going_on[t] * advantage
        advantages[t], ahead = advantage, values[t]
    return advantages


def loss(evaluate: Evaluate, batch: Batch, settings: PPO) -> Tensor:
    """-L_CLIP + c1 L_VF - c2 H, with L_VF = E (V(S_t) - Ĝ_t)² for the returns Ĝ_t; means over what is valid."""
    log_probs, entropies, values = evaluate(batch.inputs, batch.actions)
    valid = batch.valid
    advantages = batch.advantages[valid]
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    ratios = (log_probs - batch.log_probs)[valid].exp()
    clipped = ratios.clamp(1 - settings.clip, 1 + settings.clip)
    gained = torch.minimum(ratios * advantages, clipped * advantages).mean()
    missed = (values - batch.returns)[valid].square().mean()
    return -gained + settings.value_weight * missed - settings.entropy_weight * entropies[valid].mean()


def update(
    evaluate: Evaluate,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: PPO,
    rng: torch.Generator,
    extra: Callable[[], Tensor] | None = None,
) -> None:
    """Some epochs of descent on the loss of one batch; `extra()` is a loss that is added in each step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(settings.epochs):
        order = torch.randperm(len(batch.valid), generator=rng)
        for rows in order.chunk(settings.minibatches):
            total = loss(evaluate, batch.part(rows), settings)
            if extra is not None:
                total = total + extra()
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
            optimizer.step()
