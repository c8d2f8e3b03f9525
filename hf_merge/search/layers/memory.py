"""All paths that were scored, as the critic learns from them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_merge.recipes.path import Path
from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.pool import Pool
from hf_merge.search.layers.rewards import Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Lessons:
    """Paths from start to stop, `(n, T)`, and what each of their beginnings has led to at best.

    `tokens`, `log_scales`, `targets` and `inside` (not padding) are `(n, T)`; `preferences` `(n, K)`; `votes` `(n, heads)` says
    which heads of the critic learn from the path.
    """

    tokens: Tensor
    log_scales: Tensor
    preferences: Tensor
    targets: Tensor
    inside: Tensor
    votes: Tensor


class Memory:
    """A tree of beginnings over the ledger's paths.

    Rewards come at the end and nothing is random in between, so a beginning is worth at least the best of the paths through it:
    what the critic is told about it, for any preference, at no evaluation (return-based targets: self-imitation, arXiv
    1806.05635; other preferences: hindsight relabeling, arXiv 1707.01495). PPO itself never sees old episodes.
    """

    def __init__(self, pool: Pool, ledger: Ledger, *, longest: int, heads: int, share: float, rng: np.random.Generator) -> None:
        self.pool, self.ledger, self.longest, self.heads, self.share, self.rng = pool, ledger, longest, heads, share, rng
        self.beginnings: dict[tuple[object, ...], int] = {}
        self.rows: list[list[int]] = []
        self.votes: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []

    def refresh(self) -> None:
        """Takes in what the ledger has scored since."""
        for path in list(self.ledger.values)[len(self.rows) :]:
            whole = (*path, "stop")
            self.rows.append([self.beginnings.setdefault(whole[:i], len(self.beginnings)) for i in range(len(whole) + 1)])
            self.votes.append(self.rng.random(self.heads) < self.share)

    def best(self, preference: Floats) -> Floats:
        """For each beginning, the reward of the best path through it."""
        lengths = [len(row) for row in self.rows]
        best = np.full(len(self.beginnings), -np.inf)
        np.maximum.at(best, np.concatenate(self.rows), np.repeat(self.ledger.rewards(preference), lengths))
        return best

    def lessons(self, count: int, preferences: Floats) -> Lessons | None:
        """Up to `count` paths, each for one of `preferences` `(n, K)`; None while nothing is scored."""
        self.refresh()
        if not self.rows:
            return None
        picked = self.rng.choice(len(self.rows), min(count, len(self.rows)), replace=False)
        paths = list(self.ledger.values)
        tokens, log_scales = tokens_of(self.pool, [paths[i] for i in picked], self.longest)
        group = self.rng.integers(len(preferences), size=len(picked))
        best = {g: self.best(preferences[g]) for g in set(group.tolist())}
        targets, inside = np.zeros(tokens.shape), np.zeros(tokens.shape, dtype=bool)
        for j, (i, g) in enumerate(zip(picked.tolist(), group.tolist(), strict=True)):
            row = self.rows[i]
            targets[j, : len(row)], inside[j, : len(row)] = best[g][row], True
        return Lessons(
            tokens=tokens,
            log_scales=log_scales,
            preferences=torch.as_tensor(preferences[group], dtype=torch.float32),
            targets=torch.as_tensor(targets, dtype=torch.float32),
            inside=torch.as_tensor(inside),
            votes=torch.as_tensor(np.array([self.votes[i] for i in picked])),
        )


def tokens_of(pool: Pool, paths: list[Path], longest: int) -> tuple[Tensor, Tensor]:
    """Start, blocks, stop, padded with stops, and the log scales: `(n, longest + 2)` each."""
    tokens = torch.full((len(paths), longest + 2), pool.stop)
    log_scales = torch.zeros(tokens.shape)
    tokens[:, 0] = pool.actions
    for i, path in enumerate(paths):
        tokens[i, 1 : len(path) + 1] = torch.tensor(pool.encode(path))
        log_scales[i, 1 : len(path) + 1] = torch.tensor([step.scale for step in path]).log()
    return tokens, log_scales
