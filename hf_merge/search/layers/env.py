"""A path as an episode: a pure state machine with Gymnasium's interface."""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from hf_merge.errors import RecipeError
from hf_merge.recipes.path import Path
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.rewards import checked

Observation = dict[str, NDArray[Any]]

WIDEST = 2.0
"""A scale is between 1/WIDEST and WIDEST."""

BROKEN = -1.0
"""The reward of an action that the mask forbids; it ends the episode and nothing is scored."""


class PathEnv(gymnasium.Env[Observation, Any]):
    """Builds one path, block after block, and is rewarded when it ends (HM3, section 3.3).

    An action is a block of the pool or `pool.stop`; with `scales` it is (block, log of the scale), rounded to two digits of the
    scale. `info["action_mask"]` says what is allowed: widths fit at every seam, at most `longest` blocks, a stop after at least
    one block and only at the width that the head reads. An observation has the `blocks` so far (`longest`; `pool.stop` where
    there is none yet), their `scales` and the `preference` (`objectives` weights): `reset(options={"preference": …})` sets it,
    else it is drawn from Dirichlet(1, …, 1).

    `reward(path, preference)` is the reward, all of it with the stop: Σ_k λ_k f_k - β T for a `Ledger.reward`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(
        self,
        pool: Pool,
        reward: Callable[[Path, ArrayLike], float],
        objectives: int,
        *,
        longest: int,
        scales: bool = False,
    ) -> None:
        if not pool.mask((), longest).any():
            raise RecipeError(f"No path of at most {longest} blocks leads from width {pool.width_in} to {pool.width_out}.")
        self.pool, self.reward, self.longest, self.scales = pool, reward, longest, scales
        block = spaces.Discrete(pool.actions)
        bound = np.full(1, np.log(WIDEST), dtype=np.float32)
        self.action_space = spaces.Tuple((block, spaces.Box(-bound, bound))) if scales else block
        seen: Any = spaces.Dict(
            {
                "blocks": spaces.MultiDiscrete([pool.actions] * longest),
                "scales": spaces.Box(1 / WIDEST, WIDEST, (longest,), np.float64),
                "preference": spaces.Box(0.0, 1.0, (objectives,), np.float64),
            }
        )
        self.observation_space = seen
        self.preference = np.full(objectives, 1 / objectives)
        self._clear()

    def _clear(self) -> None:
        self.taken: list[int] = []
        self.factors: list[float] = []
        self.over = False

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """An empty path, for `options["preference"]`."""
        super().reset(seed=seed)
        given = (options or {}).get("preference")
        size = len(self.preference)
        self.preference = self.np_random.dirichlet(np.ones(size)) if given is None else checked(given)[0]
        if len(self.preference) != size:
            raise RecipeError(f"A preference has one weight for each of {size} objectives, got {len(self.preference)}.")
        self._clear()
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes a block, or stops."""
        if self.over:
            raise RecipeError("The path has ended; call reset() before another step.")
        block, log_scale = (int(action[0]), float(np.ravel(action[1])[0])) if self.scales else (int(action), 0.0)
        reward = 0.0
        if not self.action_mask[block]:
            self.over, reward = True, BROKEN
        elif block == self.pool.stop:
            self.over, reward = True, self.reward(self.path, self.preference)
        else:
            self.taken.append(block)
            self.factors.append(rounded_scale(log_scale))
        return self._observation(), reward, self.over, False, self._info()

    @property
    def path(self) -> Path:
        """The blocks so far."""
        return self.pool.decode(self.taken, self.factors)

    @property
    def action_mask(self) -> NDArray[np.bool_]:
        """`(actions,)`: what may come next."""
        return self.pool.mask(self.taken, self.longest)

    def _observation(self) -> Observation:
        missing = self.longest - len(self.taken)
        return {
            "blocks": np.array(self.taken + [self.pool.stop] * missing, dtype=np.int64),
            "scales": np.array(self.factors + [1.0] * missing),
            "preference": self.preference.copy(),
        }

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.action_mask.astype(np.int8)}


def rounded_scale(log_scale: float) -> float:
    """The scale of a log scale: within the bounds, two digits, so that equal paths are seen to be equal."""
    return round(float(np.exp(np.clip(log_scale, -np.log(WIDEST), np.log(WIDEST)))), 2)
