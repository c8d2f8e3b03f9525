"""Spaces: flat points, the recipes they stand for, and their canonical forms."""

import math
from typing import Any

import pytest

from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.search.ranges import RANGES
from hf_merge.search.space import Space

WEIGHTED = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")


def space(*names: str, **given: Any) -> Space:
    """A space over `lab/<name>` on `lab/base`."""
    return Space(**{"models": tuple(f"lab/{n}" for n in names or ("x", "y", "z")), "base": "lab/base"} | given)


def test_a_space_has_a_method_a_weight_and_a_density_for_each_model_and_a_scaling() -> None:
    names = ["method", "weight.x", "weight.y", "weight.z", "density.x", "density.y", "density.z", "scaling"]
    assert list(space().distributions) == names


def test_one_density_can_be_shared_by_all_models() -> None:
    shared = space(per_model_density=False)
    assert [n for n in shared.distributions if n.startswith("density")] == ["density"]
    point = {"method": "ties", "weight.x": 0.5, "weight.y": 0.5, "weight.z": 0.0, "density": 0.3, "scaling": 1.0}
    assert shared.recipe(point).arguments()["density"] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        (("task_arithmetic",), ["method", "weight.x", "weight.y"]),
        (("linear",), ["method", "weight.x", "weight.y"]),
        (("dare_linear",), ["method", "weight.x", "weight.y", "density.x", "density.y"]),
        (("slerp",), ["method", "t"]),
        (("slerp", "task_arithmetic"), ["method", "weight.x", "weight.y", "t"]),
    ],
)
def test_only_numbers_that_some_method_uses_are_searched(methods: tuple[str, ...], names: list[str]) -> None:
    assert list(space("x", "y", methods=methods).distributions) == names


def test_ranges_given_replace_the_common_ones_by_name() -> None:
    found = space(ranges={"density": (0.2, 0.4)}).distributions
    assert (found["density.y"].low, found["density.y"].high) == (0.2, 0.4)
    assert (found["weight.y"].low, found["weight.y"].high) == RANGES["weight"]


def test_a_recipe_holds_only_what_its_method_uses() -> None:
    point = dict.fromkeys(space().distributions, 0.5) | {"method": "task_arithmetic"}
    recipe = space().recipe(point)
    assert recipe.models[0].parameters == {"weight": 0.5}
    assert recipe.parameters == {}


def test_a_fixed_number_is_no_dimension_and_stands_in_every_recipe() -> None:
    of = space(ranges={"density": (0.4, 0.4), "scaling": (1.2, 1.2)})
    assert list(of.distributions) == ["method", "weight.x", "weight.y", "weight.z"]
    recipe = of.recipe({"method": "ties", "weight.x": 0.5, "weight.y": 0.5, "weight.z": 0.0})
    assert (recipe.arguments()["density"], recipe.arguments()["scaling"]) == ([0.4, 0.4], 1.2)
    assert of.params(recipe) == {"method": "ties", "weight.x": 0.5, "weight.y": 0.5, "weight.z": 0.0}


def test_numbers_that_the_method_does_not_use_do_not_change_the_recipe() -> None:
    point = dict.fromkeys(space().distributions, 0.5) | {"method": "task_arithmetic"}
    assert space().recipe(point).digest == space().recipe(point | {"density.x": 0.9, "scaling": 1.2}).digest


def test_recipes_carry_the_space_s_base_dtype_and_seed() -> None:
    point = dict.fromkeys(space().distributions, 0.5) | {"method": "ties"}
    recipe = space(dtype="bfloat16", seed=7).recipe(point)
    assert (str(recipe.base), recipe.dtype, recipe.seed) == ("lab/base", "bfloat16", 7)


PARENT_POINTS = [
    {"method": "task_arithmetic", "weight.x": 1.0},
    {"method": "linear", "weight.x": 0.4},
    {"method": "dare_linear", "weight.x": 1.0, "density.x": 1.0},
    {"method": "ties", "weight.x": 0.3, "density.x": 1.0, "scaling": 1.0},
    {"method": "dare_ties", "weight.x": 0.3, "density.x": 1.0, "scaling": 1.0},
]


@pytest.mark.parametrize("point", PARENT_POINTS, ids=lambda p: p["method"])
def test_a_point_that_is_one_model_is_that_parent(point: dict[str, Any]) -> None:
    of = space(methods=WEIGHTED)
    zero = {"weight.y": 0.0, "weight.z": 0.0, "density.x": 0.3, "density.y": 0.3, "density.z": 0.3, "scaling": 0.7}
    recipe = of.recipe(zero | point)
    assert recipe.digest == of.parents()["x"].digest
    assert recipe.digest == Recipe(method="linear", models=("lab/x",)).digest


def test_a_number_one_step_short_of_its_range_s_end_is_at_the_end() -> None:
    short = math.nextafter(1.0, 0.0)
    point = {"method": "task_arithmetic", "weight.x": short, "weight.y": 0.0, "weight.z": 0.0}
    assert space().recipe(point).digest == space().parents()["x"].digest
    assert (
        space().recipe(point | {"weight.y": short}).digest == space().recipe(point | {"weight.x": 1.0, "weight.y": 1.0}).digest
    )


@pytest.mark.parametrize(("t", "name"), [(0.0, "x"), (1.0, "y")])
def test_the_ends_of_a_slerp_are_its_models(t: float, name: str) -> None:
    of = space("x", "y", methods=("slerp",))
    assert of.recipe({"method": "slerp", "t": t}).digest == of.parents()[name].digest


@pytest.mark.parametrize("method", [m for m in WEIGHTED if m != "linear"])
def test_no_weight_at_all_is_the_base(method: str) -> None:
    of = space(methods=(method,))
    point = dict.fromkeys(of.distributions, 0.0) | {"method": method, "scaling": 1.2}
    assert of.recipe(point).digest == Recipe(method="linear", models=("lab/base",)).digest


def test_an_average_without_weights_is_the_uniform_one() -> None:
    of = space(methods=("linear",))
    point = {"method": "linear", "weight.x": 0.0, "weight.y": 0.0, "weight.z": 0.0}
    assert of.recipe(point).digest == of.seeds()["uniform average"].digest


def test_a_sum_whose_weights_add_up_to_1_is_an_average() -> None:
    of = space(methods=("task_arithmetic", "linear"))
    weights = {"weight.x": 0.5, "weight.y": 0.25, "weight.z": 0.25}
    assert of.recipe({"method": "task_arithmetic", **weights}).digest == of.recipe({"method": "linear", **weights}).digest


def test_proportional_weights_are_one_recipe_where_the_method_divides_by_their_sum() -> None:
    shared = {"method": "ties", "density.x": 0.2, "density.y": 0.2, "density.z": 0.2, "scaling": 0.9}
    small, large = ({f"weight.{n}": w * s for n, w in zip("xyz", (3, 2, 1), strict=True)} for s in (0.1, 0.3))
    assert space().recipe(shared | small).digest == space().recipe(shared | large).digest


def test_different_densities_are_different_recipes() -> None:
    point = dict.fromkeys(space().distributions, 0.5) | {"method": "ties"}
    assert space().recipe(point).digest != space().recipe(point | {"density.z": 0.6}).digest


@pytest.mark.parametrize("method", WEIGHTED)
def test_every_space_starts_with_its_parents_and_their_uniform_average(method: str) -> None:
    seeds = space(methods=(method,)).seeds()
    assert list(seeds) == ["x", "y", "z", "uniform average"]
    assert [[m.name for m in r.models] for r in seeds.values()] == [["x"], ["y"], ["z"], ["x", "y", "z"]]
    assert seeds["uniform average"].arguments()["weights"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("label", ["x", "y", "z"])
def test_parents_are_points_of_the_space(method: str, label: str) -> None:
    of = space(methods=(method,))
    drawn = dict.fromkeys(of.distributions, 0.5) | of.params(of.seeds()[label])
    assert of.recipe(drawn).digest == of.seeds()[label].digest


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_the_uniform_average_is_a_point_of_a_space_with_plain_sums(method: str) -> None:
    of = space(methods=(method,))
    assert of.recipe(of.params(of.seeds()["uniform average"])).digest == of.seeds()["uniform average"].digest


@pytest.mark.parametrize(("label", "t"), [("x", 0.0), ("y", 1.0), ("uniform average", 0.5)])
def test_seeds_lie_on_a_slerp_where_it_is_all_there_is(label: str, t: float) -> None:
    of = space("x", "y", methods=("slerp",))
    assert of.params(of.seeds()[label]) == {"method": "slerp", "t": t}


def test_one_model_has_no_average() -> None:
    assert list(space("x").seeds()) == ["x"]


def test_a_seed_outside_the_ranges_has_the_nearest_point() -> None:
    of = space(ranges={"weight": (0.1, 0.8)})
    assert of.params(of.seeds()["x"]) == {"method": "task_arithmetic", "weight.x": 0.8, "weight.y": 0.1, "weight.z": 0.1}


def test_a_sum_s_scaling_goes_into_its_weights() -> None:
    recipe = Recipe(method="task_arithmetic", models=("lab/x", "lab/y"), base="lab/base", parameters={"scaling": 0.4})
    assert space().params(recipe) == {"method": "task_arithmetic", "weight.x": 0.4, "weight.y": 0.4, "weight.z": 0.0}


def test_a_slerp_of_the_models_in_the_other_order_runs_backwards() -> None:
    recipe = Recipe(method="slerp", models=("lab/y", "lab/x"), parameters={"t": 0.2})
    assert space("x", "y", methods=("slerp",)).params(recipe)["t"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="linear", models=("lab/x", "lab/other")),
        Recipe(method="dare_linear", models=("lab/x",), base="lab/base"),
        Recipe(method="slerp", models=("lab/x", "lab/y")),
        Recipe(
            method="task_arithmetic",
            base="lab/base",
            models=("lab/x",),
            layers=LayerMap(slices=(Slice(sources=(LayerRange(model="x", start=0, stop=1),)),)),
        ),
    ],
    ids=["another model", "another method", "slerp", "slices"],
)
def test_a_recipe_that_is_not_in_the_space_has_no_point(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="not"):
        space().params(recipe)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ()}, "needs models"),
        ({"models": ("lab/x", "lab/x")}, "given twice"),
        ({"models": (RecipeModel(ref=ModelRef("lab/x"), parameters={"weight": 1.0}),)}, "a search finds them"),
        ({"methods": ()}, "needs merge methods"),
        ({"methods": ("tise",)}, "Did you mean 'ties'"),
        ({"methods": ("slerp",)}, "exactly 2 models"),
        ({"base": None}, "give `base`"),
        ({"dtype": "float64"}, "Unknown dtype"),
        ({"seed": 0.5}, "`seed` is a whole number"),
        ({"ranges": {"wieght": (0, 1)}}, "Did you mean 'weight'"),
        ({"ranges": {"weight": (1, 0)}}, r"low <= high, got \(1, 0\)"),
        ({"ranges": {"weight": 1.0}}, "low <= high, got 1.0"),
        ({"ranges": {"scaling": (0, math.inf)}}, "finite low <= high"),
        ({"ranges": {"scaling": (-1, 1)}}, "starts at 0"),
        ({"methods": ("passthrough",)}, "passthrough cannot be searched: it only puts"),
        ({"ranges": {"density": (0.5, 1.5)}}, r"lies in \[0, 1\]"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space(**given)


def test_all_that_is_wrong_with_a_space_is_said_at_once() -> None:
    with pytest.raises(RecipeError, match=r"(?s)Did you mean 'ties'.*low <= high"):
        space(methods=("tise",), ranges={"t": (2,)})


def test_models_without_a_base_can_be_averaged() -> None:
    assert list(space(base=None, methods=("linear",)).seeds()) == ["x", "y", "z", "uniform average"]


@pytest.mark.parametrize(
    "given",
    [{"seed": 1}, {"dtype": "float16"}, {"base": "lab/other"}, {"methods": ("ties",)}, {"ranges": {"scaling": (0.5, 1.0)}}],
)
def test_the_description_tells_spaces_apart(given: dict[str, Any]) -> None:
    assert space(**given).description != space().description
