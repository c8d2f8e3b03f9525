"""A model in memory whose parameters take a new recipe in place: no disk, no reload."""

import math
import os
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import MergeError
from hf_merge.merging.align import align
from hf_merge.merging.architecture import known_config, model_class, without_bars
from hf_merge.merging.merger import Merger, merge_into, pieces_of
from hf_merge.merging.plan import MergePlan, Opened, plan
from hf_merge.recipes.recipe import Recipe
from hf_merge.tensors import loops

RAM_SHARE = 0.4
"""Share of the machine's memory that the models being merged may hold; larger ones are memory-mapped from the local cache."""


class LiveModel:
    """One transformers model whose weights are replaced, in place, by the merge that a recipe describes.

    `opened` holds every model that a recipe may name; their tensors are fetched once. `model` starts as the merge of `recipe`,
    on `device` and in the merge's dtype. Raises `MergeError` if transformers does not know the architecture or would have
    to invent weights.
    """

    def __init__(self, recipe: Recipe, opened: Opened, *, device: torch.device | None = None) -> None:
        self._opened, self._align = opened, lru_cache(maxsize=None)(align)
        self.device = device or torch.device("cpu")
        _fetch(opened)
        compiled = self._plan(recipe)
        self.model = _build(compiled, self._merged(compiled)).eval()
        self.model.to(device=self.device)
        self._targets = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters(remove_duplicate=False))}

    def load(self, recipe: Recipe) -> None:
        """Replace the model's weights by the merge of `recipe`. If that fails half way, only the next load makes them whole."""
        compiled = self._plan(recipe)
        shapes = {name: job.spec.shape for name, job in compiled.jobs.items()}
        merged: dict[str, Tensor] = {}
        if not shapes.keys() <= self._targets.keys():
            # The checkpoint's layout is not the module's (fused experts, renamed modules): transformers converts it.
            merged = dict(_build(compiled, self._merged(compiled)).state_dict())
            shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
        if other := [name for name, shape in shapes.items() if self._targets[name].shape != shape]:
            raise MergeError(f"{recipe} makes another model than the one in memory: {other[0]!r} has another shape.")
        if not merged:
            merge_into(Merger(compiled, self.device), {name: self._targets[name] for name in shapes})
        with torch.no_grad():
            for name, tensor in merged.items():
                self._targets[name].copy_(tensor)

    def distance(self, recipe: Recipe) -> float:
        """Σ |θ - θ'|: the L1 norm of the difference of the weights in memory from those of another `recipe`, the base's say.

        Raises `MergeError` where the checkpoint's layout is not the module's.
        """
        compiled = self._plan(recipe)
        if not compiled.jobs.keys() <= self._targets.keys():
            raise MergeError(f"{compiled.primary.label}: no distance between models whose layout transformers converts.")
        merger, found = Merger(compiled, self.device), []
        for piece in (piece for job in compiled.jobs.values() for piece in pieces_of(job)):
            flat = self._targets[piece.job.name].detach().view(-1)

            def add(start: int, values: Tensor, flat: Tensor = flat) -> None:
                there = flat[start : start + len(values)].to("cpu", torch.float32)
                found.append(loops.sizes((there - values.float()).numpy()))

            merger.merge(piece, add)
        return math.fsum(found)

    def _plan(self, recipe: Recipe) -> MergePlan:
        return plan(recipe, self._opened, align=self._align)

    def _merged(self, compiled: MergePlan) -> dict[str, Tensor]:
        tensors = {name: torch.empty(job.spec.shape, dtype=job.spec.dtype) for name, job in compiled.jobs.items()}
        merge_into(Merger(compiled, self.device), tensors)
        return tensors


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer at its commit. Raises `MergeError` if it has none that transformers can load."""
    ref = checkpoint.ref
    try:
        where, revision = (str(ref.path), None) if ref.is_local else (ref.id, ref.revision)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, revision=revision, token=checkpoint.api.token)
    except (OSError, ValueError, KeyError) as error:
        raise MergeError(f"{checkpoint.label} has no tokenizer that transformers can load: {error}") from error
    return tokenizer


def _fetch(opened: Opened) -> None:
    """Bring all tensors near: into memory if they are small enough, else into the Hub's cache on disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    small = sum(checkpoint.index.nbytes for checkpoint in opened.values()) <= RAM_SHARE * memory
    for checkpoint in opened.values():
        if small:
            checkpoint.hold()
        else:
            checkpoint.store()


def _build(compiled: MergePlan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A transformers model of the result's config with these tensors (the checkpoint's layout)."""
    primary = compiled.primary
    config, cls = known_config(primary, compiled.config), model_class(compiled.config)
    if cls is None:
        raise MergeError(f"{primary.label}: transformers has no class {primary.config.get('architectures')!r}.")
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else "auto"
    with without_bars():
        model, info = cls.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if wrong:
        raise MergeError(f"{primary.label}: its tensors are not those of {cls.__name__}; missing or unexpected: {wrong[:10]}.")
    if settings := primary.json("generation_config.json"):
        model.generation_config = GenerationConfig.from_dict(settings)
    return model
