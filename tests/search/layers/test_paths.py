"""The search over paths, and its refinement for another preference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_merge.errors import RecipeError
from hf_merge.search.layers import paths
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.paths import Settings, Trainer, refine, search_paths
from hf_merge.search.layers.policy import PathNets
from hf_merge.search.layers.pool import Block, Pool
from hf_merge.search.layers.rollouts import Rollouts, roll

BOTH = np.eye(2)
QUICK = Settings(batch=8, hidden=16, imitation=30, remembered=16)


def asked(toy, **options):
    toy.asked.clear()
    found = search_paths(toy, toy.pool, BOTH, seed=3, **{"episodes": 40, "settings": QUICK, **options})
    return list(toy.asked), found


def test_the_models_as_they_are_come_first(toy):
    scored, _ = asked(toy)
    assert scored[:2] == [toy.pool.identity("a"), toy.pool.identity("b")]


def test_no_path_is_scored_twice(toy):
    scored, found = asked(toy)
    assert len(set(scored)) == len(scored) == found.ledger.evaluations > 4


def test_the_same_seed_asks_for_the_same_paths_whatever_the_global_state(toy):
    first, _ = asked(toy)
    torch.manual_seed(99)
    torch.rand(3)
    assert asked(toy)[0] == first


def test_the_global_random_state_is_left_alone(toy):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    asked(toy, episodes=8)
    assert torch.equal(torch.rand(2), expected)


def test_another_seed_asks_for_other_paths(toy):
    first, _ = asked(toy)
    toy.asked.clear()
    search_paths(toy, toy.pool, BOTH, seed=4, episodes=40, settings=QUICK)
    assert toy.asked != first


def test_a_killed_search_goes_on_where_it_was(toy):
    whole, uninterrupted = asked(toy)
    stored, fresh = {}, []

    def score(path):
        if path not in stored:
            if len(stored) == 9 and len(fresh) == 9:
                raise KeyboardInterrupt
            fresh.append(path)
            stored[path] = toy(path)
        return stored[path]

    with pytest.raises(KeyboardInterrupt):
        search_paths(score, toy.pool, BOTH, seed=3, episodes=40, settings=QUICK)
    fresh.append(None)
    resumed = search_paths(score, toy.pool, BOTH, seed=3, episodes=40, settings=QUICK)
    assert [path for path in fresh if path] == whole
    assert all(torch.equal(a, b) for a, b in zip(resumed.nets.parameters(), uninterrupted.nets.parameters(), strict=True))


def test_it_ends_when_the_evaluations_are_spent(toy):
    scored, found = asked(toy, evaluations=7, episodes=10_000)
    assert len(scored) == found.ledger.evaluations == 7


def test_every_path_is_told_as_it_is_scored(toy):
    told = []
    scored, found = asked(toy, on_path=lambda path, values: told.append(path))
    assert told == scored == list(found.ledger.values)


@pytest.mark.parametrize("kind", ["wolpertinger", "categorical"])
@pytest.mark.parametrize("reward", ["terminal", "spread"])
def test_it_finds_the_best_path_for_each_preference(toy, kind, reward):
    settings = Settings(kind=kind, reward=reward, batch=16, hidden=32, imitation=50, length_cost=0.2)
    preferences = np.array([[1, 0], [0, 1], [0.5, 0.5]])
    found = search_paths(toy, toy.pool, preferences, seed=0, episodes=150, settings=settings)
    assert [found.best(p) for p in BOTH] == [toy.pool.identity("a"), toy.pool.identity("b")]


def test_paths_keep_to_their_widths_and_length(toy):
    blocks = (Block("a", 0, 4, 4), Block("a", 1, 4, 4), Block("b", 0, 4, 8), Block("b", 1, 8, 8), Block("b", 2, 8, 4))
    pool = Pool(blocks=blocks)
    found = search_paths(lambda path: [len(path), -len(path)], pool, BOTH, seed=0, episodes=60, settings=QUICK)
    assert len(found.ledger.values) > 5
    assert all(pool.allowed(path, 5) for path in found.ledger.values)


def test_scales_are_searched_if_wanted(toy):
    settings = Settings(scales=True, batch=8, hidden=16, imitation=30)
    _, found = asked(toy, settings=settings)
    scales = [step.scale for path in found.ledger.values for step in path]
    assert any(scale != 1 for scale in scales)
    assert all(0.5 <= scale <= 2 for scale in scales)


def test_there_are_no_scales_if_they_are_not_wanted(toy):
    scored, _ = asked(toy)
    assert {step.scale for path in scored for step in path} == {1.0}


def test_evaluations_that_fail_do_not_end_it(toy):
    failing = iter(range(1000))
    found = search_paths(
        lambda path: [np.nan, 0.0] if next(failing) % 3 == 2 else toy(path), toy.pool, BOTH, seed=0, episodes=40, settings=QUICK
    )
    assert all(p.isfinite().all() for p in found.nets.state_dict().values())
    assert found.ledger.evaluations > 5


def test_preferences_and_objectives_are_equally_many(toy):
    with pytest.raises(RecipeError, match="3 weights, but paths have 2 objectives"):
        search_paths(toy, toy.pool, np.eye(3), seed=0, episodes=8, settings=QUICK)


@pytest.mark.parametrize(
    "given",
    [{"kind": "gaussian"}, {"scalarization": "sum"}, {"reward": "late"}, {"longest": 0}, {"neighbors": 0}, {"heads": 0}],
)
def test_settings_that_make_no_sense_are_refused(given):
    with pytest.raises(RecipeError, match=next(iter(given))):
        Settings(**given)


def test_refining_leaves_the_trained_networks_alone(toy):
    _, found = asked(toy)
    before = {name: tensor.clone() for name, tensor in found.nets.state_dict().items()}
    refined = refine(found.nets, toy, [0.3, 0.7], episodes=16, seed=0, settings=QUICK)
    assert all(torch.equal(before[name], tensor) for name, tensor in found.nets.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in refined.nets.state_dict().items())


def test_refining_does_not_score_what_is_known(toy):
    _, found = asked(toy)
    toy.asked.clear()
    refined = refine(found.nets, toy, [0.3, 0.7], episodes=24, seed=0, settings=QUICK, known=found.ledger.values)
    assert not set(toy.asked) & set(found.ledger.values)
    assert refined.ledger.evaluations == len(toy.asked)


def test_refining_is_the_same_for_a_seed(toy):
    _, found = asked(toy)
    runs = []
    for _ in range(2):
        toy.asked.clear()
        refine(found.nets, toy, [0.3, 0.7], episodes=24, seed=1, settings=QUICK)
        runs.append(list(toy.asked))
    assert runs[0] == runs[1]


def test_epsilon_grows_while_nothing_new_is_found(toy):
    trainer = Trainer(PathNets(toy.pool, 2, longest=5), Ledger(lambda path: [0, 0]), Settings(fresh=2.0, batch=2), 0)
    trainer.train(BOTH, 20)
    assert trainer.epsilon == pytest.approx(0.1 * 1.1**10)


def test_epsilon_shrinks_while_everything_is_new(toy):
    trainer = Trainer(PathNets(toy.pool, 2, longest=5), Ledger(lambda path: [0, 0]), Settings(fresh=0.0, batch=2), 0)
    trainer.train(BOTH, 20)
    assert trainer.epsilon == pytest.approx(0.1 / 1.1**10)


def test_without_edits_every_episode_is_the_policys(toy, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        paths, "roll", lambda nets, ledger, wanted, **rest: sizes.append(len(wanted)) or roll(nets, ledger, wanted, **rest)
    )
    for share in (0.0, 0.5):
        asked(toy, episodes=16, settings=replace(QUICK, edits=share))
    assert sizes == [8, 8, 4, 4]


@pytest.mark.parametrize(("reward", "expected"), [("terminal", [0, 0, 0.9]), ("spread", [0.3, 0.3, 0.3])])
def test_rewards_come_at_the_end_or_in_equal_parts(toy, reward, expected):
    nets = PathNets(toy.pool, 2, longest=3)
    trainer = Trainer(nets, Ledger(toy), Settings(reward=reward, smoothing=0.0), 0)
    done = Rollouts.empty(nets, BOTH[:1])
    done.valid[0, :3], done.rewards[0] = True, 0.9
    trainer.evaluate = lambda inputs, choices: (torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
    assert trainer.batch(done).advantages[0].tolist() == pytest.approx([*expected, 0])
