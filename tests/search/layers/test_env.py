"""The environment: Gymnasium's interface, masks, rewards."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hf_merge.errors import RecipeError
from hf_merge.recipes.path import Step
from hf_merge.search.layers.env import BROKEN, PathEnv
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.pool import Block, Pool


@pytest.fixture
def env(toy):
    return PathEnv(toy.pool, Ledger(toy, length_cost=0.1).reward, 2, longest=4)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.filterwarnings("error")
def test_gymnasium_finds_nothing_wrong(toy, scales):
    check_env(PathEnv(toy.pool, Ledger(toy).reward, 2, longest=4, scales=scales), skip_render_check=True)


def test_the_reward_comes_with_the_stop(env, toy):
    env.reset(options={"preference": [1, 0]})
    steps = [env.step(action) for action in (0, 1, 2, toy.pool.stop)]
    assert [step[1] for step in steps] == pytest.approx([0, 0, 0, 2.0 - 0.3])
    assert [step[2] for step in steps] == [False, False, False, True]


def test_the_preference_is_what_was_asked_for(env):
    seen, _ = env.reset(options={"preference": [3, 1]})
    assert seen["preference"].tolist() == [0.75, 0.25]


def test_the_preference_is_drawn_by_the_seed_if_none_is_given(env):
    first, second, third = (env.reset(seed=seed)[0]["preference"].tolist() for seed in (1, 1, 2))
    assert first == second != third


def test_an_observation_has_the_path_so_far(env, toy):
    env.reset()
    env.step(4)
    seen = env.step(1)[0]
    assert seen["blocks"].tolist() == [4, 1, toy.pool.stop, toy.pool.stop]


def test_what_the_mask_forbids_ends_the_episode_and_scores_nothing(env, toy):
    env.reset()
    _, reward, over, _, _ = env.step(toy.pool.stop)
    assert (reward, over, toy.asked) == (BROKEN, True, [])


def test_no_step_after_the_end(env, toy):
    env.reset()
    env.step(toy.pool.stop)
    with pytest.raises(RecipeError, match="reset"):
        env.step(0)


def test_the_mask_is_told(env):
    _, info = env.reset()
    assert info["action_mask"].tolist() == [1] * 6 + [0]


def test_a_random_walk_that_keeps_to_the_mask_never_breaks_a_width():
    blocks = [Block("a", i, 4, 8 if i % 2 else 4) for i in range(4)] + [Block("b", i, 8, 4 + 4 * (i % 2)) for i in range(4)]
    pool = Pool(blocks=tuple(blocks), width_in=4, width_out=4)
    rng, paths = np.random.default_rng(0), []
    env = PathEnv(pool, lambda path, preference: float(paths.append(path) or 0), 2, longest=5)
    for _ in range(50):
        _, info = env.reset()
        while not env.over:
            _, _, _, _, info = env.step(rng.choice(np.flatnonzero(info["action_mask"])))
    widths = [[4, *(n for s in path for n in _widths(pool, s)), 4] for path in paths]
    assert len(paths) == 50
    assert all(w[::2] == w[1::2] for w in widths)


def _widths(pool, step):
    block = pool.blocks[pool.index[step.model, step.layer]]
    return block.width_in, block.width_out


def test_a_scale_is_part_of_the_path(toy):
    env = PathEnv(toy.pool, Ledger(toy).reward, 2, longest=4, scales=True)
    env.reset()
    seen = env.step((3, np.log([0.8])))[0]
    assert env.path == (Step("b", 0, 0.8),)
    assert seen["scales"].tolist() == [0.8, 1, 1, 1]


def test_a_scale_stays_within_its_bounds(toy):
    env = PathEnv(toy.pool, Ledger(toy).reward, 2, longest=4, scales=True)
    env.reset()
    env.step((3, [9.0]))
    assert env.path[0].scale == 2.0


def test_a_pool_without_a_way_through_is_refused(toy):
    pool = Pool(blocks=(Block("a", 0, 4, 8),), width_in=4, width_out=4)
    with pytest.raises(RecipeError, match="from width 4 to 4"):
        PathEnv(pool, Ledger(toy).reward, 2, longest=4)


def test_a_preference_of_another_size_is_refused(env):
    with pytest.raises(RecipeError, match="each of 2 objectives"):
        env.reset(options={"preference": [1, 0, 0]})
