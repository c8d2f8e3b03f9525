"""The likeliest of several answers, after a context that is read once."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import IGNORED, BatchRunner, Choosing, Integers, Tokens, finite
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.runners.likelihood import Likelihood, following, negative_log_likelihood

Costs = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Tokens of contexts, and of the choices of each."""

    contexts: Tokens
    choices: tuple[tuple[Integers, ...], ...]

    @property
    def counts(self) -> Integers:
        """Choices of each row `(n,)`."""
        return np.array([len(each) for each in self.choices], dtype=np.int64)

    @property
    def lengths(self) -> Integers:
        return self.contexts.lengths + np.array([sum(map(len, each)) for each in self.choices])

    def batch(self, rows: Integers, *, pad_id: int, left: bool) -> dict[str, Tensor]:
        """The contexts; all their `choices` one below the other, filled up with `IGNORED`; the place of each one's context."""
        every = [choice for row in rows for choice in self.choices[row]]
        choices = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in every], True, IGNORED)
        owners = torch.arange(len(rows)).repeat_interleave(torch.from_numpy(self.counts[rows]))
        return {**self.contexts.batch(rows, pad_id=pad_id, left=left), "choices": choices, "owners": owners}

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (*self.contexts.arrays(), self.counts, *(choice for each in self.choices for choice in each))

    def written_out(self) -> Tokens:
        """Each choice behind its context, row after row."""
        pairs = [(c, choice) for c, each in zip(self.contexts.ids, self.choices, strict=True) for choice in each]
        ids = tuple(np.concatenate(pair) for pair in pairs)
        targets = tuple(following(row, len(context)) for row, (context, _) in zip(ids, pairs, strict=True))
        return Tokens(ids=ids, targets=targets)


class SharedContext(BatchRunner):
    """The negative log-likelihoods of each row's choices, a list of `(choices,)`. A context is read once for all of them."""

    items: Questions

    def _predict(self, model: PreTrainedModel, rows: Integers) -> list[Costs]:
        costs: list[Costs] = [np.empty(0)] * len(rows)
        for places, inputs in self._each(model, rows):
            choices, owners = inputs.pop("choices"), inputs.pop("owners")
            logits = self._answers(model, inputs, owners, choices.clamp(min=0)[:, :-1])
            each = finite(negative_log_likelihood(logits, choices)).double().sum(1).numpy()
            parts = np.split(each, np.cumsum(self.items.counts[rows[places]])[:-1])
            for place, part in zip(places.tolist(), parts, strict=True):
                costs[place] = part
        return costs

    def _answers(self, model: PreTrainedModel, inputs: dict[str, Tensor], owners: Tensor, ids: Tensor) -> Tensor:
        """The logits of every token of the choices `(choices, tokens, vocabulary)`; `ids` are all but their last ones."""
        mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        read = model(**inputs, position_ids=places, use_cache=True, **keep)
        first: Tensor = read.logits[owners, -1:]
        if not ids.shape[1]:
            return first
        read.past_key_values.batch_select_indices(owners)
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        # What is filled up may stand beyond the last place that a model knows.
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        rest = model(
            input_ids=ids,
            attention_mask=torch.cat((mask[owners], torch.ones_like(ids)), dim=1),
            position_ids=(places[owners, -1:] + steps).clamp(max=None if most is None else most - 1),
            past_key_values=read.past_key_values,
            use_cache=True,
        )
        return torch.cat((first, rest.logits), dim=1)


class MultipleChoice(Choosing):
    """The log-likelihoods of each row's choices, a list of `(choices,)`.

    Args:
        shared: the likelihoods of the choices, for models that can go on from a context that they have read.
        apart: the same for every other model: each choice behind its context.
        sizes: what each row's likelihoods are divided by before they are compared, `(choices,)` a row.
    """

    def __init__(self, shared: SharedContext, apart: Likelihood, *, sizes: Sequence[Costs]) -> None:
        self.shared, self.apart, self.sizes = shared, apart, sizes

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> list[Costs]:
        chosen = np.arange(len(self.sizes)) if rows is None else rows
        takes = inspect.signature(model.forward).parameters
        goes_on = {"position_ids", "past_key_values"} <= takes.keys() and not model._is_stateful
        costs = self.shared(model, chosen) if goes_on else self._apart(model, chosen)
        return [-cost / self.sizes[row] for row, cost in zip(chosen, costs, strict=True)]

    def _apart(self, model: PreTrainedModel, rows: Integers) -> list[Costs]:
        ends = np.cumsum(self.shared.items.counts)
        each = [np.arange(ends[row] - self.shared.items.counts[row], ends[row]) for row in rows]
        found = self.apart(model, np.concatenate(each))
        return np.split(found, np.cumsum([len(sequences) for sequences in each])[:-1])

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (*self.shared.arrays(), *self.sizes)


def multiple_choice(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """A context and its choices a row: a choice is scored by the likelihood of its tokens after the context and a space.

    The metric normalized_accuracy divides by the choice's characters. Tokens that all choices share with the context alone
    are not scored. Long contexts lose their start. References are positions of choices.
    """
    most = reader.longest(objective)
    questions = _questions(rows, reader, most)
    shared = {"pad_id": reader.own_padding or 0, "logits": reader.vocabulary or 1, **reader.batches(objective)}
    normalized = objective.metric == "normalized_accuracy"
    runner = MultipleChoice(
        SharedContext(questions, left=True, **shared),
        Likelihood(questions.written_out(), count=negative_log_likelihood, **shared),
        sizes=[np.array([len(choice) if normalized else 1 for choice in each], dtype=np.float64) for each in rows.inputs[1]],
    )
    return Part(label=rows.label, runner=runner, references=np.array(rows.targets or (), dtype=np.int64), max_length=most)


def _questions(rows: Rows, reader: Reader, most: int) -> Questions:
    contexts = [text.rstrip() for text in rows.inputs[0]]
    texts = [f"{context} {choice}" for context, each in zip(contexts, rows.inputs[1], strict=True) for choice in each]
    whole = reader.tokens(Rows(label=rows.label, inputs=(tuple(texts),), targets=None), sys.maxsize, keep_end=True)
    alone = reader.texts(contexts, return_attention_mask=False, verbose=False)["input_ids"]
    left, choices, end = [], [], 0
    for row, (context, each) in enumerate(zip(alone, rows.inputs[1], strict=True)):
        sequences = whole.ids[end : end + len(each)]
        end += len(each)
        # Where a tokenizer melts the context's end into a choice, the choices are compared from there.
        start = min(_common(context, tokens) for tokens in sequences)
        room = most - max(len(tokens) - start for tokens in sequences)
        if start < 1 or room < 1:
            raise EvaluationError(
                f"{rows.label}: row {row}, {contexts[row][:100]!r}, has no context before its choices, or choices longer "
                f"than the {most} tokens that a row may have."
            )
        left.append(sequences[0][max(0, start - room) : start])
        choices.append(tuple(tokens[start:] for tokens in sequences))
    return Questions(contexts=Tokens(ids=tuple(left)), choices=tuple(choices))


def _common(left: Sequence[int], right: Integers) -> int:
    """Tokens that two rows start with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
