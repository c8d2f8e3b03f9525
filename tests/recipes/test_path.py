"""Recipes of paths: what they say, that they are written and read, and that they are told apart."""

from dataclasses import replace

import pytest

from hf_merge.errors import RecipeError
from hf_merge.recipes import yaml
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.path import Step, along, path_of
from hf_merge.recipes.recipe import Recipe

PATH = (Step("a", 0), Step("a", 1), Step("merged", 2, 1.25), Step("merged", 3), Step("b", 1), Step("b", 1), Step("", 3))


def recipe(**more: object) -> Recipe:
    given = {"method": "dare_ties", "base": "org/base", "models": ("org/a", "org/b"), "parameters": {"weight": 0.3}}
    return Recipe(**{**given, **more})  # type: ignore[arg-type]


def test_a_path_becomes_slices_of_layers_that_follow_each_other():
    assert str(along(recipe(), PATH, 4).layers) == "a[0:2] → 1.25×a[2:4]+b[2:4] → b[1:2] → b[1:2] → base[3:4]"


def test_layers_of_one_model_are_copied_and_those_of_the_merge_and_the_base_are_not():
    assert [part.copied for part in along(recipe(), PATH, 4).layers.slices] == [True, False, True, True, False]


def test_a_recipes_path_is_the_one_that_it_was_made_of():
    assert path_of(along(recipe(), PATH, 4).layers) == PATH


def test_layers_of_a_merge_are_called_as_asked_also_if_one_model_is_merged():
    path = (Step("a", 0), Step("merged 2", 2, 1.25), Step("merged 2", 3), Step("", 3))
    called = [replace(step, model="merged") if step.model == "merged 2" else step for step in path]
    assert path_of(along(recipe(), called, 4).layers, "merged 2") == path
    layers = along(recipe(models=("org/a",)), called, 4).layers
    assert path_of(layers, "merged 2") == path
    assert [step.model for step in path_of(layers)] == ["a", "a", "a", ""]


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_a_scale_stands_before_one_layer_only(scale):
    (part,) = along(recipe(), (Step("a", 0, scale), Step("a", 1)), 4).layers.slices
    assert (part.residual_scale, part.sources[0].length) == (scale, 2)


@pytest.mark.parametrize("weight", [0.3, [0.1, 0.9], [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]], ids=str)
def test_a_recipe_of_a_path_is_read_as_it_was_written(weight):
    made = along(recipe(parameters={"weight": weight}), PATH, 4)
    read = yaml.loads(yaml.dumps(made))
    assert (read.layers.slices, read.digest) == (
        tuple(replace(part, sources=again.sources) for part, again in zip(made.layers.slices, read.layers.slices, strict=True)),
        made.digest,
    )


def test_a_written_slice_says_what_is_its_own():
    first, second = yaml.to_dict(along(recipe(), PATH, 4))["slices"][:2]
    assert first == {"sources": [{"model": "org/a", "layer_range": [0, 2], "name": "a"}], "copied": True}
    assert second["residual_scale"] == 1.25


def test_a_merged_layer_takes_the_number_that_a_gradient_has_there():
    made = along(recipe(parameters={"weight": [0.0, 0.3, 0.6, 0.9]}), (Step("a", 0), Step("merged", 2)), 4)
    part = made.layers.slices[1]
    assert made.arguments("x", part.at(0, 1), part)["weights"] == pytest.approx([0.6, 0.6])


def test_without_gradients_a_slice_has_no_depth():
    assert {part.depth for part in along(recipe(), PATH, 4).layers.slices} == {None}


OTHERS = {
    "scale": (Step("a", 0, 1.1), Step("merged", 1)),
    "order": (Step("merged", 1), Step("a", 0)),
    "merged": (Step("merged", 0), Step("merged", 1)),
    "model": (Step("b", 0), Step("merged", 1)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_path_has_another_digest(other):
    made = along(recipe(), (Step("a", 0), Step("merged", 1)), 4)
    assert along(recipe(), OTHERS[other], 4).digest != made.digest


def test_a_path_that_takes_nothing_of_the_merge_does_not_hang_on_how_it_is_merged():
    path = (Step("a", 0), Step("b", 1))
    assert along(recipe(seed=1, parameters={"weight": 0.9}), path, 4).digest == along(recipe(), path, 4).digest


def test_a_path_through_the_merge_hangs_on_how_it_is_merged():
    path = (Step("a", 0), Step("merged", 1))
    assert along(recipe(parameters={"weight": 0.9}), path, 4).digest != along(recipe(), path, 4).digest


def test_copied_layers_need_not_be_as_many_models_as_the_method_merges():
    assert along(recipe(method="slerp", base=None, parameters={"t": 0.3}), PATH[:2], 4).models[0].name == "a"


def test_a_model_may_not_be_named_like_the_merge():
    with pytest.raises(RecipeError, match="give the model of that name another one"):
        along(recipe(models=("org/merged", "org/b")), PATH, 4)


@pytest.mark.parametrize(("path", "message"), [((), "needs steps"), ((Step("c", 0),), "not a model of the recipe")])
def test_what_is_no_path_is_an_error(path, message):
    with pytest.raises(RecipeError, match=message):
        along(recipe(), path, 4)


def test_a_recipe_with_layers_has_no_other_path():
    with pytest.raises(RecipeError, match="without `layers`"):
        along(along(recipe(), PATH, 4), PATH, 4)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"copied": 1}, "`copied` of a slice is true or false, got 1."),
        ({"copied": True, "parameters": {"weight": 1}}, "A slice that is copied has one source and no parameters, got a[0:2]."),
        ({"residual_scale": 0}, "`residual_scale` of a slice is a positive number, got 0."),
        ({"residual_scale": float("nan")}, "`residual_scale` of a slice is a positive number, got nan."),
        ({"depth": (0.5, 1.5)}, "`depth` of a slice is [first, last], two numbers between 0 and 1, got [0.5, 1.5]."),
        ({"depth": (0.5,)}, "`depth` of a slice is [first, last], two numbers between 0 and 1, got [0.5]."),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_slice_is_said(part, problem):
    made = Slice(sources=(LayerRange(model="a", start=0, stop=2),), **part)
    assert list(LayerMap((made,)).problems(["a"])) == [problem]


@pytest.mark.parametrize("line", ["copied: 2", "depth: 0.5", "depth: [a, b]", "residual_scale: -1", "residual_scale: [1]"])
def test_yaml_that_says_it_wrongly_is_an_error(line):
    text = f"merge_method: passthrough\nslices:\n- sources: [{{model: org/a, layer_range: [0, 2]}}]\n  {line}\n"
    with pytest.raises(RecipeError, match=line.split(":")[0]):
        yaml.loads(text)
