"""Running a model over fixed rows, in batches of rows of similar length: what the runners of all tasks share."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_merge.errors import EvaluationError

# Tokens of a batch. On a CPU more than fits into the caches makes it slower; on an accelerator fewer leave it idle.
_TOKENS_ON_CPU, _TOKENS = 1024, 16384
LOGITS = 2**27  # entries (tokens x vocabulary) of one batch: half a gigabyte in float32
IGNORED = -100  # what cross_entropy passes over

Integers = NDArray[np.int64]
Places = Integers
"""Positions within the rows that are run."""


class Items(Protocol):
    """What a model reads, row by row."""

    @property
    def lengths(self) -> Integers:
        """Tokens of each row `(n,)`, or what costs as much."""

    def batch(self, rows: Integers, *, pad_id: int, left: bool) -> dict[str, Tensor]:
        """These rows as the model's keyword arguments, padded to one width."""

    def arrays(self) -> Iterator[NDArray[Any]]:
        """Everything that a model may read, for a fingerprint."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Tokenized rows: `ids` `(n,)` of arrays, and `types` alike for models that tell the texts of a pair apart.

    `targets`, if there are any, stand for each position's right token (`IGNORED` where nothing is predicted).
    """

    ids: tuple[Integers, ...]
    types: tuple[Integers, ...] | None = None
    targets: tuple[Integers, ...] | None = None

    @property
    def lengths(self) -> Integers:
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def batch(self, rows: Integers, *, pad_id: int, left: bool) -> dict[str, Tensor]:
        """`input_ids`, and what there is of `token_type_ids`, `targets` and `attention_mask` (where something is padded)."""
        lengths = np.array([len(self.ids[i]) for i in rows])
        width = int(lengths.max())
        columns = np.arange(width)
        real = columns >= (width - lengths)[:, None] if left else columns < lengths[:, None]

        def padded(values: Sequence[Integers], fill: int) -> Tensor:
            table = np.full(real.shape, fill, dtype=np.int64)
            table[real] = np.concatenate([values[i] for i in rows])
            return torch.from_numpy(table)

        found = {"input_ids": padded(self.ids, pad_id)}
        if self.types is not None:
            found["token_type_ids"] = padded(self.types, 0)
        if self.targets is not None:
            found["targets"] = padded(self.targets, IGNORED)
        if not real.all():
            found["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return found

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (self.lengths, *self.ids, *(self.types or ()), *(self.targets or ()))


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


class Runner(ABC):
    """A task's inference over fixed rows: `runner(model)` gives one finding a row, `runner(model, rows)` those of some rows.

    `answers` makes of findings the predictions that metrics take. `divisible` says whether running some rows costs only their
    share.
    """

    divisible: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> Any:
        """Findings `(rows, …)` in the order of `rows`; all rows in their own order if there are none given."""

    def answers(self, found: Any) -> Any:
        """The predictions, one for each finding: unless a runner says otherwise, the findings themselves."""
        return found

    def margins(self, found: Any, references: Any) -> NDArray[np.float32] | None:
        """By how much the right answer of each row leads, `(n,)`; None where an answer is not one of several."""
        return None

    @abstractmethod
    def arrays(self) -> Iterator[NDArray[Any]]:
        """Everything that a model may read, for a fingerprint."""


class BatchRunner(Runner):
    """A runner that is one pass of the model over `items`. Keeps nothing of the models that it runs.

    Args:
        items: the rows.
        pad_id: what short rows are filled up with; None forbids padding, so that batches hold rows of one length.
        batch_size: the most rows of a batch.
        logits: entries of the logits of one token, if they are kept for every token.
        left: whether the padding stands before the row.
        progress: whether to show a bar when a run takes longer than a few seconds.
    """

    def __init__(
        self,
        items: Items,
        *,
        pad_id: int | None,
        batch_size: int,
        logits: int = 1,
        left: bool = False,
        progress: bool = False,
    ) -> None:
        self.items, self.pad_id, self.left, self.progress = items, pad_id, left, progress
        self._rows, self._logits, self._share = batch_size, logits, 1.0

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> Any:
        """Findings of the model. Batches shrink when memory runs out, and stay small."""
        chosen = np.arange(len(self.items.lengths)) if rows is None else rows
        while True:
            try:
                with torch.inference_mode(), evaluating(model), _padding(model.config, self.pad_id):
                    return self._predict(model, chosen)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or not self._shrink(model, chosen):
                    raise
            clear_device_cache(garbage_collection=True)  # out here the error no longer holds the failed run's tensors

    def arrays(self) -> Iterator[NDArray[Any]]:
        """What the items hold."""
        return self.items.arrays()

    @abstractmethod
    def _predict(self, model: PreTrainedModel, rows: Integers) -> Any:
        """Findings for `rows`, in inference mode."""

    def _shrink(self, model: PreTrainedModel, rows: Integers) -> bool:
        large = any(len(places) > 1 for places in self._groups(model, self.items.lengths[rows]))
        self._share /= 2
        return large

    def _groups(self, model: PreTrainedModel, lengths: Integers) -> list[Places]:
        tokens = min(_TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS, LOGITS // self._logits)
        return cut(
            lengths,
            rows=max(1, int(self._rows * self._share)),
            tokens=int(tokens * self._share),
            exact=self.pad_id is None,
        )

    def _each(
        self, model: PreTrainedModel, rows: Integers, items: Items | None = None
    ) -> Iterator[tuple[Places, dict[str, Tensor]]]:
        """The batches of these rows: their places and the model's keyword arguments, on its device and in its precision.

        Of the runner's items, unless others are given.
        """
        items = self.items if items is None else items
        groups = self._groups(model, items.lengths[rows])
        for places in tqdm(groups, disable=not self.progress, delay=5, leave=False, unit="batch"):
            tensors = items.batch(rows[places], pad_id=self.pad_id or 0, left=self.left)
            yield places, {name: _on(model, tensor) for name, tensor in tensors.items()}


class Choosing(Runner):
    """A runner that finds how likely each of several answers is, `(n, answers)` or a list of `(answers,)`: the likeliest, by
    its position, is the prediction, `(n,)` int64."""

    def answers(self, found: Sequence[NDArray[Any]]) -> Integers:
        """The positions of the likeliest; the first of equals."""
        return _table(found).argmax(1)

    def margins(self, found: Sequence[NDArray[Any]], references: Integers) -> NDArray[np.float32]:
        """What the right answer has more than the likeliest other one; 1 where there is no other one."""
        others, rows = _table(found), np.arange(len(found))
        right = others[rows, references]
        others[rows, references] = -np.inf
        leads = right - others.max(1)
        return np.where(np.isfinite(leads), leads, 1.0).astype(np.float32)


def _table(found: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Rows `(n, longest)`; what short ones lack is minus infinity."""
    table = np.full((len(found), max(map(len, found), default=1)), -np.inf)
    if isinstance(found, np.ndarray):
        table[:] = found
    else:
        for row, each in zip(table, found, strict=True):
            row[: len(each)] = each
    return table


def _on(model: PreTrainedModel, tensor: Tensor) -> Tensor:
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True)


def finite(values: Tensor) -> Tensor:
    """Values on the CPU. Raises `EvaluationError` if one is NaN or infinite."""
    found = values.cpu()
    if not found.isfinite().all():
        raise EvaluationError("The model gives values that are NaN or infinite.")
    return found


def in_order(parts: Sequence[tuple[Places, Tensor]]) -> Tensor:
    """Finite results of batches, `(n, …)`, in the order of the rows, on the CPU."""
    found = finite(torch.cat([values for _, values in parts]))
    ordered = torch.empty_like(found)
    ordered[torch.from_numpy(np.concatenate([places for places, _ in parts]))] = found
    return ordered


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], dimensions: int, what: str) -> Tensor:
    """The model's logits. Raises `EvaluationError` unless they have so many dimensions, which are `what` in words."""
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    logits: Tensor | None = getattr(model(**inputs, **without_cache), "logits", None)
    if logits is None or logits.ndim != dimensions:
        given = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
        raise EvaluationError(f"{type(model).__name__} gives {given}, expected {what}.")
    return logits


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
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
