"""How likely a language model finds given tokens: of a whole text, of masked tokens."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import IGNORED, BatchRunner, Integers, Tokens, in_order, logits_of
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows

MASKED = 0.15
"""Share of a text's tokens that are masked for fill-mask, at least one; a hash of the text decides which."""


class Likelihood(BatchRunner):
    """What `count` finds at each target, summed over a row, `(n,)` float64."""

    def __init__(self, items: Tokens, *, count: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        self.count = count

    def _predict(self, model: PreTrainedModel, rows: Integers) -> NDArray[np.float64]:
        parts = []
        for places, inputs in self._each(model, rows):
            targets = inputs.pop("targets")
            logits = logits_of(model, inputs, 3, "one for every token")
            parts.append((places, self.count(logits, targets).cpu().double().sum(1)))
        sums: NDArray[np.float64] = in_order(parts).numpy()
        return sums


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target `(b, t)` in nats, 0 where it is ignored."""
    each = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view_as(targets)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's `(b, t)`, NaN where there is none, else 0."""
    best, found = logits.max(-1)
    return torch.where(best.isnan() & (targets != IGNORED), torch.nan, (found == targets).float())


def language_modeling(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """Each next token of a text; rows with fewer than two are left out. References are the numbers of predicted tokens."""
    most = reader.longest(objective)
    ids = tuple(row for row in reader.tokens(rows, most).ids if len(row) > 1)
    if not ids:
        raise EvaluationError(f"{rows.label}: no row has two tokens, so there is nothing to predict. Give longer texts.")
    return _likelihood(objective, rows, reader, Tokens(ids=ids, targets=tuple(following(row, 1) for row in ids)), most)


def fill_mask(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """Masked tokens of a text, all masked at once; rows without a token to mask are left out. References are their numbers."""
    mask, special = reader.texts.mask_token_id, reader.texts.all_special_ids
    if mask is None:
        raise EvaluationError("fill-mask needs a tokenizer with a mask token, and this one has none.")
    most = reader.longest(objective)
    ids, targets = [], []
    for text, row in zip(rows.inputs[0], reader.tokens(rows, most).ids, strict=True):
        if len(places := _masked(text, np.flatnonzero(~np.isin(row, special)))):
            hidden, wanted = row.copy(), np.full_like(row, IGNORED)
            hidden[places], wanted[places] = mask, row[places]
            ids.append(hidden)
            targets.append(wanted)
    if not ids:
        raise EvaluationError(f"{rows.label}: no row has a token to mask.")
    return _likelihood(objective, rows, reader, Tokens(ids=tuple(ids), targets=tuple(targets)), most)


def _likelihood(objective: Objective, rows: Rows, reader: Reader, tokens: Tokens, most: int) -> Part:
    runner = Likelihood(
        tokens,
        count=negative_log_likelihood if objective.metric == "perplexity" else hits,
        pad_id=reader.own_padding or 0,
        logits=reader.vocabulary or 1,
        **reader.batches(objective),
    )
    references = np.array([(wanted != IGNORED).sum() for wanted in tokens.targets or ()], dtype=np.float64)
    return Part(label=rows.label, runner=runner, references=references, max_length=most)


def following(ids: Integers, start: int) -> Integers:
    """What a causal model should say at each position: the next token, from the token at `start` on."""
    targets = np.append(ids[1:], IGNORED)
    targets[: start - 1] = IGNORED
    return targets


def _masked(text: str, candidates: Integers) -> Integers:
    def drawn(place: int) -> bytes:
        return hashlib.sha256(f"mask {place} {text}".encode()).digest()

    count = max(1, round(MASKED * len(candidates)))
    return np.array(sorted(sorted(candidates.tolist(), key=drawn)[:count]), dtype=np.int64)
