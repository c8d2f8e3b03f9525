"""The networks: proto-actions, Wolpertinger, masks, the preference."""

import numpy as np
import pytest
import torch

from hf_merge.search.layers.policy import PathNets, action_points, nearest, wolpertinger
from hf_merge.search.layers.pool import Pool

POOL = Pool.of({"a": 3, "b": 3})
ALL = torch.ones(1, POOL.actions, dtype=torch.bool)


@pytest.fixture(params=["wolpertinger", "categorical"])
def nets(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PathNets(POOL, 2, longest=4, kind=request.param)


def states(nets, tokens=((6, 0, 1),)):
    given = torch.tensor(tokens)
    return nets.actor(given, torch.zeros(given.shape))


def test_another_model_and_the_next_layer_are_equally_far():
    points = action_points(POOL)
    assert torch.dist(points[0], points[1]).item() == pytest.approx(1)
    assert torch.dist(points[0], points[3]).item() == pytest.approx(1)


def test_the_nearest_actions_are_the_nearest_points():
    points = action_points(POOL)
    near, real = nearest(points, points[4:5] + 0.1, ALL, 3)
    by_hand = (points - points[4] - 0.1).norm(dim=1).argsort()[:3]
    assert near[0].tolist() == by_hand.tolist()
    assert real.all()


def test_what_is_forbidden_is_not_near():
    points, mask = action_points(POOL), ALL.clone()
    mask[0, 4] = False
    assert 4 not in nearest(points, points[4:5], mask, 3)[0]


def test_fewer_allowed_actions_than_neighbors_are_told_apart():
    mask = torch.zeros(1, POOL.actions, dtype=torch.bool)
    mask[0, 2] = True
    near, real = nearest(action_points(POOL), torch.zeros(1, 4), mask, 3)
    assert near[real].tolist() == [2]


def test_of_the_neighbors_the_one_worth_most_is_taken():
    actions, real = torch.tensor([[5, 3, 1]]), torch.tensor([[True, True, False]])
    taken = wolpertinger(actions, real, torch.tensor([[0.1, 0.4, 0.9]]), 0.0, torch.Generator())
    assert taken.tolist() == [3]


def test_exploring_takes_any_real_neighbor():
    actions, real = torch.tensor([[5, 3, 1]]).repeat(200, 1), torch.tensor([[True, True, False]]).repeat(200, 1)
    taken = wolpertinger(actions, real, torch.zeros(200, 3), 1.0, torch.Generator().manual_seed(0))
    assert set(taken.tolist()) == {5, 3}


def test_the_preference_changes_what_comes_next(nets):
    with torch.no_grad():
        nets.choose[-1].weight.mul_(100)
        rows = states(nets)[:, -1]
        first, second = (nets.distributions(rows, torch.tensor([p]), ALL)[0] for p in ([1.0, 0.0], [0.0, 1.0]))
    key = "logits" if nets.kind == "categorical" else "mean"
    assert not torch.allclose(getattr(first, key), getattr(second, key))


def test_the_preference_changes_the_value(nets):
    rows = states(nets)[:, -1]
    one, other = (nets.opinions(rows, torch.tensor([p])) for p in ([1.0, 0.0], [0.0, 1.0]))
    assert not torch.allclose(one, other)


def test_the_order_of_the_blocks_matters(nets):
    assert not torch.allclose(states(nets, [[6, 0, 1]])[:, -1], states(nets, [[6, 1, 0]])[:, -1])


def test_statistics_tell_blocks_of_one_place_apart():
    torch.manual_seed(0)
    facts = np.random.default_rng(0).normal(size=(6, 3))
    nets = PathNets(Pool.of({"a": 3, "b": 3}, statistics=facts), 2, longest=4)
    before = states(nets)
    nets.actor.statistics[0] += 1
    assert not torch.allclose(states(nets)[:, 1], before[:, 1])


def test_a_categorical_policy_gives_nothing_to_what_is_forbidden():
    nets = PathNets(POOL, 2, longest=4, kind="categorical")
    mask = ALL.clone()
    mask[0, [1, 4]] = False
    chances = nets.distributions(states(nets)[:, -1], torch.tensor([[0.5, 0.5]]), mask)[0].probs
    assert chances[0, [1, 4]].tolist() == [0, 0]
    assert chances.sum().item() == pytest.approx(1)


def test_one_step_ahead_is_the_longer_sequence():
    nets = PathNets(POOL, 2, longest=4)
    wanted, head = torch.tensor([[0.3, 0.7]]), torch.tensor([2])
    tokens = torch.tensor([[6, 0, 1, 5]])
    with torch.no_grad():
        whole = nets.critic(tokens, torch.zeros(tokens.shape))
        found = nets.ahead(whole[:, 2], wanted, torch.tensor([[5, 2]]), head)
        expected = nets.opinions(whole[:, 3], wanted)[0, 2]
    assert found[0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_scale_adds_its_own_probability():
    nets = PathNets(POOL, 2, longest=4, scales=True)
    rows, wanted = states(nets)[:, -1], torch.tensor([[0.5, 0.5]])
    likely, unlikely = torch.zeros(1, 5), torch.tensor([[0.0, 0, 0, 0, 2.0]])
    assert nets.log_probs(rows, wanted, ALL, likely)[0] > nets.log_probs(rows, wanted, ALL, unlikely)[0]
