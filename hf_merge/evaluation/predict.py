"""Running a model over tokenized rows: one runner for each task, batches of rows of similar length."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError

# Tokens of a batch. On a CPU more than fits into the caches makes it slower; on an accelerator fewer leave it idle.
_TOKENS_ON_CPU, _TOKENS = 1024, 16384
_LOGITS = 2**27  # entries (tokens x vocabulary) of one batch: half a gigabyte in float32
_IGNORED = -100  # what cross_entropy passes over
_KEPT = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokenized rows: `ids` `(n,)` of arrays, and `types` alike for models that tell the texts of a pair apart."""

    ids: tuple[Integers, ...]
    types: tuple[Integers, ...] | None = None

    @property
    def lengths(self) -> Integers:
        """Tokens of each row `(n,)`."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some rows, by their numbers, padded to one width. `attention_mask` is None where nothing is padded."""

    rows: Integers
    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "token_type_ids": self.token_type_ids}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in named.items() if tensor is not None}


def cut(lengths: Integers, *, rows: int, tokens: int, exact: bool = False) -> list[Integers]:
    """Row numbers in batches of at most `rows` rows and `tokens` padded tokens (or one row), longest rows first.

    With `exact` the rows of a batch are equally long, so that nothing is padded. Longest first: memory that does not
    suffice runs out at once.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths[order].tolist()
    batches, start = [], 0
    while start < len(order):
        width = max(sizes[start], 1)
        end = min(start + max(1, min(rows, tokens // width)), len(order))
        if exact:
            end = next((i for i in range(start, end) if sizes[i] != sizes[start]), end)
        batches.append(order[start:end])
        start = end
    return batches


class Runner:
    """A task's inference over fixed rows. Keeps tokens and batches, and nothing of the models that it runs.

    Args:
        tokens: the rows.
        pad_id: what short rows are filled up with; None forbids padding, so that batches hold rows of one length.
        batch_size: the most rows of a batch.
        logits: entries of the logits of one token, if they are kept for every token.
        left: whether the padding stands before the row.
        progress: whether to show a bar when a run takes longer than a few seconds.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        pad_id: int | None,
        batch_size: int,
        logits: int = 1,
        left: bool = False,
        progress: bool = False,
    ) -> None:
        self.tokens, self.pad_id, self.left, self.progress = tokens, pad_id, left, progress
        self._rows, self._logits, self._share = batch_size, logits, 1.0
        self._batches: list[Batch] | None = None

    def __call__(self, model: PreTrainedModel) -> Any:
        """Predictions of the model, one a row, in the rows' order. Batches shrink when memory runs out, and stay small."""
        while True:
            try:
                with torch.inference_mode(), _evaluating(model), _padding(model.config, self.pad_id):
                    return self._predict(model)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or not self._shrink():
                    raise
            clear_device_cache(garbage_collection=True)  # out here the error no longer holds the failed run's tensors

    def _predict(self, model: PreTrainedModel) -> Any:
        raise NotImplementedError

    def _shrink(self) -> bool:
        large = self._batches is not None and any(len(batch.rows) > 1 for batch in self._batches)
        self._share, self._batches = self._share / 2, None
        return large

    def _each(self, model: PreTrainedModel) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        device = model.device
        if self._batches is None:
            tokens = min(_TOKENS_ON_CPU if device.type == "cpu" else _TOKENS, _LOGITS // self._logits)
            groups = cut(
                self.tokens.lengths,
                rows=max(1, int(self._rows * self._share)),
                tokens=int(tokens * self._share),
                exact=self.pad_id is None,
            )
            self._batches = [self._batch(rows) for rows in groups]
        for batch in tqdm(self._batches, disable=not self.progress, delay=5, leave=False, unit="batch"):
            yield batch, batch.inputs(device)

    def _batch(self, rows: Integers) -> Batch:
        lengths = np.array([len(self.tokens.ids[i]) for i in rows])
        width = int(lengths.max())
        columns = np.arange(width)
        real = columns >= (width - lengths)[:, None] if self.left else columns < lengths[:, None]

        def padded(values: Sequence[Integers], fill: int) -> Tensor:
            table = np.full(real.shape, fill, dtype=np.int64)
            table[real] = np.concatenate([values[i] for i in rows])
            return torch.from_numpy(table)

        return Batch(
            rows=rows,
            input_ids=padded(self.tokens.ids, self.pad_id or 0),
            attention_mask=None if real.all() else torch.from_numpy(real.astype(np.int64)),
            token_type_ids=None if self.tokens.types is None else padded(self.tokens.types, 0),
        )

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Results of the batches, `(n, …)`, in the order of the rows, on the CPU."""
        assert self._batches is not None
        found = torch.cat(list(parts)).cpu()
        ordered = torch.empty_like(found)
        ordered[torch.from_numpy(np.concatenate([batch.rows for batch in self._batches]))] = found
        return ordered


class TextClassification(Runner):
    """The class of each row: the position in `classes` of the largest logit among those that `classes` names, `(n,)` int64."""

    def __init__(self, tokens: Tokens, *, classes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(tokens, **kwargs)
        self.classes = torch.tensor(classes)

    def _predict(self, model: PreTrainedModel) -> Integers:
        parts = []
        keywords = _without_cache(model)
        for _, inputs in self._each(model):
            logits = model(**inputs, **keywords).logits
            if logits.ndim != 2:
                raise EvaluationError(f"{type(model).__name__} gives logits {tuple(logits.shape)}, expected (rows, classes).")
            parts.append(logits[:, self.classes.to(logits.device)])
        logits = self._in_order(parts)
        if not logits.isfinite().all():
            raise EvaluationError("The model gives logits that are NaN or infinite.")
        return logits.argmax(1).numpy()


class LanguageModeling(Runner):
    """What `count` finds at each predicted token, summed over a row, `(n,)` float64. The first token is not predicted."""

    def __init__(self, tokens: Tokens, *, count: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(tokens, **kwargs)
        self.count = count

    def _predict(self, model: PreTrainedModel) -> NDArray[np.float64]:
        parts = []
        keywords = _without_cache(model)
        for _, inputs in self._each(model):
            targets = inputs["input_ids"].roll(-1, dims=1)
            targets[:, -1] = _IGNORED
            if (mask := inputs.get("attention_mask")) is not None:
                targets[:, :-1][mask[:, 1:] == 0] = _IGNORED
            logits = model(**inputs, **keywords).logits
            if logits.ndim != 3:
                raise EvaluationError(
                    f"{type(model).__name__} gives logits {tuple(logits.shape)}, expected one for every token."
                )
            parts.append(self.count(logits, targets).cpu().double().sum(1))
        sums = self._in_order(parts)
        if not sums.isfinite().all():
            raise EvaluationError("The model gives logits that are NaN or infinite.")
        return sums.numpy()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target `(b, t)` in nats, 0 where it is ignored."""
    each = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="none")
    return each.view_as(targets)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's `(b, t)`, NaN where there is none, else 0."""
    best, found = logits.max(-1)
    return torch.where(best.isnan() & (targets != _IGNORED), torch.nan, (found == targets).float())


class TextGeneration(Runner):
    """The greedy continuation of each row as text, without special tokens, `(n,)`.

    The model's own stop tokens end it; everything else in its generation config (sampling, beams, penalties, lengths) is set
    aside while it runs.
    """

    def __init__(self, tokens: Tokens, *, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **kwargs: Any) -> None:
        super().__init__(tokens, **kwargs)
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens

    def _predict(self, model: PreTrainedModel) -> list[str]:
        texts = [""] * len(self.tokens.ids)
        with self._greedy(model):
            for batch, inputs in self._each(model):
                inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
                generated: Any = model.generate(**inputs)  # type: ignore[operator]
                if not model.config.is_encoder_decoder:
                    generated = generated[:, batch.input_ids.shape[1] :]
                decoded = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
                for row, text in zip(batch.rows.tolist(), decoded, strict=True):
                    texts[row] = text
        return texts

    @contextmanager
    def _greedy(self, model: PreTrainedModel) -> Iterator[None]:
        own = model.generation_config
        kept = {name: getattr(own, name, None) for name in _KEPT}
        if kept["eos_token_id"] is None:
            kept["eos_token_id"] = self.tokenizer.eos_token_id
        model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=self.pad_id, **kept
        )
        try:
            yield
        finally:
            model.generation_config = own


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _padding(config: PreTrainedConfig, pad_id: int | None) -> Iterator[None]:
    """Lets decoders classify batches without a padding token: their heads look for the last token that is not padding."""
    text = config.get_text_config()
    if pad_id is not None or getattr(text, "pad_token_id", None) is not None:
        yield
        return
    text.pad_token_id = -1
    try:
        yield
    finally:
        text.pad_token_id = None


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
