"""Prepared requests of lm-evaluation-harness, answered by a model in memory."""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.predict import Integers, Runner, evaluating

# An extra: everything else here works without it.
_MODELS: Any = import_module("lm_eval.models.huggingface") if find_spec("lm_eval") else None


class HarnessRunner(Runner):
    """Lets the harness's own `HFLM` answer prepared requests: the model as it is in memory, nothing loaded again.

    Gives each row's number, or whatever the metric's aggregation takes. `batch_size` is the most requests that run at once;
    it shrinks when memory runs out, and stays small.
    """

    def __init__(
        self,
        requests: Sequence[Sequence[Any]],
        judge: Callable[[Sequence[Any]], Any],
        filters: Sequence[Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None,
    ) -> None:
        self._requests, self._judge, self._filters = requests, judge, filters
        self._tokenizer = copy.deepcopy(tokenizer)  # HFLM may give it a padding token
        self._batch_size, self._max_length = batch_size, max_length

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> list[Any]:
        """The rows' numbers in the order of `rows`.

        Raises:
            EvaluationError: the harness fails on this model, or the model gives NaN.
        """
        chosen = range(len(self._requests)) if rows is None else rows.tolist()
        while True:
            asked = [[replace(request, resps=[], filtered_resps={}) for request in self._requests[row]] for row in chosen]
            try:
                with quiet(), evaluating(model):
                    self._answer(model, [request for row in asked for request in row])
                    return [self._judge(row) for row in asked]
            except EvaluationError:
                raise
            except Exception as error:  # whatever the harness, its filters or a task's own functions raise
                if self._batch_size == 1 or not should_reduce_batch_size(error):
                    raise EvaluationError(f"The harness failed: {type(error).__name__}: {error}") from error
            self._batch_size = (self._batch_size + 1) // 2
            clear_device_cache(garbage_collection=True)

    def arrays(self) -> Iterator[NDArray[Any]]:
        """The requests."""
        for row in self._requests:
            for request in row:
                yield np.frombuffer(json.dumps([request.request_type, request.args], default=plain).encode(), dtype=np.uint8)

    def _answer(self, model: PreTrainedModel, requests: Sequence[Any]) -> None:
        reader = _MODELS.HFLM(
            pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size, max_length=self._max_length
        )
        kinds: dict[str, list[Any]] = {}
        for request in requests:
            kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
        for kind, repeated in kinds.items():
            for request, answer in zip(repeated, getattr(reader, kind)(repeated, disable_tqdm=True), strict=True):
                first = answer[0] if isinstance(answer, tuple) else answer
                if isinstance(first, float) and np.isnan(first):
                    raise EvaluationError("The model gives values that are NaN.")
                request.resps.append(answer)
        for one in self._filters:
            one.apply(requests)


def plain(value: object) -> str:
    """What JSON cannot hold (pictures, dates, functions) by type and content, never by address."""
    content = value.tobytes() if hasattr(value, "tobytes") else getattr(value, "__name__", None) or str(value)
    return f"{type(value).__name__} {content!r}"


@contextmanager
def quiet() -> Iterator[None]:
    """The harness without its notes of progress, which it gives as warnings too."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
