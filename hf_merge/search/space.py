"""What a search may vary: the same parameters in every trial, whichever merge method a trial draws."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from hf_merge.errors import RecipeError, unknown
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.parameters import UNIT_INTERVAL
from hf_merge.recipes.recipe import Recipe, RecipeModel

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"weight": (0.0, 1.0), "density": (0.05, 1.0), "scaling": (0.3, 1.5), "t": (0.0, 1.0)}
)
"""The range of each number that is searched. Weights are free in [0, 1], so their sum is free as well: the best sums often
add up to more than 1."""

DIGITS = 9
"""Digits after the point that a recipe's numbers keep, so that equal merges have equal recipes."""

SEARCHED = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
"""The merge methods that a search can vary so far: every number of theirs has a range above."""

_ALL_KEPT = {"dare_linear": "task_arithmetic", "dare_ties": "ties"}
"""What a random method is once it drops nothing."""

_SUMS = ("linear", "task_arithmetic")


@dataclass(frozen=True, kw_only=True)
class Space:
    """The recipes that a search may try. Checks itself; raises `RecipeError` with all that is wrong.

    `models` may be given as ids, paths, `ModelRef`s or `RecipeModel`s without parameters. `ranges` overrides `RANGES` by name.
    `per_model_density` gives every model a density of its own (as MM-MO does, arXiv:2407.00487) instead of one for all.
    Every recipe gets `dtype` and `seed`, so a point of the space is the same merge whenever it is tried.

    A point is a mapping: "method", "weight.<name>" for each model, "density.<name>" (or "density"), "scaling", "t"; a
    parameter exists if some method of the space uses it. `scaling` is searched for the methods that divide by the sum of
    the weights; for plain sums it would only repeat the weights.
    """

    models: tuple[RecipeModel, ...]
    base: ModelRef | None = None
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_model_density: bool = True
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            object.__setattr__(self, "methods", (self.methods,))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        object.__setattr__(self, "base", None if self.base is None else ModelRef.parse(self.base))
        if not self.models:
            raise RecipeError("A search space needs models to merge, got none.")
        # A recipe's own checks and distinct names, without a second copy of them.
        object.__setattr__(self, "models", Recipe(method="linear", models=self.models).models)
        wrong = list(dict.fromkeys(self._problems()))
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _problems(self) -> Iterable[str]:
        if not self.methods:
            yield f"A search space needs merge methods, got none. Known: {', '.join(sorted(METHODS))}."
        for method in self.methods:
            if method in METHODS and method not in SEARCHED:
                yield f"{method} cannot be searched yet, only merged from a recipe. Searched are: {', '.join(SEARCHED)}."
                continue
            try:
                Recipe(method=method, models=self.models, base=self.base, dtype=self.dtype, seed=self.seed)
            except RecipeError as error:
                yield str(error)
        for model in self.models:
            if model.parameters:
                yield f"{model.name!r} has parameters {dict(model.parameters)!r}: a search finds them, give `ranges` instead."
        if len({m.ref for m in self.models}) < len(self.models):
            yield f"A model is given twice: {', '.join(str(m.ref) for m in self.models)}."
        for name, bounds in self.ranges.items():
            if name not in RANGES:
                yield unknown("range", name, RANGES)
            elif not _is_range(bounds):
                yield f"The range of {name!r} is (low, high) with finite low <= high, got {bounds!r}."
            elif bounds[0] < 0 or (name in UNIT_INTERVAL and bounds[1] > 1):
                wanted = "lies in [0, 1]" if name in UNIT_INTERVAL else "starts at 0 or above"
                yield f"The range of {name!r} {wanted}, got {bounds!r}."

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter and what it is drawn from; the same for all trials."""
        used = {name for method in self.methods for name in _searched(method)}
        found: dict[str, BaseDistribution] = {"method": CategoricalDistribution(self.methods)}
        for name in RANGES:
            if name in used:
                found |= {key: FloatDistribution(*self._range(name)) for key in self._keys(name)}
        return found

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a point. It holds only what its method uses, and equal merges have equal recipes:

        models of weight 0 are left out (with none left the recipe is the base alone); weights that the method divides by their
        sum add up to 1; DARE that drops nothing is the sum or TIES that it then is; a plain sum whose weights add up to 1
        is their average, so one model at weight 1 is that model alone.
        """
        # Optuna's crossovers return the end of a range one step short of it; rounding puts it back.
        params = {k: round(float(v), DIGITS) if k != "method" else v for k, v in params.items()}
        method = params["method"]
        if "t" in _searched(method):
            return self._between(method, params["t"])
        weights = [params[f"weight.{m.name}"] for m in self.models]
        models = [m for m, w in zip(self.models, weights, strict=True) if w != 0]
        weights = [w for w in weights if w != 0]
        if not models:
            nothing = (RecipeModel(ref=self.base),) if self.base and method != "linear" else self.models
            return self._average(nothing)
        densities = [params[self._key("density", m)] for m in models] if "density" in _searched(method) else []
        if all(d == 1 for d in densities):
            method = _ALL_KEPT.get(method, method)
        scaling = params["scaling"] if "scaling" in _searched(method) else 1.0
        is_sum = method in _SUMS or (method == "ties" and len(models) == 1 and densities == [1])
        if _normalizes(method):
            weights = _shares(weights)
        if is_sum and scaling == 1 and _is_one(sum(weights)):
            return self._average(models, weights)
        own = {"weight": weights} | ({"density": densities} if "density" in _searched(method) else {})
        return self._made(method, models, own, {"scaling": scaling} if "scaling" in _searched(method) else {})

    def params(self, recipe: Recipe) -> dict[str, Any]:
        """The point nearest to `recipe`, with only the parameters that its method uses (a sampler completes the rest).

        A plain sum or average, such as one model alone, that is not a method of the space is expressed with the one that
        is nearest to it. Raises `RecipeError` for a recipe of other models or of another method.
        """
        places = {m.ref: m for m in self.models}
        for model in recipe.models:
            if model.ref not in places and model.ref != self.base:
                raise RecipeError(f"{model.ref} is not a model of this space: {', '.join(str(ref) for ref in places)}.")
        method = self._method_for(recipe)
        if "t" in _searched(method):
            return {"method": method, "t": self._clip("t", self._t(recipe))}
        weights = self._weights(recipe)
        found: dict[str, Any] = {"method": method}
        found |= {f"weight.{m.name}": self._clip("weight", weights.get(m.ref, 0.0)) for m in self.models}
        if "density" in _searched(method):
            densities = recipe.arguments().get("density") or [1.0] * len(recipe.models)
            for model, density in zip(recipe.models, densities, strict=True):
                if model.ref in places:
                    found[self._key("density", places[model.ref])] = self._clip("density", density)
        if "scaling" in _searched(method):
            found["scaling"] = self._clip("scaling", recipe.arguments()["scaling"] if recipe.method == method else 1.0)
        return found

    def parents(self) -> dict[str, Recipe]:
        """Each model alone, by its name."""
        return {m.name: self._average([m]) for m in self.models}

    def seeds(self) -> dict[str, Recipe]:
        """What every search tries first, by label: the parents and the uniform average of them."""
        return self.parents() | ({"uniform average": self._average(self.models)} if len(self.models) > 1 else {})

    @property
    def description(self) -> dict[str, Any]:
        """All that makes this space what it is, as JSON: a stored search is resumed only in an equal space."""
        used = {name for method in self.methods for name in _searched(method)}
        return {
            "base": str(self.base) if self.base else None,
            "models": [[str(m.ref), m.name] for m in self.models],
            "methods": list(self.methods),
            "ranges": {name: list(self._range(name)) for name in RANGES if name in used},
            "per_model_density": self.per_model_density,
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def _average(self, models: Sequence[RecipeModel], weights: Sequence[float] | None = None) -> Recipe:
        return self._made("linear", models, {"weight": _shares(weights or [1.0] * len(models))}, {})

    def _between(self, method: str, t: float) -> Recipe:
        if t in (0, 1):
            return self._average([self.models[int(t)]])
        return self._made(method, self.models, {}, {"t": t})

    def _made(
        self, method: str, models: Sequence[RecipeModel], own: Mapping[str, Sequence[float]], shared: Mapping[str, float]
    ) -> Recipe:
        return Recipe(
            method=method,
            models=tuple(
                RecipeModel(ref=m.ref, name=m.name, parameters={k: v[i] for k, v in own.items()}) for i, m in enumerate(models)
            ),
            base=self.base if METHODS[method].space == "delta" else None,
            parameters=shared,
            dtype=self.dtype,
            seed=self.seed,
        )

    def _method_for(self, recipe: Recipe) -> str:
        """The recipe's own method, or for a plain sum the one with the fewest numbers that can have the base in it."""
        with_base = any(m.ref == self.base for m in recipe.models)
        able = [m for m in self.methods if METHODS[m].space == "delta" or not with_base]
        if recipe.method in able:
            return recipe.method
        if recipe.method not in _SUMS or not able:
            raise RecipeError(f"This is not in a space of {', '.join(self.methods)}: {recipe}.")
        return min(able, key=lambda m: ("t" in _searched(m), len(_searched(m))))

    def _weights(self, recipe: Recipe) -> dict[ModelRef, float]:
        """Each model's weight as a plain sum would have it."""
        arguments = recipe.arguments()
        weights = arguments["weights"]
        if recipe.method == "linear" and arguments["normalize"]:
            weights = _shares(weights)
        elif "scaling" not in _searched(recipe.method):
            weights = [w * arguments.get("scaling", 1.0) for w in weights]
        return dict(zip((m.ref for m in recipe.models), weights, strict=True))

    def _t(self, recipe: Recipe) -> float:
        """How far from the first to the second model of the space a SLERP, or a weighted sum of the two, stands."""
        if "t" in recipe.arguments():
            t = float(recipe.arguments()["t"])
            return t if recipe.models[0].ref == self.models[0].ref else 1 - t
        first, second = (self._weights(recipe).get(m.ref, 0.0) for m in self.models)
        return second / (first + second) if first + second else 0.0

    def _range(self, name: str) -> tuple[float, float]:
        low, high = self.ranges.get(name, RANGES[name])
        return float(low), float(high)

    def _clip(self, name: str, value: float) -> float:
        low, high = self._range(name)
        return min(max(float(value), low), high)

    def _key(self, name: str, model: RecipeModel) -> str:
        shared = name in ("scaling", "t") or (name == "density" and not self.per_model_density)
        return name if shared else f"{name}.{model.name}"

    def _keys(self, name: str) -> list[str]:
        return list(dict.fromkeys(self._key(name, m) for m in self.models))


def _searched(method: str) -> list[str]:
    """The numbers of a method that a search varies."""
    parameters = METHODS[method].parameters
    return [name for name in RANGES if name in parameters and (name != "scaling" or _normalizes(method))]


def _normalizes(method: str) -> bool:
    normalize = METHODS[method].parameters.get("normalize")
    return normalize is not None and bool(normalize.default)


def _shares(weights: Sequence[float]) -> list[float]:
    """`weights` as parts of 1, rounded and never divided twice: proportional weights then have one recipe."""
    total = sum(weights)
    return list(weights) if _is_one(total) else [round(w / total, DIGITS) for w in weights]


def _is_one(total: float) -> bool:
    return math.isclose(total, 1, abs_tol=100 * 10**-DIGITS)


def _is_range(bounds: Any) -> bool:
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        return False
    return math.isfinite(low) and math.isfinite(high) and low <= high
