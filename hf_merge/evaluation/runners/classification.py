"""A class for each row, or for each word of it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_merge.evaluation.classes import class_ids
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import BatchRunner, Choosing, Integers, Items, finite, in_order, logits_of
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows

OUTSIDE = "O"
"""The tag of words that belong to no entity, and of words that the model never sees: those cut off, or without a token."""


class Classification(Choosing, BatchRunner):
    """The logits of each row's classes, `(n, classes)`: of those that `classes` names, in this order."""

    def __init__(self, items: Items, *, classes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        self.classes = torch.tensor(classes)

    def _predict(self, model: PreTrainedModel, rows: Integers) -> NDArray[np.float32]:
        parts = []
        for places, inputs in self._each(model, rows):
            logits = logits_of(model, inputs, 2, "(rows, classes)")
            parts.append((places, logits[:, self.classes.to(logits.device)]))
        found: NDArray[np.float32] = in_order(parts).float().numpy()
        return found


class TokenClassification(BatchRunner):
    """The tag of each word of each row: the name in `labels` of its first token's largest logit among `classes`.

    Args:
        words: for each row the position of each word's first token, -1 for a word that the model does not see.
    """

    def __init__(
        self, items: Items, *, words: Sequence[Integers], labels: Sequence[str], classes: Sequence[int], **kwargs: Any
    ) -> None:
        super().__init__(items, **kwargs)
        self.words, self.labels, self.classes = words, np.array([*labels, OUTSIDE]), torch.tensor(classes)

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (*super().arrays(), *self.words)

    def _predict(self, model: PreTrainedModel, rows: Integers) -> list[list[str]]:
        tags: list[list[str]] = [[] for _ in rows]
        for places, inputs in self._each(model, rows):
            logits = logits_of(model, inputs, 3, "(rows, tokens, classes)")[:, :, self.classes.to(model.device)]
            each = [torch.from_numpy(self.words[rows[place]]) for place in places]
            chosen = finite(_padded(logits, each)).argmax(-1).numpy()
            for place, found, words in zip(places.tolist(), chosen, each, strict=True):
                numbers = np.where(words.numpy() < 0, len(self.labels) - 1, found[: len(words)])
                tags[place] = self.labels[numbers].tolist()
        return tags


def _padded(logits: Tensor, words: Sequence[Tensor]) -> Tensor:
    """The logits of each word's token `(b, words, classes)`; what is padded, or not seen, holds those of the first token."""
    at = torch.nn.utils.rnn.pad_sequence(list(words), batch_first=True).clamp(min=0).to(logits.device)
    return logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1]))


def text_classification(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """One text or a pair a row; classes are numbers in the objective's labels, or the model's own."""
    labels, classes, positional = reader.labels(objective)
    most = reader.longest(objective)
    runner = Classification(reader.tokens(rows, most), classes=classes, pad_id=reader.own_padding, **reader.batches(objective))
    references = class_ids(rows, labels, positional=positional)
    return Part(label=rows.label, runner=runner, references=references, labels=labels, max_length=most)


def token_classification(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """A list of words a row; predictions and references are lists of tags, by name."""
    labels, classes, positional = reader.labels(objective)
    most = reader.longest(objective)
    tokens, words = reader.words(rows, most)
    runner = TokenClassification(
        tokens, words=words, labels=labels, classes=classes, pad_id=reader.own_padding, **reader.batches(objective)
    )
    each = Rows(
        label=rows.label,
        inputs=(),
        targets=tuple(tag for tags in rows.targets or () for tag in tags),
        class_names=rows.class_names,
    )
    named = np.array(labels)[class_ids(each, labels, positional=positional)].tolist()
    ends = np.cumsum([len(tags) for tags in rows.targets or ()])
    references = [named[end - len(tags) : end] for end, tags in zip(ends, rows.targets or (), strict=True)]
    return Part(label=rows.label, runner=runner, references=references, labels=labels, max_length=most)
