"""A search begins near the models as they are."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_merge.search.layers.imitation import imitate
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.policy import PathNets
from hf_merge.search.layers.rollouts import roll


@pytest.mark.parametrize("kind", ["wolpertinger", "categorical"])
def test_rollouts_begin_in_the_order_of_the_layers(toy, kind):
    torch.manual_seed(0)
    nets, rng = PathNets(toy.pool, 2, longest=5, kind=kind), torch.Generator().manual_seed(0)
    preferences, ledger = np.array([[1.0, 0.0], [0.0, 1.0]]), Ledger(toy)
    paths = toy.pool.identities(5)
    rewards = np.array([[ledger.reward(path, p) for p in preferences] for path in paths])

    def ordered() -> float:
        """Share of the seams that go to the next layer."""
        done = roll(nets, ledger, preferences.repeat(20, 0), epsilon=0.0, neighbors=1, rng=rng)
        pairs = [(a, b) for row in done.tokens.tolist() for a, b in pairwise(row[1:]) if max(a, b) < 6]
        return float(np.mean([b % 3 == a % 3 + 1 for a, b in pairs]))

    before = ordered()
    imitate(nets, paths, preferences, rewards, steps=100, rng=rng)
    assert ordered() > max(0.6, before + 0.2)


def test_the_critic_begins_with_what_the_models_are_worth(toy):
    torch.manual_seed(0)
    nets = PathNets(toy.pool, 2, longest=5)
    rewards = np.array([[0.9, 0.1], [0.2, 0.8]])
    imitate(nets, toy.pool.identities(5), np.eye(2), rewards, steps=150, rng=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[7, 0, 1, 2, 6], [7, 3, 4, 5, 6]])
    tokens[:, 0] = toy.pool.actions
    with torch.no_grad():
        last = nets.critic(tokens, torch.zeros(tokens.shape))[:, -1]
        found = [nets.opinions(last, torch.eye(2)[[k, k]]).mean(-1).tolist() for k in range(2)]
    assert np.allclose(np.transpose(found), rewards, atol=0.15)
