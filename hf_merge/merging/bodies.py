"""What each of a recipe's models gives: the tensors of a full model, or what an adapter makes of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from hf_merge.checkpoints.adapters import Adapter, is_adapter
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.low_rank import Adapted, Recent
from hf_merge.checkpoints.source import Source, Zeros
from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import tied_names
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe


@dataclass(frozen=True)
class Body:
    """One of a recipe's models: the full model `checkpoint` whose names and shapes it has, and the `adapter` on it."""

    checkpoint: Checkpoint
    adapter: Checkpoint | None = None

    def sources(self, base: Checkpoint | None, private: bool) -> Mapping[str, Source]:
        """Its tensors by name. An adapter on `base`, the model that differences are from, gives differences, without reading it;
        any other gives full tensors.

        Raises `CheckpointError` for an adapter that does not fit its model.
        """
        own = tensors(self.checkpoint)
        if self.adapter is None:
            return own
        # Where no tensor may be a tied copy of another, transformers need not be asked.
        tied = tied_names(self.checkpoint) if self.checkpoint.config.get("tie_word_embeddings") is not False else {}
        changed = Adapter(self.adapter).sources(own, own.__getitem__, tied, private=private)
        full = partial(_full, recent=Recent())
        return {
            name: _as_stored(source, own.get(name)) if self.checkpoint is base else full(source, own.get(name))
            for name, source in changed.items()
        }


def _as_stored(source: Source, own: Source | None) -> Source:
    """What is no number (an integer buffer) is the model's own."""
    return source if own is None or own.dtype.is_floating_point else own


def _full(source: Source, own: Source | None, recent: Recent) -> Source:
    if own is None or not source.delta:
        return source
    return own if isinstance(source, Zeros) else Adapted(own, source, None, False, recent)


def bodies_of(recipe: Recipe, opened: Mapping[ModelRef, Checkpoint]) -> dict[str, Body]:
    """Each model of the recipe by name. Raises `MergeError` for an adapter alone in a recipe without a base."""
    found = {}
    for model in recipe.models:
        checkpoint = opened[model.ref.plain]
        if model.ref.adapter is not None:
            found[model.name] = Body(checkpoint, opened[model.ref.adapter])
        elif not is_adapter(checkpoint.files):
            found[model.name] = Body(checkpoint)
        elif recipe.base is None:
            raise MergeError(
                f"{checkpoint.label} is an adapter: give the model that it belongs to as `base`, or write model+adapter."
            )
        else:
            found[model.name] = Body(opened[recipe.base.plain], checkpoint)
    return found
