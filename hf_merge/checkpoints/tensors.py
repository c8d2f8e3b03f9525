"""A checkpoint's tensors as sources: as they are stored, or dequantized where the checkpoint says how."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.quantized import dequantized
from hf_merge.checkpoints.source import Source, Stored

_KNOWN: WeakKeyDictionary[Checkpoint, Mapping[str, Source]] = WeakKeyDictionary()


def tensors(checkpoint: Checkpoint) -> Mapping[str, Source]:
    """Every tensor by name, in the checkpoint's order; scales and the like are not among them.

    Raises `CheckpointError` for a quantized checkpoint that cannot be read as numbers.
    """
    found = _KNOWN.get(checkpoint)
    if found is None:
        found = dequantized(checkpoint) or {name: Stored(checkpoint, name) for name in checkpoint.index.tensors}
        _KNOWN[checkpoint] = found
    return found
