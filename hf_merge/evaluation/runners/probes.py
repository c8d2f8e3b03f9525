"""Objectives that need no data: what a model is, or costs, by itself."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.predict import evaluating

Facts = Mapping[str, float]
"""What is known of a model from how it was made, such as its `delta_norm`."""
Probe = Callable[[PreTrainedModel, Facts], float]

READ, WRITTEN, REPEATS = 64, 16, 5
"""Latency: tokens that a model reads, tokens that it then generates, and timed runs of which the median counts."""


def size(model: PreTrainedModel, facts: Facts) -> float:
    """The number of parameters, tied ones once."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def delta_norm(model: PreTrainedModel, facts: Facts) -> float:
    """The sum of the absolute differences from the base. It is a fact of the merge: the model does not know its base."""
    if "delta_norm" not in facts:
        raise EvaluationError("delta_norm is computed while merging: it has to be given among the facts of `measure`.")
    return float(facts["delta_norm"])


def latency(model: PreTrainedModel, facts: Facts) -> float:
    """Seconds for a generated token, or for a row of a model that does not generate, one row at a time. Noisy: it is measured.

    A model that generates reads 64 tokens and writes 16; another one reads 64 tokens, or an image of its size.
    """
    inputs = _inputs(model)
    generates = model.can_generate() and "input_ids" in inputs
    own: Any = getattr(model, "generation_config", None)
    settings = GenerationConfig(
        max_new_tokens=WRITTEN,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None) or 0,
    )
    times = []
    with torch.inference_mode(), evaluating(model):
        try:
            if generates:
                model.generation_config = settings
            for _ in range(1 + REPEATS):  # the first one warms up
                start = time.perf_counter()
                _ = model.generate(**inputs) if generates else model(**inputs)  # type: ignore[operator]
                _finish(model.device)
                times.append(time.perf_counter() - start)
        finally:
            if generates:
                model.generation_config = own
    return statistics.median(times[1:]) / (WRITTEN if generates else 1)


PROBES: Mapping[str, Probe] = {"size": size, "delta_norm": delta_norm, "latency": latency}
"""By the name of the metric."""


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    text = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        side, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=model.device, dtype=model.dtype)}
    most = getattr(text, "max_position_embeddings", None) or READ + WRITTEN
    ids = np.random.default_rng(0).integers(0, text.vocab_size, min(READ, max(1, most - WRITTEN)))
    row = torch.from_numpy(ids)[None].to(model.device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def _finish(device: torch.device) -> Any:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
