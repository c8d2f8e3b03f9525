"""Greedy continuations, of causal models and of models with an encoder and a decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import LOGITS, BatchRunner, Integers, Tokens
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.runners.drafts import Answer, Drafts, follows

_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_KEPT = ("bos_token_id", "eos_token_id", "decoder_start_token_id", *_FORCED)
_PASSES = 6  # over guesses and their corrections
Ends = frozenset[int]
"""The tokens that end an answer."""


class TextGeneration(BatchRunner):
    """The greedy continuation of each row as text, without special tokens, `(n,)`.

    The model's own stop tokens end it; everything else in its generation config (sampling, beams, penalties, lengths) is set
    aside while it runs. With `speculative`, a causal model is first shown what the models before it answered, and only what it
    would answer otherwise is generated (see `drafts`). `vocabulary` counts the tokens that the models know.
    """

    def __init__(
        self,
        items: Tokens,
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        vocabulary: int,
        speculative: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(items, **kwargs)
        self.prompts, self.tokenizer, self.max_new_tokens = items.ids, tokenizer, max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": False}
        self._vocabulary, self._drafts = vocabulary, Drafts() if speculative else None

    def _predict(self, model: PreTrainedModel, rows: Integers) -> list[str]:
        prompts, apart = [self.prompts[row] for row in rows], model.config.is_encoder_decoder
        with self._greedy(model) as (ends, forced):
            drafts = None if forced or apart else self._drafts
            started = self._checked(model, rows, drafts, ends) if drafts is not None and drafts.promising else {}
            answers = self._completed(model, prompts, started, ends)
        if drafts is not None:
            drafts.learn(rows, answers)
        return self._decoded([prompt[:0] for prompt in prompts] if apart else prompts, answers)

    def _checked(self, model: PreTrainedModel, rows: Integers, drafts: Drafts, ends: Ends) -> dict[int, Answer]:
        """What could be guessed of the answers, mostly whole ones, by their places in `rows`. Guesses are corrected and checked
        again as long as half of them turn out right, or few are left."""
        started: dict[int, Answer] = {}
        guesses = {i: guess for i, row in enumerate(rows.tolist()) if (guess := drafts.guess(row)) is not None}
        for _ in range(_PASSES):
            if not guesses:
                break
            found = {i: self._cut(answer, ends) for i, answer in self._followed(model, rows, guesses).items()}
            started |= found
            wrong = {i: answer for i, answer in found.items() if not self._ended(answer, ends)}
            if len(wrong) > max(len(found) // 2, len(rows) // 8):
                break
            # What came after the token that was wrong may come after the right one as well.
            likely = {i: drafts.guess(int(rows[i]), start) or start + guesses[i][len(start) :] for i, start in wrong.items()}
            guesses = {i: guess for i, guess in likely.items() if len(guess) > len(wrong[i])}
        return started

    def _followed(self, model: PreTrainedModel, rows: Integers, guesses: Mapping[int, Answer]) -> dict[int, Answer]:
        """What the model writes along each guess."""
        places, found = list(guesses), dict[int, Answer]()
        read = _behind([self.prompts[rows[i]] for i in places], [guesses[i][:-1] for i in places])
        for batch, inputs in self._each(model, np.arange(len(places)), read):
            own = follows(model, inputs, [guesses[places[k]] for k in batch], LOGITS // self._vocabulary)
            found |= zip((places[k] for k in batch), own, strict=True)
        return found

    def _completed(
        self, model: PreTrainedModel, prompts: Sequence[Integers], started: Mapping[int, Answer], ends: Ends
    ) -> list[Answer]:
        """All answers, generated token by token from where they have been started."""
        found = [started.get(i, ()) for i in range(len(prompts))]
        places = [i for i, answer in enumerate(found) if not self._ended(answer, ends)]
        read = _behind([prompts[i] for i in places], [found[i] for i in places])
        for batch, inputs in self._each(model, np.arange(len(places)), read):
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            left = self.max_new_tokens - min(len(found[places[k]]) for k in batch)
            generated: Any = model.generate(**inputs, max_new_tokens=left)  # type: ignore[operator]
            # Before what is new stands what was read, or the token that a decoder starts with.
            before = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            for k, tokens in zip(batch, generated[:, before:].tolist(), strict=True):
                found[places[k]] = self._cut((*found[places[k]], *tokens), ends)
        return found

    def _cut(self, answer: Answer, ends: Ends) -> Answer:
        """An answer up to its end: what follows it fills up the batch, or is another model's."""
        length = next((n for n, token in enumerate(answer, 1) if token in ends), len(answer))
        return answer[: min(length, self.max_new_tokens)]

    def _ended(self, answer: Answer, ends: Ends) -> bool:
        return len(answer) >= self.max_new_tokens or not ends.isdisjoint(answer[-1:])

    def _decoded(self, prompts: Sequence[Integers], answers: Sequence[Answer]) -> list[str]:
        """Answers to prompts as texts; the prompts are empty where the answers do not continue them."""
        found: list[str] = self.tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=True)
        return found

    @contextmanager
    def _greedy(self, model: PreTrainedModel) -> Iterator[tuple[Ends, bool]]:
        """Sets the model up; what ends its answers, and whether it is forced to begin or end with certain tokens."""
        own = model.generation_config
        kept = {name: getattr(own, name, None) for name in _KEPT}
        if kept["eos_token_id"] is None:
            kept["eos_token_id"] = self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, num_beams=1, pad_token_id=self.pad_id, **self.sampling, **kept
        )
        ends = kept["eos_token_id"]
        try:
            yield (
                frozenset([] if ends is None else np.atleast_1d(ends).tolist()),
                any(kept[name] is not None for name in _FORCED),
            )
        finally:
            model.generation_config = own


def _behind(prompts: Sequence[Integers], answers: Sequence[Answer]) -> Tokens:
    """Prompts with what is answered behind them."""
    return Tokens(ids=tuple(np.append(*each).astype(np.int64) for each in zip(prompts, answers, strict=True)))


def text_generation(
    objective: Objective, rows: Rows, reader: Reader, kind: Callable[..., TextGeneration] = TextGeneration
) -> Part:
    """A prompt a row; references are the texts that should follow."""
    causal = not reader.config.is_encoder_decoder
    most = reader.longest(objective, objective.max_new_tokens if causal else 0)
    found = [reader.texts.pad_token_id, reader.own_padding, reader.texts.eos_token_id, 0]
    runner = kind(
        # A prompt's end is what is continued, so its start gives way.
        reader.tokens(rows, most, keep_end=causal),
        tokenizer=reader.texts,
        max_new_tokens=objective.max_new_tokens,
        vocabulary=reader.vocabulary or len(reader.texts),
        speculative=objective.speculative,
        pad_id=next(value for value in found if value is not None),
        left=causal,
        **reader.batches(objective),
    )
    return Part(label=rows.label, runner=runner, references=list(rows.targets or ()), max_length=most)
