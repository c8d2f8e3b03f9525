"""Answers to a row that were given before, as guesses of the next model's: checked in one pass, they need not be generated.

The candidates of a search are near to each other and mostly write the same. A causal model that reads a prompt with a guess
behind it says at every token which one it would have written: as far as that is the guess, the guess is its own greedy answer.
This is speculative decoding (Leviathan et al., arXiv:2211.17192, at temperature 0) with other models' answers for a draft
model, so answers are those of token after token, but for what floating point rounds differently in a longer pass, as it does
in another batch.
"""

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_merge.evaluation.predict import Integers, cut, logits_of

Answer = tuple[int, ...]
"""Tokens, the one that ended it included."""

KEPT = 16
"""Answers that are kept of a row: of more, the least frequent one goes, the oldest of equals."""

LEAST = 0.25
"""The share of guesses that have to be right lately: one that is wrong costs another reading of its prompt."""


class Drafts:
    """What models answered to rows, and how well the next one's answers could be guessed from it."""

    def __init__(self) -> None:
        self._answers: dict[int, Counter[Answer]] = {}
        self._right, self._guessed = 1.0, 1.0

    @property
    def promising(self) -> bool:
        """Whether there is something to guess by, and enough of the last guesses would have been right."""
        return bool(self._answers) and self._right >= LEAST * self._guessed

    def guess(self, row: int, start: Answer = ()) -> Answer | None:
        """The most frequent answer to a row that begins with `start`, the oldest of equals; None if there is none."""
        fitting = [(n, answer) for answer, n in self._answers.get(row, {}).items() if answer[: len(start)] == start]
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def learn(self, rows: Integers, answers: Sequence[Answer]) -> None:
        """Remember a model's answers. What was answered more than a few models ago counts less for `promising`."""
        guesses = [self.guess(row) for row in rows.tolist()]
        known = [(guess, answer) for guess, answer in zip(guesses, answers, strict=True) if guess is not None]
        if known:
            self._right = self._right / 2 + sum(guess == answer for guess, answer in known)
            self._guessed = self._guessed / 2 + len(known)
        for row, answer in zip(rows.tolist(), answers, strict=True):
            seen = self._answers.setdefault(row, Counter())
            seen[answer] += 1
            if len(seen) > KEPT:
                del seen[min(seen, key=lambda other: (seen[other], other == answer))]


def follows(model: PreTrainedModel, inputs: dict[str, Tensor], guesses: Sequence[Answer], tokens: int) -> list[Answer]:
    """What a causal model writes along `guesses`: as much of each as it agrees with, and its own token after that.

    `inputs` are prompts with their guesses behind them, less the guesses' last tokens, padded on the left. They are read in
    parts, so that logits of at most `tokens` tokens (or of one row) are held at once: of the guesses', where the model can be
    asked for those alone, and of all tokens otherwise.
    """
    parameters = inspect.signature(model.forward).parameters
    mask = inputs.get("attention_mask")
    if mask is not None and "position_ids" in parameters:
        inputs = inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    few, width = "logits_to_keep" in parameters, inputs["input_ids"].shape[1]
    held = np.array([len(guess) if few else width for guess in guesses])
    found: dict[int, Answer] = {}
    for places in cut(held, rows=len(guesses), tokens=tokens):
        longest = max(len(guesses[i]) for i in places)
        kept: dict[str, Any] = {"logits_to_keep": longest} if few else {}
        part = {name: tensor[places] for name, tensor in inputs.items()}
        logits = logits_of(model, part | kept, 3, "one of each token of the vocabulary for each token")
        for i, own in zip(places.tolist(), logits[:, -longest:].argmax(-1).cpu(), strict=True):
            found[i] = agreed(guesses[i], own[longest - len(guesses[i]) :])
    return [found[i] for i in range(len(guesses))]


def agreed(guess: Answer, own: Tensor) -> Answer:
    """The guess up to the first token that `own` `(len(guess),)` has otherwise, and that one."""
    different = torch.tensor(guess) != own
    n = int(different.int().argmax()) if bool(different.any()) else len(guess)
    return (*guess[:n], *own[n : n + 1].tolist())
