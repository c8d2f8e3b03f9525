"""What a recipe says about the numbers of a search, also where it says it with another method's."""

from collections.abc import Mapping, Sequence

from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.search.canonical import ALL_KEPT, SUMS
from hf_merge.search.shares import shares, size_of

Place = tuple[str, float]
"""A tensor's name, and a depth of the layers."""


def reaching(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that may have `recipe` in them, or come near to it, its own first."""
    own = [method for method in methods if method == recipe.method]
    if recipe.method in SUMS:
        return own + [method for method in methods if method not in own]
    if recipe.method == "ram":
        return own + [method for method in methods if method == "ramplus_tl"]
    kept = all(density == 1 for density in recipe.arguments().get("density", [0.0]))
    return own + [method for method in methods if kept and ALL_KEPT.get(method) == recipe.method]


def weights_at(recipe: Recipe, place: Place, scaled: bool) -> dict[ModelRef, float]:
    """Each model's weight at a place: of a sum as it stands in it, of other methods times the recipe's scaling if `scaled`."""
    arguments = recipe.arguments(*place)
    weights = arguments.get("weights") or [1.0] * len(recipe.models)
    if recipe.method == "linear" and arguments["normalize"]:
        weights = shares(weights)
    elif scaled or recipe.method in SUMS:
        weights = [weight * arguments.get("scaling", 1.0) for weight in weights]
    return dict(zip((m.ref for m in recipe.models), weights, strict=True))


def position_at(recipe: Recipe, place: Place, method: str, models: Sequence[ModelRef]) -> float:
    """The `t` with which SLERP or PAINT of `models` comes nearest to a recipe at a place."""
    if recipe.method == method:
        t = float(recipe.arguments(*place)["t"])
        return t if method == "paint" or recipe.models[0].ref == models[0] else 1 - t
    found = weights_at(recipe, place, scaled=True)
    weights = [found.get(model, 0.0) for model in models]
    if method == "paint":
        return size_of(weights)
    return weights[1] / sum(weights) if sum(weights) else 0.0


def number_of(recipe: Recipe, name: str, default: float) -> float:
    """A number that all models share; the greatest, where a recipe has cut it down for some of them."""
    if recipe.method == "ram" and name == "r":  # RAM+ that boosts nothing
        return 0.0
    found = recipe.arguments().get(name, default)
    return float(max(found) if isinstance(found, list) else found)


def densities_of(recipe: Recipe) -> Mapping[ModelRef, float]:
    """Each model's density; 1 in a method that keeps everything."""
    densities = recipe.arguments().get("density") or [1.0] * len(recipe.models)
    return dict(zip((m.ref for m in recipe.models), densities, strict=True))
