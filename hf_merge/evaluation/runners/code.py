"""Programs that a causal model writes: greedy ones, or several drawn ones of each prompt."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.code import STOPS, completion_of, run_program
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import Integers
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.runners.drafts import Answer
from hf_merge.evaluation.runners.generation import TextGeneration, text_generation

ARGUMENTS = ("program", "samples", "temperature", "stops")


class CodeGeneration(TextGeneration):
    """Completions of each row as code (see `completion_of`), `(n,)` lists of `samples`.

    One is greedy. Several are drawn at `temperature` from the likeliest 95 % (nucleus sampling); the draws of a row are the
    same for every model and every run, as long as batches are.
    """

    def __init__(self, *args: Any, samples: int, temperature: float, stops: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples, self.stops, self.temperature = samples, tuple(stops), temperature
        if samples > 1:
            self._drafts = None
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> list[list[str]]:
        """The completions of each row."""
        drawn = [self._draw(model, rows, seed) for seed in range(self.samples)]
        return [[completion_of(text, self.stops) for text in texts] for texts in zip(*drawn, strict=True)]

    def arrays(self) -> Iterator[NDArray[Any]]:
        """What the items hold, and how answers are drawn from it."""
        settings = [self.samples, self.temperature if self.samples > 1 else None, self.stops]
        yield from super().arrays()
        yield np.frombuffer(json.dumps(settings).encode(), dtype=np.uint8)

    def _draw(self, model: PreTrainedModel, rows: Integers | None, seed: int) -> list[str]:
        kind = model.device.type
        with torch.random.fork_rng([] if kind == "cpu" else [model.device], device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(seed)
            texts: list[str] = super().__call__(model, rows)
        return texts

    def _decoded(self, prompts: Sequence[Integers], answers: Sequence[Answer]) -> list[str]:
        # A tokenizer may strip the space that a text begins with, and with it the indentation of a continuation alone.
        both = [[*prompt.tolist(), *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        whole = self.tokenizer.batch_decode(both, skip_special_tokens=True)
        before = self.tokenizer.batch_decode([prompt.tolist() for prompt in prompts], skip_special_tokens=True)
        return [text[len(prompt) :] for text, prompt in zip(whole, before, strict=True)]


def code_generation(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """A prompt a row; references are the programs that test what is written.

    Raises:
        EvaluationError: an argument makes no sense, or programs cannot be shut in on this machine.
    """
    given = {"samples": objective.metric_arguments.get("k", 1), "temperature": 0.8, "stops": STOPS}
    given |= dict(objective.task_arguments)
    wrong = [unknown("task argument of code-generation", name, ARGUMENTS) for name in given if name not in ARGUMENTS]
    samples, temperature, least = given["samples"], given["temperature"], objective.metric_arguments.get("k", 1)
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        wrong.append(f"`k` of pass@k is a positive whole number, got {least!r}.")
    elif isinstance(samples, bool) or not isinstance(samples, int) or samples < least:
        wrong.append(f"`samples` is a whole number, at least the {least} of pass@k, got {samples!r}.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        wrong.append(f"`temperature` is a positive number, got {temperature!r}.")
    if wrong:
        raise EvaluationError("\n".join(wrong))
    run_program("")  # raises where there is no sandbox
    kind = partial(CodeGeneration, samples=samples, temperature=float(temperature), stops=given["stops"])
    return text_generation(objective, rows, reader, kind)
