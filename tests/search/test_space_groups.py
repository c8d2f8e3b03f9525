"""Weights by layers and by kinds of modules."""

from typing import Any

import pytest

from hf_merge.errors import RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.search.space import Space

MODULES = {"attention": "self_attn", "mlp": ["mlp", "fc"]}


def space(**given: Any) -> Space:
    """A space over two models on `lab/base`."""
    return Space(**{"models": ("lab/x", "lab/y"), "base": "lab/base", "methods": ("task_arithmetic",)} | given)


def weights(recipe: Recipe, tensor: str = "", depth: float = 0.0) -> list[float]:
    found: list[float] = recipe.arguments(tensor, depth)["weights"]
    return found


def test_each_weight_is_a_gradient_over_the_layers() -> None:
    of = space(layer_groups=3)
    names = ["method", "weight.x.1", "weight.x.2", "weight.x.3", "weight.y.1", "weight.y.2", "weight.y.3"]
    assert list(of.distributions) == names
    recipe = of.recipe(dict(zip(names, ["task_arithmetic", 0.0, 0.25, 1.0, 0.5, 0.5, 0.5], strict=True)))
    assert [m.parameters["weight"] for m in recipe.models] == [(0.0, 0.25, 1.0), 0.5]
    assert weights(recipe, depth=0.75) == [0.625, 0.5]


def test_each_kind_of_module_has_a_weight_of_its_own() -> None:
    of = space(module_groups=MODULES)
    assert [n for n in of.distributions if "x" in n] == ["weight.x.attention", "weight.x.mlp", "weight.x.rest"]
    point = {"weight.x.attention": 0.1, "weight.x.mlp": 0.2, "weight.x.rest": 0.3} | {
        f"weight.y.{n}": 0.9 for n in ("attention", "mlp", "rest")
    }
    recipe = of.recipe({"method": "task_arithmetic", **point})
    tensors = ["layers.0.self_attn.q", "layers.0.mlp.up", "layers.0.fc1", "norm"]
    assert [weights(recipe, tensor)[0] for tensor in tensors] == [0.1, 0.2, 0.2, 0.3]
    assert recipe.models[1].parameters == {"weight": 0.9}


def test_modules_have_gradients_of_their_own() -> None:
    of = space(module_groups={"attention": "self_attn"}, layer_groups=2)
    point = {"weight.x.attention.1": 0.0, "weight.x.attention.2": 1.0, "weight.x.rest.1": 0.4, "weight.x.rest.2": 0.4}
    recipe = of.recipe({"method": "task_arithmetic"} | point | {k.replace("x", "y"): 0.3 for k in point})
    assert weights(recipe, "self_attn", 0.5) == [0.5, 0.3]
    assert weights(recipe, "mlp", 0.5) == [0.4, 0.3]


def test_the_position_between_two_models_has_groups_too() -> None:
    of = space(methods=("slerp",), layer_groups=2)
    assert of.recipe({"method": "slerp", "t.1": 0.0, "t.2": 0.8}).arguments("", 0.5) == {"t": 0.4}


def test_densities_have_no_groups() -> None:
    names = [n for n in space(methods=("ties",), layer_groups=2).distributions if "density" in n]
    assert names == ["density.x", "density.y"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_equal_numbers_in_all_groups_are_the_plain_number(method: str) -> None:
    plain = space(methods=(method,))
    grouped = space(methods=(method,), layer_groups=3, module_groups=MODULES)
    point = dict.fromkeys(plain.distributions, 0.35) | {"method": method}
    same = dict.fromkeys(grouped.distributions, 0.35) | {"method": method}
    assert grouped.recipe(same).digest == plain.recipe(point).digest


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "della_linear", "nuslerp"])
@pytest.mark.parametrize("label", ["x", "y"])
def test_a_parent_is_a_point_of_a_space_with_groups(method: str, label: str) -> None:
    of = space(methods=(method,), layer_groups=3, module_groups=MODULES)
    inner = dict.fromkeys(of.distributions, 0.5) | of.params(of.seeds()[label])
    assert of.recipe(inner).digest == Recipe(method="linear", models=(f"lab/{label}",)).digest


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "paint"])
def test_the_uniform_average_is_a_point_of_a_space_with_groups(method: str) -> None:
    of = space(methods=(method,), layer_groups=2, module_groups=MODULES)
    found = of.params(of.seeds()["uniform average"])
    assert found.keys() == of.distributions.keys()
    wanted = of.seeds()["uniform average"] if method != "slerp" else Recipe(method="slerp", models=("lab/x", "lab/y"))
    assert of.recipe(found).digest == wanted.digest


def test_weights_add_up_to_1_in_every_group_where_they_are_proportions() -> None:
    of = space(methods=("linear",), layer_groups=2)
    recipe = of.recipe({"method": "linear", "weight.x.1": 0.1, "weight.y.1": 0.3, "weight.x.2": 0.9, "weight.y.2": 0.1})
    assert [m.parameters["weight"] for m in recipe.models] == [(0.25, 0.9), (0.75, 0.1)]


def test_a_group_without_any_weight_is_averaged_evenly_where_there_is_no_base_in_it() -> None:
    of = space(methods=("linear",), layer_groups=2)
    recipe = of.recipe({"method": "linear", "weight.x.1": 0.0, "weight.y.1": 0.0, "weight.x.2": 1.0, "weight.y.2": 0.0})
    assert weights(recipe, depth=0.0) == [0.5, 0.5]


def test_a_model_that_counts_in_one_group_alone_stays() -> None:
    of = space(layer_groups=2)
    recipe = of.recipe(
        {"method": "task_arithmetic", "weight.x.1": 0.0, "weight.x.2": 0.3, "weight.y.1": 0.4, "weight.y.2": 0.4}
    )
    assert [m.name for m in recipe.models] == ["x", "y"]


def test_a_sum_of_1_in_every_group_is_an_average() -> None:
    of = space(methods=("task_arithmetic", "linear"), layer_groups=2)
    point = {"weight.x.1": 0.0, "weight.x.2": 1.0, "weight.y.1": 1.0, "weight.y.2": 0.0}
    assert len({of.recipe({"method": m, **point}).digest for m in of.methods}) == 1


def test_a_sign_that_turns_within_the_layers_is_no_plain_sum() -> None:
    """TIES of one model is that model or its opposite, with nothing in between; the sum would fade."""
    of = space(methods=("ties",), layer_groups=2, ranges={"weight": (-1.0, 1.0), "density": (1.0, 1.0)})
    point = {"method": "ties", "weight.x.1": -1.0, "weight.x.2": 1.0, "weight.y.1": 0.0, "weight.y.2": 0.0, "scaling": 1.0}
    assert of.recipe(point).method == "ties"


def test_a_recipe_without_groups_has_a_point_in_a_space_with_them() -> None:
    recipe = Recipe(method="task_arithmetic", base="lab/base", models=("lab/y",), parameters={"weight": 0.6})
    of = space(layer_groups=2)
    assert of.recipe(of.params(recipe)).digest == recipe.digest


def test_a_gradient_is_read_at_its_middle_by_a_space_without_groups() -> None:
    recipe = Recipe(method="task_arithmetic", base="lab/base", models=("lab/x",), parameters={"weight": (0.2, 0.6)})
    assert space().params(recipe)["weight.x"] == pytest.approx(0.4)


def test_one_layer_group_is_none() -> None:
    assert space(layer_groups=1).description == space().description


@pytest.mark.parametrize(
    "given",
    [
        {"layer_groups": 2},
        {"module_groups": {"attention": "self_attn"}},
        {"module_groups": {"attention": "self_attn", "mlp": "mlp"}},
        {"module_groups": {"mlp": "mlp", "attention": "self_attn"}},
        {"module_groups": {"attention": "attn"}},
    ],
)
def test_the_description_tells_groups_apart(given: dict[str, Any]) -> None:
    others = [space(), space(layer_groups=3), space(module_groups={"attention": "q"})]
    assert space(**given).description not in [other.description for other in others]


def test_the_order_of_modules_is_part_of_the_description() -> None:
    one, two = (space(module_groups=dict(pairs)).description for pairs in (MODULES.items(), reversed(MODULES.items())))
    assert one != two


def test_a_space_without_groups_is_described_as_it_always_was() -> None:
    wanted = ["base", "models", "methods", "ranges", "per_model_density", "dtype", "seed"]
    assert list(space().description) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_groups": 0}, "at least 1, got 0"),
        ({"layer_groups": 2.5}, "whole number"),
        ({"layer_groups": True}, "whole number"),
        ({"module_groups": ["self_attn"]}, "parts of tensors' names"),
        ({"module_groups": {"attention": ""}}, "parts of tensors' names"),
        ({"module_groups": {"attention": []}}, "parts of tensors' names"),
        ({"module_groups": {"attention": 3}}, "parts of tensors' names"),
        ({"module_groups": {"all": "*"}}, "parts of tensors' names"),
        ({"module_groups": {"rest": "norm"}}, "other than 'rest'"),
        ({"module_groups": {"a.b": "norm"}}, "without dots"),
        ({"module_groups": {"a": "attn", "q": "attn.q"}}, "'attn.q' in `module_groups` never matches: 'attn' stands before"),
    ],
)
def test_groups_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space(**given)
