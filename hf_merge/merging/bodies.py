"""What each of a recipe's models gives: the tensors of a full model, or what an adapter makes of one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hf_merge.checkpoints.adapter_config import CONFIG
from hf_merge.checkpoints.adapters import Adapter, is_adapter
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.low_rank import Adapted, LowRank, Recent
from hf_merge.checkpoints.source import Source, Zeros
from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import tied_names
from hf_merge.merging.targets import Target
from hf_merge.merging.vocabulary import VocabularyPlan
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """The adapter in a repository, opened once: a search plans a merge of it for every trial."""
    if "adapter" not in checkpoint.kept:
        checkpoint.kept["adapter"] = Adapter(checkpoint)
    known: Adapter = checkpoint.kept["adapter"]
    return known


@dataclass(frozen=True)
class Body:
    """One of a recipe's models: the full model `checkpoint` whose names and shapes it has, and the `adapter` on it."""

    checkpoint: Checkpoint
    adapter: Checkpoint | None = None

    def sources(self, base: Checkpoint | None, private: bool) -> Mapping[str, Source]:
        """Its tensors by name. An adapter on `base`, the model that differences are from, gives differences, without reading
        it; any other gives full tensors.

        Raises `CheckpointError` for an adapter that does not fit its model.
        """
        own = tensors(self.checkpoint)
        if self.adapter is None:
            return own
        # Where no tensor may be a tied copy of another, transformers need not be asked.
        tied = tied_names(self.checkpoint) if self.checkpoint.config.get("tie_word_embeddings") is not False else {}
        changed = adapter_of(self.adapter).sources(own, own.__getitem__, tied, private=private)
        full = partial(_full, recent=Recent())
        return {
            name: _as_stored(source, own.get(name)) if self.checkpoint is base else full(source, own.get(name))
            for name, source in changed.items()
        }


def _as_stored(source: Source, own: Source | None) -> Source:
    """What is no number (an integer buffer) is the model's own."""
    return source if own is None or own.dtype.is_floating_point else own


def _full(source: Source, own: Source | None, recent: Recent) -> Source:
    if own is not None and isinstance(source, Zeros):
        return own
    return Adapted(own, source, None, False, recent) if own is not None and isinstance(source, LowRank) else source


def bodies_of(recipe: Recipe, opened: Mapping[ModelRef, Checkpoint]) -> dict[str, Body]:
    """Each model of the recipe by name. Raises `MergeError` for an adapter where a full model is needed: as the base, under
    another adapter, or alone in a recipe without a base."""
    found = {}
    for ref in (recipe.base, *(model.ref for model in recipe.models if model.ref.adapter)):
        if ref is not None and is_adapter(opened[ref.plain].files):
            trained_on = (opened[ref.plain].json(CONFIG) or {}).get("base_model_name_or_path")
            hint = f", which is {trained_on}" if trained_on else ""
            raise MergeError(f"{opened[ref.plain].label} is an adapter, and a full model is needed there: take its base{hint}.")
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


def heads_of_adapters(
    targets: Iterable[Target],
    views: Mapping[str, Mapping[str, Source]],
    models: Mapping[str, int],
    stored: list[dict[str, Source]],
) -> Iterator[Target]:
    """Targets for what adapters trained besides their model's tensors, each with its first owner; put into `stored`, too."""
    taken = {target.name for target in targets}
    for model, view in views.items():
        for name in [name for name in view if name not in stored[models[model]] and name not in taken]:
            taken.add(name)
            stored[models[model]][name] = view[name]
            yield Target(name, ((models[model], name),), (), None)


def by_token(
    target: Target,
    sources: list[Source],
    base: Source | None,
    like: Source,
    vocabulary: VocabularyPlan,
    stored: Sequence[Mapping[str, Source]],
) -> tuple[list[Source], Source | None, Source]:
    """The `sources` of a target, the base's and the primary's (`like`), in the rows of the result's vocabulary; `stored` are
    every model's tensors. Raises `MergeError` for an adapter that resized the vocabulary.
    """
    found: list[Source | None] = [None] * len(stored)
    for i, at in target.sources:
        found[i] = stored[i][at]
    if target.base and base:
        found[target.base[0]] = base
    found[0] = like
    rows = vocabulary.realigned(found)

    def realigned(i: int, source: Source) -> Source:
        own = found[i] or like
        if source is own:
            return rows[i] or like
        if source.shape != own.shape:
            raise MergeError(
                f"{source.label} has shape {list(source.shape)}, in its model it is {list(own.shape)}: an adapter that resized "
                "the vocabulary cannot be merged into another one. Merge it into its model first."
            )
        return vocabulary.realigned([*found[:i], source, *found[i + 1 :]])[i] or source

    merged = [realigned(i, source) for (i, _), source in zip(target.sources, sources, strict=False)]
    return merged, rows[target.base[0]] if target.base else None, rows[0] or like
