"""What a search may vary: the same parameters in every trial, whichever merge method a trial draws."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from hf_merge.errors import RecipeError
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.recipes.value import Value
from hf_merge.search.canonical import SUMS, WHOLE, Weighted, canonical
from hf_merge.search.groups import Groups, wrong_groups
from hf_merge.search.nearest import densities_of, number_of, position_at, reaching, weights_at
from hf_merge.search.ranges import LOGARITHMIC, PROPORTIONS, RANGES, REFUSED, searched, wrong_ranges
from hf_merge.search.shares import rounded, shares, size_of, within

DRAWN_DIGITS = 12
"""Digits after the point of a drawn number: Optuna's crossovers return the end of a range one step short of it."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The recipes that a search may try. Checks itself; raises `RecipeError` with all that is wrong.

    `models` may be given as ids, paths, `ModelRef`s or `RecipeModel`s without parameters. `ranges` overrides `RANGES` by name;
    one whose ends are equal fixes a number, and costs no dimension. Weights whose range starts below 0 may add up to almost 0:
    `linear` is then the plain sum of the models, not divided by that. No other method with negative weights divides by it.
    `per_model_density` gives every model a density of its own (as MM-MO does, arXiv:2407.00487) instead of one for all.
    Every recipe gets `dtype` and `seed`, so a point of the space is the same merge whenever it is tried.

    `layer_groups` makes each weight and `t` a gradient over the depth between so many points, the first layer's and the last's
    among them (more than the models have layers are of no use; what is in no layer takes the first). `module_groups` gives
    kinds of modules weights of their own: parts of tensors' names by a name for them, such as {"attention": "self_attn", "mlp":
    "mlp"}, of which the first that matches holds; all other tensors are the group "rest".

    A point is a mapping: "method", "weight.<name>" for each model, "density.<name>" (or "density"), and the methods' other
    numbers; a parameter exists if some method of the space uses it. Groups follow the name: "weight.<name>.attention.1", "t.2".
    """

    models: tuple[RecipeModel, ...]
    base: ModelRef | None = None
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_model_density: bool = True
    layer_groups: int = 1
    module_groups: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            object.__setattr__(self, "methods", (self.methods,))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        object.__setattr__(self, "base", None if self.base is None else ModelRef.parse(self.base))
        if isinstance(self.module_groups, Mapping):
            listed = {k: tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in self.module_groups.items()}
            object.__setattr__(self, "module_groups", listed)
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
            if method in REFUSED:
                yield f"{method} cannot be searched: {REFUSED[method]}. Write a recipe, or leave it out."
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
        yield from wrong_ranges(self.ranges, self.methods)
        yield from wrong_groups(self.layer_groups, self.module_groups)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter and what it is drawn from; the same for all trials."""
        found: dict[str, BaseDistribution] = {"method": CategoricalDistribution(self.methods)}
        for kind in self._used():
            low, high = self._range(kind)
            if low < high:
                drawn = FloatDistribution(low, high, log=kind in LOGARITHMIC and low > 0)
                found |= dict.fromkeys((key for m in self.models for key in self._keys(kind, m)), drawn)
        return found

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of a point. It holds only what its method uses, and equal merges have equal recipes:

        models of weight or density 0 are left out, unless they matter to the method all the same (with none left the recipe is
        the base alone); weights of which only the proportions matter add up to 1, in each group; a method that drops elements
        is, if it drops nothing, the sum or TIES that it then is; a plain sum whose weights add up to 1 is their average, so
        one model at weight 1 is that model alone; groups of equal numbers are one number.
        """
        method = params["method"]
        numbers = self._searched(method)
        read = partial(self._number, params)
        if "weight" in numbers:
            return self._weighted(method, read)
        if method in ("slerp", "paint"):
            return self._between(method, [rounded(read("t", key)) for key in self._keys("t")])
        shared = {name: rounded(read(kind)) for name, kind in numbers.items()}
        if shared.get("scaling") == 0:
            return self._nothing()
        if method == "nearswap" and shared["t"] == 0:
            return self._average(self.models[:1])
        if method == "ramplus_tl" and 0 in (shared["r"], shared["alpha"]):
            method, shared = "ram", {name: value for name, value in shared.items() if name not in ("r", "alpha")}
        return self._made(method, self.models, {}, shared)

    def params(self, recipe: Recipe) -> dict[str, Any]:
        """The point nearest to `recipe`, with only the parameters that its method uses (a sampler completes the rest).

        A plain sum or average, such as one model alone, that is not a method of the space is expressed with one that can be
        it, or else with the nearest one. Raises `RecipeError` for a recipe of other models, of another method or of slices.
        """
        refs = [m.ref for m in self.models]
        for model in recipe.models:
            if model.ref not in refs and model.ref != self.base:
                raise RecipeError(f"{model.ref} is not a model of this space: {', '.join(map(str, refs))}.")
        # Only differences from the base can have the base in them.
        with_base = self.base not in refs and any(m.ref == self.base for m in recipe.models)
        able = [m for m in reaching(recipe, self.methods) if not with_base or METHODS[m].deltas(self.base is not None)]
        if not able or recipe.layers:
            raise RecipeError(f"This is not in a space of {', '.join(self.methods)}: {recipe}.")
        if able[0] != recipe.method:
            able.sort(key=lambda m: ("weight" not in self._searched(m), m in WHOLE, len(self._searched(m))))
        points = [self._point(recipe, method) for method in able]
        ends = {key: d.high for key, d in self.distributions.items() if isinstance(d, FloatDistribution)}
        return next((p for p in points if self.recipe(ends | p).digest == recipe.digest), points[0])

    def parents(self) -> dict[str, Recipe]:
        """Each model alone, by its name."""
        return {m.name: self._average([m]) for m in self.models}

    def seeds(self) -> dict[str, Recipe]:
        """What every search tries first, by label: the parents and the uniform average of them."""
        return self.parents() | ({"uniform average": self._average(self.models)} if len(self.models) > 1 else {})

    @property
    def description(self) -> dict[str, Any]:
        """All that makes this space what it is, as JSON: a stored search is resumed only in an equal space."""
        groups: dict[str, Any] = {"layer_groups": self.layer_groups} if self.layer_groups > 1 else {}
        if self.module_groups:  # their order counts
            groups["module_groups"] = [[name, list(filters)] for name, filters in self.module_groups.items()]
        return {
            "base": str(self.base) if self.base else None,
            "models": [[str(m.ref), m.name] for m in self.models],
            "methods": list(self.methods),
            "ranges": {name: list(self._range(name)) for name in self._used()},
            "per_model_density": self.per_model_density,
            **groups,
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def _weighted(self, method: str, read: Callable[..., float]) -> Recipe:
        numbers = self._searched(method)
        drawn = Weighted(
            method=method,
            models=self.models,
            weights=[[read("weight", key) for key in self._keys("weight", m)] for m in self.models],
            densities=[rounded(read("density", *self._keys("density", m))) for m in self.models]
            if "density" in numbers
            else (),
            shared={name: rounded(read(kind)) for name, kind in numbers.items() if name not in ("weight", "density")},
        )
        found = canonical(drawn, proportional=self._proportional(method))
        if not found.models:
            return self._average(self.models) if method == "linear" else self._nothing()
        own: dict[str, Sequence[Value]] = {
            "weight": [self._groups.value(weights) for weights in found.weights],
            **found.dropping,
        }
        shared = {name: value for name, value in found.shared.items() if name not in own}
        return self._made(found.method, found.models, own, shared)

    def _between(self, method: str, positions: Sequence[float]) -> Recipe:
        if set(positions) == {0.0}:
            return self._nothing() if method == "paint" else self._average(self.models[:1])
        if set(positions) == {1.0}:
            return self._average(self.models if method == "paint" else self.models[1:])
        return self._made(method, self.models, {}, {"t": self._groups.value(positions)})

    def _made(
        self, method: str, models: Sequence[RecipeModel], own: Mapping[str, Sequence[Value]], shared: Mapping[str, Value]
    ) -> Recipe:
        return Recipe(
            method=method,
            models=tuple(
                RecipeModel(ref=m.ref, name=m.name, parameters={k: v[i] for k, v in own.items()}) for i, m in enumerate(models)
            ),
            base=self.base if METHODS[method].deltas(self.base is not None) else None,
            parameters=shared,
            dtype=self.dtype,
            seed=self.seed,
        )

    def _average(self, models: Sequence[RecipeModel]) -> Recipe:
        return self._made("linear", models, {"weight": shares([1.0] * len(models))}, {})

    def _nothing(self) -> Recipe:
        """What merging none of the models leaves: the base."""
        return self._average((RecipeModel(ref=self.base),) if self.base else self.models)

    def _point(self, recipe: Recipe, method: str) -> dict[str, Any]:
        """The point of `method` that is nearest to a recipe."""
        found: dict[str, Any] = {"method": method}
        for name, kind in self._searched(method).items():
            low, high = self._range(kind)
            if low < high:
                near = self._near(recipe, method, name)
                found |= {key: min(max(float(value), low), high) for key, value in near.items()}
        return found

    def _near(self, recipe: Recipe, method: str, name: str) -> dict[str, float]:
        """What one number of a method is in `recipe`, by parameter."""
        kind = self._searched(method)[name]
        refs, places = [m.ref for m in self.models], self._groups.places
        if kind == "t":
            return {key: position_at(recipe, at, method, refs) for key, at in zip(self._keys("t"), places, strict=True)}
        if kind == "density":
            kept = densities_of(recipe)
            return {key: kept[m.ref] for m in self.models if m.ref in kept for key in self._keys("density", m)}
        if kind not in ("weight", "scaling"):
            return {kind: number_of(recipe, name, METHODS[method].parameters[name].default)}
        scaled = "scaling" not in self._searched(method)
        found = (weights_at(recipe, at, scaled) for at in places)
        rows = [[weights.get(ref, 0.0) for ref in refs] for weights in found]
        if kind == "scaling" and recipe.method not in SUMS:
            return {kind: number_of(recipe, name, 1.0)}
        if kind == "scaling":
            return {kind: size_of(rows[0]) or 1.0 if self._proportional(method) else 1.0}
        if self._proportional(method):
            rows = [within(row, *self._range("weight")) for row in rows]
        keys = zip(*(self._keys("weight", m) for m in self.models), strict=True)
        return {key: weight for row, group in zip(rows, keys, strict=True) for key, weight in zip(group, row, strict=True)}

    def _number(self, params: Mapping[str, Any], kind: str, key: str = "") -> float:
        low, high = self._range(kind)
        return rounded(float(params[key or kind]) if low < high else low, DRAWN_DIGITS)

    def _range(self, kind: str) -> tuple[float, float]:
        low, high = self.ranges.get(kind, RANGES[kind])
        return float(low), float(high)

    def _keys(self, kind: str, model: RecipeModel | None = None) -> list[str]:
        """The parameters of one number: of each group, if groups have their own, and of `model`, if models have."""
        own = model is not None and (kind == "weight" or (kind == "density" and self.per_model_density))
        name = f"{kind}.{model.name}" if model is not None and own else kind
        return [name + suffix for suffix in self._groups.suffixes] if kind in ("weight", "t") else [name]

    def _searched(self, method: str) -> dict[str, str]:
        return searched(method, self.base is not None)

    def _used(self) -> list[str]:
        """The ranges that some method of the space uses, in the order of `RANGES`."""
        used = {kind for method in self.methods for kind in self._searched(method).values()}
        return [kind for kind in RANGES if kind in used]

    def _proportional(self, method: str) -> bool:
        return method in PROPORTIONS and not (method == "linear" and self._range("weight")[0] < 0)

    @property
    def _groups(self) -> Groups:
        return Groups(layers=self.layer_groups, modules=self.module_groups)
