"""Our PPO against Stable-Baselines3's on CartPole-v1: the mean return of 20 greedy episodes after the same number of steps.

Both have the same network (two tanh layers of 64 for the policy, two for the value), the same hyperparameters and the same
number of environments; the update is `hf_merge.search.layers.ppo.update`, which the search over paths uses. The best is 500.

    pip install --no-deps stable-baselines3
    python benchmarks/cartpole.py [--seeds 5] [--steps 50000]
"""

import argparse
import time
from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO as TheirPPO
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn
from torch.distributions import Categorical

from hf_merge.search.layers.policy import mlp
from hf_merge.search.layers.ppo import PPO, Batch, Inputs, gae, update

ENVS, STEPS, GAMMA, SMOOTHING, RATE = 8, 64, 0.98, 0.9, 1e-3
SETTINGS = PPO(clip=0.2, value_weight=0.5, entropy_weight=0.0, epochs=10, minibatches=2, max_norm=0.5)


class Nets(nn.Module):
    """Policy and critic of a state of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = mlp(4, 64, 2, 0.01), mlp(4, 64, 1, 1.0)

    def evaluate(self, inputs: Inputs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities, entropies and values."""
        chances = Categorical(logits=self.policy(inputs["states"]))
        return chances.log_prob(actions), chances.entropy(), self.value(inputs["states"])[..., 0]


def ours(seed: int, steps: int) -> Nets:
    """Trains with our update."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    nets = Nets()
    optimizer = torch.optim.Adam(nets.parameters(), lr=RATE, eps=1e-5)
    envs = [gymnasium.make("CartPole-v1") for _ in range(ENVS)]
    state = torch.tensor(np.array([env.reset(seed=seed * ENVS + i)[0] for i, env in enumerate(envs)]))
    for _ in range(steps // (ENVS * STEPS)):
        states, actions = torch.zeros(STEPS, ENVS, 4), torch.zeros(STEPS, ENVS, dtype=torch.long)
        rewards, going_on = torch.ones(STEPS, ENVS), torch.ones(STEPS, ENVS)
        for t in range(STEPS):
            states[t] = state
            with torch.no_grad():
                actions[t] = torch.multinomial(nets.policy(state).softmax(-1), 1, generator=rng)[:, 0]
            fresh = []
            for i, env in enumerate(envs):
                seen, _, fell, late, _ = env.step(int(actions[t, i]))
                if late and not fell:  # cut off, not over: what would have come still counts
                    with torch.no_grad():
                        rewards[t, i] += GAMMA * float(nets.value(torch.tensor(seen)))
                if fell or late:
                    going_on[t, i] = 0.0
                    seen = env.reset()[0]
                fresh.append(seen)
            state = torch.tensor(np.array(fresh))
        with torch.no_grad():
            log_probs, _, values = nets.evaluate({"states": states}, actions)
            last = nets.value(state)[..., 0]
        advantages = gae(rewards, values, going_on, last, gamma=GAMMA, smoothing=SMOOTHING)
        batch = Batch(
            inputs={"states": states.flatten(0, 1)},
            actions=actions.flatten(),
            log_probs=log_probs.flatten(),
            advantages=advantages.flatten(),
            returns=(advantages + values).flatten(),
            valid=torch.ones(STEPS * ENVS, dtype=torch.bool),
        )
        update(nets.evaluate, optimizer, batch, SETTINGS, rng)
    return nets


def theirs(seed: int, steps: int) -> TheirPPO:
    """Trains with Stable-Baselines3."""
    model = TheirPPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", ENVS, seed=seed),
        n_steps=STEPS,
        batch_size=ENVS * STEPS // SETTINGS.minibatches,
        n_epochs=SETTINGS.epochs,
        gamma=GAMMA,
        gae_lambda=SMOOTHING,
        clip_range=SETTINGS.clip,
        ent_coef=SETTINGS.entropy_weight,
        vf_coef=SETTINGS.value_weight,
        max_grad_norm=SETTINGS.max_norm,
        learning_rate=RATE,
        seed=seed,
        device="cpu",
    )
    return model.learn(steps)


def returned(act: Callable[[np.ndarray], int], seed: int) -> float:
    """Mean return of 20 greedy episodes."""
    env, total = gymnasium.make("CartPole-v1"), 0.0
    for episode in range(20):
        state, over = env.reset(seed=10_000 + 100 * seed + episode)[0], False
        while not over:
            state, reward, fell, late, _ = env.step(act(state))
            total, over = total + float(reward), fell or late
    return total / 20


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"mean return of 20 greedy episodes after {given.steps} steps, {given.seeds} seeds")
    for name in ("ours", "theirs"):
        start, scores = time.process_time(), []
        for seed in range(given.seeds):
            if name == "ours":
                nets = ours(seed, given.steps)
                scores.append(returned(lambda s, nets=nets: int(nets.policy(torch.tensor(s)).argmax()), seed))  # type: ignore[misc]
            else:
                model = theirs(seed, given.steps)
                scores.append(returned(lambda s, model=model: int(model.predict(s, deterministic=True)[0]), seed))  # type: ignore[misc]
        shown = " ".join(f"{score:.0f}" for score in scores)
        print(f"{name:<8}median {np.median(scores):.0f}   ({shown})   {time.process_time() - start:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
