"""A class for each image."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import EvaluationError
from hf_merge.evaluation.classes import class_ids
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import Integers
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.runners.classification import Classification

_PATCH = 16 * 16  # pixels that cost about as much as a token
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """Images as the model takes them, `(n, channels, height, width)` float32."""

    values: NDArray[np.float32]

    @property
    def lengths(self) -> Integers:
        height, width = self.values.shape[-2:]
        return np.full(len(self.values), max(1, height * width // _PATCH), dtype=np.int64)

    def batch(self, rows: Integers, *, pad_id: int, left: bool) -> dict[str, Tensor]:
        """`pixel_values`; all images are of one size, so nothing is padded."""
        return {"pixel_values": torch.from_numpy(self.values[rows])}

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield self.values


def load_image_processor(checkpoint: Checkpoint) -> BaseImageProcessor | None:
    """A checkpoint's image processor at its commit; None if it has none.

    Raises:
        EvaluationError: it has one that transformers cannot load.
    """
    if not {"preprocessor_config.json", "processor_config.json"} & checkpoint.files.sizes.keys():
        return None
    ref = checkpoint.ref
    where, revision = (str(ref.path), None) if ref.is_local else (ref.id, ref.revision)
    try:
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(where, revision=revision, token=checkpoint.api.token)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EvaluationError(f"{checkpoint.label}: its image processor cannot be loaded: {error}") from error
    return processor


def image_classification(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """An image a row, processed once and kept (about 0.6 MB each at 224 x 224 pixels); classes as in text-classification."""
    labels, classes, positional = reader.labels(objective)
    assert reader.processor is not None
    images, parts = [image.convert("RGB") for image in rows.inputs[0]], []
    for start in range(0, len(images), _AT_ONCE):
        try:
            found = reader.processor(images=images[start : start + _AT_ONCE], return_tensors="np")["pixel_values"]
        except Exception as error:  # whatever a processor raises
            raise EvaluationError(
                f"{rows.label}: the image processor failed: {type(error).__name__}: {error}. It has to bring all images to one "
                "size."
            ) from error
        parts.append(np.asarray(found, dtype=np.float32))
    runner = Classification(Pixels(values=np.concatenate(parts)), classes=classes, pad_id=0, **reader.batches(objective))
    return Part(label=rows.label, runner=runner, references=class_ids(rows, labels, positional=positional), labels=labels)
