"""PPO: advantages, losses, updates."""

import pytest
import torch
from torch.distributions import Categorical

from hf_merge.search.layers.ppo import PPO, Batch, gae, loss, update

GAMMA, SMOOTHING = 0.9, 0.8


def naive(rewards, values, going_on, last):
    """Â_t = Σ_i (γ β)^i ζ_{t+i} up to the end of the episode, written out."""
    ahead = [*values[1:], last]
    surprises = [r + GAMMA * a * g - v for r, a, g, v in zip(rewards, ahead, going_on, values, strict=True)]
    total = []
    for t in range(len(rewards)):
        end = next((i for i in range(t, len(rewards)) if going_on[i] == 0), len(rewards) - 1)
        total.append(sum((GAMMA * SMOOTHING) ** (i - t) * surprises[i] for i in range(t, end + 1)))
    return total


@pytest.mark.parametrize("ends", [(), (6,), (2, 4), (0, 1, 2, 3, 4, 5, 6)])
def test_advantages_are_the_naive_sum(ends):
    rng = torch.Generator().manual_seed(len(ends))
    rewards, values = torch.randn(7, 1, generator=rng).double(), torch.randn(7, 1, generator=rng).double()
    going_on = torch.ones(7, 1).double()
    going_on[list(ends)] = 0
    last = torch.tensor([0.7]).double()
    expected = naive(rewards[:, 0].tolist(), values[:, 0].tolist(), going_on[:, 0].tolist(), 0.7)
    found = gae(rewards, values, going_on, last, gamma=GAMMA, smoothing=SMOOTHING)
    assert found[:, 0].tolist() == pytest.approx(expected)


def test_without_smoothing_away_an_advantage_is_the_return_less_the_value():
    rewards, values = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.5, 0.1, 0.3])
    found = gae(rewards, values, torch.tensor([1.0, 1.0, 0.0]), torch.tensor(9.0), gamma=1.0, smoothing=1.0)
    assert torch.allclose(found, 2.0 - values)


class Nets(torch.nn.Module):
    """Two actions and a value for each of two states."""

    def __init__(self):
        super().__init__()
        self.logits, self.worth = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))

    def evaluate(self, inputs, actions):
        chances = Categorical(logits=self.logits[inputs["states"]])
        return chances.log_prob(actions), chances.entropy(), self.worth[inputs["states"]]


@pytest.fixture
def batch():
    """In state 0 action 1 is better than expected and action 0 worse; state 1 is padding."""
    return Batch(
        inputs={"states": torch.tensor([0, 0, 1])},
        actions=torch.tensor([1, 0, 1]),
        log_probs=torch.full((3,), 0.5).log(),
        advantages=torch.tensor([1.0, -1.0, 9.0]),
        returns=torch.tensor([0.8, 0.8, 9.0]),
        valid=torch.tensor([True, True, False]),
    )


def test_the_value_loss_has_a_gradient(batch):
    nets = Nets()
    loss(nets.evaluate, batch, PPO()).backward()
    assert nets.worth.grad[0] < 0


def test_padding_has_no_gradient(batch):
    nets = Nets()
    loss(nets.evaluate, batch, PPO()).backward()
    assert nets.worth.grad[1] == 0
    assert nets.logits.grad[1].tolist() == [0, 0]


def test_an_action_that_was_better_than_expected_becomes_likelier(batch):
    nets = Nets()
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.1)
    update(nets.evaluate, optimizer, batch, PPO(), torch.Generator())
    assert nets.logits[0, 1] > nets.logits[0, 0]


def test_the_value_goes_to_the_return(batch):
    nets = Nets()
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.5)
    update(nets.evaluate, optimizer, batch, PPO(epochs=200, max_norm=10), torch.Generator())
    assert nets.worth[0].item() == pytest.approx(0.8, abs=1e-3)


def test_a_ratio_beyond_the_clip_pulls_no_further(batch):
    nets = Nets()
    with torch.no_grad():
        nets.logits[0] = torch.tensor([-2.0, 2.0])
    loss(nets.evaluate, batch, PPO(entropy_weight=0.0)).backward()
    assert nets.logits.grad[0].tolist() == pytest.approx([0, 0])


def test_entropy_is_kept_up(batch):
    nets = Nets()
    with torch.no_grad():
        nets.logits[0] = torch.tensor([-2.0, 2.0])
    loss(nets.evaluate, batch, PPO(entropy_weight=1.0)).backward()
    assert nets.logits.grad[0, 1] > 0


def test_an_extra_loss_is_learned_from_too(batch):
    nets = Nets()
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.1)
    update(nets.evaluate, optimizer, batch, PPO(), torch.Generator(), extra=lambda: (nets.worth[1] - 1).square())
    assert nets.worth[1] > 0
