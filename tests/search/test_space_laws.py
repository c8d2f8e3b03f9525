"""Laws of every space: each point is one merge, equal merges are one recipe, and a recipe goes back to its point."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution

from hf_merge.methods import METHODS
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.recipes.yaml import from_dict, to_dict
from hf_merge.search.canonical import ALL_KEPT, WHOLE
from hf_merge.search.ranges import LOGARITHMIC, PROPORTIONS, RANGES, REFUSED, SEARCHED, SPHERICAL, searched
from hf_merge.search.shares import shares, within
from hf_merge.search.space import Space

PAIRS = tuple(m for m in SEARCHED if METHODS[m].models == (2, 2))
MANY = tuple(m for m in SEARCHED if m not in PAIRS)
WEIGHTED = tuple(m for m in SEARCHED if "weight" in METHODS[m].parameters)
EXACT = tuple(m for m in WEIGHTED if m not in WHOLE)
"""Methods that can be one of their models alone."""

NOT_SEARCHED = {"max_iter", "tol", "steps", "step_size", "agreement"}
"""Counts, and numbers of a solver rather than of what it solves."""

SHAPE = (10, 20)


def space(names: str, **given: Any) -> Space:
    """A space over `lab/<name>` on `lab/base`."""
    return Space(**{"models": tuple(f"lab/{n}" for n in names), "base": "lab/base"} | given)


def names_for(method: str) -> str:
    return "xy" if method in PAIRS else "xyz"


def drawn(of: Space, rng: random.Random) -> dict[str, Any]:
    """A point with many of its numbers at the ends of their ranges."""
    return {
        name: rng.choice(d.choices)
        if isinstance(d, CategoricalDistribution)
        else round(rng.choice([d.low, d.high, rng.uniform(d.low, d.high)]), 9)
        for name, d in of.distributions.items()
    }


@pytest.mark.parametrize("method", SEARCHED)
def test_every_number_of_every_method_is_searched_or_has_a_reason_not_to_be(method: str) -> None:
    numbers = {name for name, p in METHODS[method].parameters.items() if not isinstance(p.default, bool)}
    assert numbers - searched(method, base=True).keys() <= NOT_SEARCHED | {"scaling"}


@pytest.mark.parametrize("method", SEARCHED)
def test_every_range_holds_the_method_s_default(method: str) -> None:
    for name, kind in searched(method, base=True).items():
        low, high = RANGES[kind]
        assert low <= METHODS[method].parameters[name].default <= high


@pytest.mark.parametrize("method", SEARCHED)
def test_scaling_is_searched_where_nothing_else_has_its_effect(method: str) -> None:
    """Twice the weights (or t) is twice the result: then it is not."""
    numbers = METHODS[method].parameters
    deltas = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    if METHODS[method].space != "delta" or method == "consensus":
        repeats = method == "linear"
    else:
        name = {"weight": "weights", "t": "t"}.get(next((n for n in ("weight", "t") if n in numbers), ""), "")
        single, double = ({name: v} if name else {} for v in (0.25, 0.5))
        one, two = METHODS[method](deltas, **single), METHODS[method](deltas, **double)
        repeats = bool(name) and torch.allclose(2 * one, two, rtol=1e-4, atol=1e-6)
    assert ("scaling" in searched(method, base=True)) == (METHODS[method].space != "weight" and not repeats)


@pytest.mark.parametrize("method", [m for m in SEARCHED if METHODS[m].space == "any"])
def test_scaling_scales_differences_from_a_base(method: str) -> None:
    assert ("scaling" in searched(method, base=True), "scaling" in searched(method, base=False)) == (True, False)


def test_ranges_over_orders_of_magnitude_are_drawn_by_their_logarithm() -> None:
    found = space("xy", methods=("wudi", "nearswap", "ram")).distributions
    assert {name for name, d in found.items() if isinstance(d, FloatDistribution) and d.log} == LOGARITHMIC


def test_numbers_of_one_name_and_another_meaning_have_ranges_of_their_own() -> None:
    of = space("xy", methods=("slerp", "nearswap", "della", "ram"), ranges={"nearswap.t": (0.5, 0.5)})
    assert of.recipe({"method": "nearswap"}).arguments() == {"t": 0.5}
    assert {"t", "epsilon", "ram.epsilon"} <= of.distributions.keys()


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_what_cannot_be_searched_is_refused_with_a_reason(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} cannot be searched: it "):
        space("x", methods=(method,))


@pytest.mark.parametrize("method", PAIRS)
def test_methods_for_two_models_are_searched_with_two_models_alone(method: str) -> None:
    with pytest.raises(ValueError, match="exactly 2 models"):
        space("xyz", methods=(method,))


# One merge


def merged(recipe: Recipe, deltas: dict[str, torch.Tensor], place: tuple[str, float] = ("", 0.0)) -> torch.Tensor:
    """What a recipe makes of tiny models whose base is 0."""
    stack = torch.stack([deltas.get(m.name, torch.zeros(SHAPE)) for m in recipe.models])
    arguments = recipe.arguments(*place)
    scaling = arguments.pop("scaling", 1.0)
    names = tuple(m.name for m in recipe.models)
    return METHODS[recipe.method](stack, seed=recipe.seed, models=names, tensor="w", **arguments) * scaling


def as_drawn(of: Space, point: dict[str, Any], suffix: str = "") -> Recipe | None:
    """One group of a point as a recipe with every model and number in it; None where the method is not defined there."""
    method = point["method"]
    kinds = searched(method, base=True)
    weights = [point.get(f"weight.{m.name}{suffix}", 0.0) for m in of.models]
    if METHODS[method].space != "delta" and "weight" in kinds and not any(weights):
        return None
    own = {"weight": weights} if "weight" in kinds else {}
    own |= {"density": [point[f"density.{m.name}"] for m in of.models]} if "density" in kinds else {}
    shared = {n: point[k + suffix if k == "t" else k] for n, k in kinds.items() if n not in own}
    if method == "linear" and of.ranges.get("weight", (0, 1))[0] < 0:
        shared["normalize"] = False
    models = tuple(
        RecipeModel(ref=m.ref, name=m.name, parameters={n: v[i] for n, v in own.items()}) for i, m in enumerate(of.models)
    )
    base = of.base if METHODS[method].deltas(True) else None
    return Recipe(method=method, models=models, base=base, parameters=shared)


@pytest.fixture(scope="module")
def deltas() -> dict[str, torch.Tensor]:
    return {n: torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("xyz")}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("low", [0.0, -0.5])
@pytest.mark.parametrize("method", SEARCHED)
def test_a_point_s_recipe_is_the_merge_that_was_drawn(
    method: str, low: float, seed: int, deltas: dict[str, torch.Tensor]
) -> None:
    low = 0.0 if method in SPHERICAL else low
    of = space(names_for(method), methods=(method,), ranges={"weight": (low, 1.0)})
    point = drawn(of, random.Random(seed))
    plain = as_drawn(of, point)
    recipe = of.recipe(point)
    assert torch.allclose(merged(recipe, deltas), merged(plain or recipe, deltas), atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("method", [m for m in SEARCHED if "weight" in METHODS[m].parameters or m in ("slerp", "paint")])
def test_each_group_of_a_point_s_recipe_is_the_merge_that_was_drawn(
    method: str, seed: int, deltas: dict[str, torch.Tensor]
) -> None:
    of = space(names_for(method), methods=(method,), layer_groups=2, module_groups={"attention": "self_attn"})
    point = drawn(of, random.Random(seed))
    recipe = of.recipe(point)
    places = {".attention.1": ("self_attn.q", 0.0), ".attention.2": ("self_attn.q", 1.0), ".rest.1": ("mlp.up", 0.0)}
    for suffix, place in places.items():
        plain = as_drawn(of, point, suffix)
        if plain:
            assert torch.allclose(merged(recipe, deltas, place), merged(plain, deltas), atol=1e-5), suffix


@pytest.mark.parametrize("method", [m for m in WEIGHTED if METHODS[m].space == "delta"])
def test_no_weight_at_all_is_the_base(method: str) -> None:
    of = space("xyz", methods=(method,))
    point = dict.fromkeys(of.distributions, 0.3) | {"method": method} | {f"weight.{n}": 0.0 for n in "xyz"}
    assert of.recipe(point).digest == Recipe(method="linear", models=("lab/base",)).digest


@pytest.mark.parametrize("method", [m for m in SEARCHED if "scaling" in searched(m, base=True)])
def test_a_scaling_of_0_is_the_base(method: str) -> None:
    of = space(names_for(method), methods=(method,), ranges={"scaling": (0.0, 1.0)})
    point = dict.fromkeys(of.distributions, 0.3) | {"method": method, "scaling": 0.0}
    assert of.recipe(point).digest == Recipe(method="linear", models=("lab/base",)).digest


@pytest.mark.parametrize("method", sorted(ALL_KEPT))
def test_a_method_that_drops_nothing_is_what_it_then_is(method: str) -> None:
    of = space("xyz", methods=(method, ALL_KEPT[method]))
    point = dict.fromkeys(of.distributions, 0.3) | {f"density.{n}": 1.0 for n in "xyz"}
    assert of.recipe(point | {"method": method}).digest == of.recipe(point | {"method": ALL_KEPT[method]}).digest


def test_a_model_of_density_0_is_left_out() -> None:
    of = space("xyz", methods=("ties",), ranges={"density": (0.0, 1.0)})
    point = dict.fromkeys(of.distributions, 0.3) | {"method": "ties"}
    assert of.recipe(point | {"density.y": 0.0}).digest == of.recipe(point | {"weight.y": 0.0}).digest


def test_a_window_that_does_not_fit_is_the_one_that_does() -> None:
    of = space("xy", methods=("della",))
    point = {"method": "della", "weight.x": 0.5, "weight.y": 0.5, "density.x": 0.9, "density.y": 0.5, "scaling": 1.0}
    recipes = [of.recipe(point | {"epsilon": e}) for e in (0.15, 0.2)]
    assert [r.arguments()["epsilon"] for r in recipes] == [[0.1, 0.15], [0.1, 0.2]]


@pytest.mark.parametrize("method", ["ties", "nuslerp", "multislerp"])
def test_one_model_scaled_is_one_recipe_whatever_the_method(method: str) -> None:
    of = space("xy", methods=(method, "task_arithmetic"))
    point = {"weight.y": 0.0, "density.x": 1.0, "density.y": 0.5, "scaling": 0.7}
    scaled, plain = (point | {"method": m, "weight.x": w} for m, w in ((method, 0.4), ("task_arithmetic", 0.7)))
    assert of.recipe(scaled).digest == of.recipe(plain).digest


@pytest.mark.parametrize(("t", "wanted"), [(0.0, "base"), (1.0, "uniform average")])
def test_the_ends_of_paint_are_the_base_and_the_average(t: float, wanted: str) -> None:
    of = space("xyz", methods=("paint",))
    ends = of.seeds() | {"base": Recipe(method="linear", models=("lab/base",))}
    assert of.recipe({"method": "paint", "t": t}).digest == ends[wanted].digest


def test_ram_plus_that_boosts_nothing_is_ram() -> None:
    of = space("xyz", methods=("ram", "ramplus_tl"))
    point = {"ram.epsilon": 1e-4, "scaling": 0.8, "r": 0.0, "alpha": 0.3}
    assert of.recipe(point | {"method": "ramplus_tl"}).digest == of.recipe(point | {"method": "ram"}).digest


# Negative weights


def test_ties_takes_proportions_of_negative_weights() -> None:
    of = space("xy", methods=("ties",), ranges={"weight": (-0.5, 1.0)})
    point = {"method": "ties", "weight.x": 0.5, "weight.y": -0.5, "density.x": 0.3, "density.y": 0.3, "scaling": 1.0}
    assert of.recipe(point).arguments()["weights"] == [0.5, -0.5]
    assert of.recipe(point).digest == of.recipe(point | {"weight.x": 0.25, "weight.y": -0.25}).digest


def test_an_average_with_negative_weights_is_not_divided_by_their_sum() -> None:
    of = space("xy", methods=("linear",), ranges={"weight": (-0.5, 1.0)})
    recipe = of.recipe({"method": "linear", "weight.x": 0.5, "weight.y": -0.5})
    assert recipe.arguments() == {"weights": [0.5, -0.5], "normalize": False}


def test_weights_that_add_up_to_1_are_an_average_whatever_their_signs() -> None:
    of = space("xy", methods=("linear", "task_arithmetic"), ranges={"weight": (-0.5, 1.5)})
    weights = {"weight.x": 1.25, "weight.y": -0.25}
    recipes = [of.recipe({"method": m, **weights}) for m in of.methods]
    assert recipes[0].digest == recipes[1].digest
    assert recipes[0].arguments() == {"weights": [1.25, -0.25], "normalize": True}


@pytest.mark.parametrize("method", SPHERICAL)
def test_proportions_on_a_sphere_cannot_be_negative(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} takes no negative weights"):
        space("xy", methods=(method, "ties"), ranges={"weight": (-0.5, 1.0)})


# There and back


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("label", ["x", "y"])
def test_parents_are_points_of_the_space(method: str, label: str) -> None:
    of = space(names_for(method), methods=(method,))
    inner = dict.fromkeys(of.distributions, 0.5) | of.params(of.seeds()[label])
    assert of.recipe(inner).digest == of.seeds()[label].digest


def test_a_parent_is_expressed_by_a_method_that_can_be_it() -> None:
    of = space("xyz", methods=("magmax", "iso_c", "ties"))
    assert of.params(of.seeds()["x"])["method"] == "ties"


@pytest.mark.parametrize("method", [m for m in SEARCHED if m not in WEIGHTED and m not in ("slerp", "paint", "karcher")])
def test_a_parent_has_a_nearest_point_where_there_are_no_weights(method: str) -> None:
    of = space(names_for(method), methods=(method,))
    assert of.params(of.seeds()["x"]).keys() <= of.distributions.keys()


MODULES = ({}, {"attention": "self_attn", "mlp": ["mlp", "fc"]})
WEIGHTS = ((0.0, 1.0), (-0.5, 1.0), (-1.0, 0.6), (0.0, 0.2), (0.2, 2.0))


@st.composite
def points(draw: st.DrawFn) -> tuple[Space, dict[str, Any]]:
    """Any space, and a point of it."""
    pair = draw(st.booleans())
    bounds = draw(st.sampled_from(WEIGHTS))
    able = [m for m in (SEARCHED if pair else MANY) if bounds[0] >= 0 or m not in SPHERICAL]
    of = space(
        "xy" if pair else "xyz",
        methods=tuple(draw(st.lists(st.sampled_from(able), min_size=1, max_size=3, unique=True))),
        ranges={"weight": bounds} | draw(st.sampled_from(({}, {"density": (0.4, 0.4)}, {"scaling": (1.0, 1.0)}))),
        per_model_density=draw(st.booleans()),
        layer_groups=draw(st.integers(1, 3)),
        module_groups=draw(st.sampled_from(MODULES)),
    )

    def number(d: Any) -> st.SearchStrategy[Any]:
        if isinstance(d, CategoricalDistribution):
            return st.sampled_from(d.choices)
        some = [v for v in (0.0, 0.5, 1.0) if d.low < v < d.high]
        return st.sampled_from([d.low, d.high, *some]) | st.floats(d.low, d.high)

    return of, {name: draw(number(d)) for name, d in of.distributions.items()}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(points())
def test_every_point_has_a_recipe_that_can_be_stored(given: tuple[Space, dict[str, Any]]) -> None:
    of, point = given
    recipe = of.recipe(point)
    assert from_dict(to_dict(recipe)).digest == recipe.digest


@settings(max_examples=600, deadline=None, derandomize=True)
@given(points())
def test_a_recipe_goes_back_to_a_point_of_its_space(given: tuple[Space, dict[str, Any]]) -> None:
    of, point = given
    recipe = of.recipe(point)
    found = of.params(recipe)
    assert all(of.distributions[name]._contains(value) for name, value in found.items() if name != "method")
    assert of.recipe(point | found).digest == recipe.digest


@settings(max_examples=300, deadline=None, derandomize=True)
@given(points())
def test_no_recipe_divides_by_a_sum_of_weights_next_to_0(given: tuple[Space, dict[str, Any]]) -> None:
    of, point = given
    recipe = of.recipe(point)
    for tensor in ("self_attn", "mlp", "norm"):
        for depth in (0.0, 0.3, 0.5, 0.9, 1.0):
            arguments = recipe.arguments(tensor, depth)
            if recipe.method in SPHERICAL or (recipe.method == "linear" and arguments["normalize"]):
                assert sum(arguments["weights"]) == pytest.approx(1.0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1.0, 1.0).map(lambda w: round(w, 6)), min_size=1, max_size=5), st.floats(0.1, 1.0))
def test_weights_within_a_range_have_the_shares_they_had(weights: list[float], high: float) -> None:
    wanted = shares(weights)
    found = within(wanted, -high, high)
    assert all(-high <= w <= high for w in found)
    assert shares([round(w, 12) for w in found]) == wanted


@settings(max_examples=200, deadline=None, derandomize=True)
@given(points(), st.floats(0.1, 0.9))
def test_proportional_weights_are_one_recipe(given: tuple[Space, dict[str, Any]], factor: float) -> None:
    of, point = given
    if point["method"] in PROPORTIONS - {"linear"}:
        less = {name: v * factor if name.startswith("weight.") else v for name, v in point.items()}
        # Up to the tolerance within which a sum is taken to be 1.
        recipes = [of.recipe(p).arguments("self_attn", 0.5).get("weights", []) for p in (point, less)]
        assert recipes[0] == pytest.approx(recipes[1], abs=2e-7)
