"""A checkpoint's tensors as sources: as they are stored, or dequantized where the checkpoint says how."""

from collections.abc import Mapping

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.quantized import dequantized
from hf_merge.checkpoints.source import Source, Stored


def tensors(checkpoint: Checkpoint) -> Mapping[str, Source]:
    """Every tensor by name, in the checkpoint's order; scales and the like are not among them.

    Raises `CheckpointError` for a quantized checkpoint that cannot be read as numbers.
    """
    if "tensors" not in checkpoint.kept:
        found = dequantized(checkpoint) or {name: Stored(checkpoint, name) for name in checkpoint.index.tensors}
        checkpoint.kept["tensors"] = found
    known: Mapping[str, Source] = checkpoint.kept["tensors"]
    return known
