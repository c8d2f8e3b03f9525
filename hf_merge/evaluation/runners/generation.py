"""Greedy continuations, of causal models and of models with an encoder and a decoder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import BatchRunner, Integers, Tokens
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows

_KEPT = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


class TextGeneration(BatchRunner):
    """The greedy continuation of each row as text, without special tokens, `(n,)`.

    The model's own stop tokens end it; everything else in its generation config (sampling, beams, penalties, lengths) is set
    aside while it runs.
    """

    def __init__(self, items: Tokens, *, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": False}

    def _predict(self, model: PreTrainedModel, rows: Integers) -> list[str]:
        texts = [""] * len(rows)
        with self._greedy(model):
            for places, inputs in self._each(model, rows):
                inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
                generated: Any = model.generate(**inputs)  # type: ignore[operator]
                decoded = self._decoded(inputs["input_ids"], generated, model.config.is_encoder_decoder)
                for place, text in zip(places.tolist(), decoded, strict=True):
                    texts[place] = text
        return texts

    def _decoded(self, prompts: Tensor, generated: Tensor, apart: bool) -> list[str]:
        """What was generated as texts; unless it stands `apart`, behind the prompts."""
        return self.tokenizer.batch_decode(generated if apart else generated[:, prompts.shape[1] :], skip_special_tokens=True)

    @contextmanager
    def _greedy(self, model: PreTrainedModel) -> Iterator[None]:
        own = model.generation_config
        kept = {name: getattr(own, name, None) for name in _KEPT}
        if kept["eos_token_id"] is None:
            kept["eos_token_id"] = self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, num_beams=1, pad_token_id=self.pad_id, **self.sampling, **kept
        )
        try:
            yield
        finally:
            model.generation_config = own


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
        pad_id=next(value for value in found if value is not None),
        left=causal,
        **reader.batches(objective),
    )
    return Part(label=rows.label, runner=runner, references=list(rows.targets or ()), max_length=most)
