"""LoRA adapters merged into one adapter, by a written recipe."""

from collections.abc import Mapping
from pathlib import Path

from hf_merge.checkpoints.adapters import is_adapter
from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.checkpoints.source import Source
from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import MergeError, RecipeError
from hf_merge.merging.bodies import adapter_of
from hf_merge.merging.one_adapter import AdapterReport
from hf_merge.merging.one_adapter import merge_adapters as merged
from hf_merge.merging.plan import open_inputs
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe

SUMS = ("task_arithmetic", "linear")
"""Methods whose result is a weighted sum of the adapters, which is an adapter again."""


def merge_adapters(
    recipe: Recipe | Path | str, out: Path | str, *, rank: int | None = None, token: str | bool | None = None
) -> AdapterReport:
    """Merge a recipe whose models are LoRA adapters into one adapter in the folder `out`; it loads with plain PEFT.

    Exact, by concatenation: its rank is the sum of theirs. With `rank` what is above that is truncated, and the report says the
    relative error. The method is `task_arithmetic` or `linear`; the base is read only where adapters hold full tensors.
    Raises `RecipeError` for another method or a full model, `MergeError` for adapters that do not fit each other.
    """
    recipe = recipe if isinstance(recipe, Recipe) else yaml.load(recipe)
    if recipe.method not in SUMS or not recipe.constant:
        raise RecipeError(
            "One adapter is a weighted sum of adapters, the same for all tensors: take "
            f"{' or '.join(SUMS)} with plain numbers, got {recipe.method}. Or merge into a full model."
        )
    opened = open_inputs(recipe, hub_api(token))
    refs = [model.ref.adapter or model.ref for model in recipe.models]
    if full := [str(ref) for ref in refs if not is_adapter(opened[ref].files)]:
        raise RecipeError(f"These are no adapters, but full models: {', '.join(full)}. Merge into a full model.")
    folder = Path(out).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise MergeError(f"{folder} is not empty. Give another folder.")
    given = recipe.arguments()
    weights = given["weights"]
    if given.get("normalize"):
        weights = [weight / sum(weights) for weight in weights]
    plain = recipe.base or next((m.ref.plain for m in recipe.models if m.ref.adapter), None)
    base: Mapping[str, Source] | None = tensors(opened[plain]) if plain else None
    adapters = [adapter_of(opened[ref]) for ref in refs]
    return merged(adapters, weights, folder, rank=rank, scaling=given.get("scaling", 1.0), base=base)
