import pytest

from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.value import Filtered


def part(*ranges, module="") -> Slice:
    return Slice(sources=tuple(LayerRange(model=m, start=a, stop=b) for m, a, b in ranges), module=module)


def test_parameters_are_parsed_and_copied():
    given = {"weight": [{"filter": "mlp", "value": 1}]}
    source = LayerRange(model="a", parameters=given)
    given.clear()
    assert source.parameters == {"weight": (Filtered("mlp", 1),)}


@pytest.mark.parametrize(("start", "stop", "length"), [(2, 5, 3), (0, None, None)])
def test_a_ranges_length_is_known_with_its_end(start, stop, length):
    assert LayerRange(model="a", start=start, stop=stop).length == length


def test_modules_stand_in_order_of_their_first_slice():
    made = LayerMap((part(("a", 0, 1), module="text"), part(("a", 0, 1), module="vision"), part(("a", 1, 2), module="text")))
    assert made.modules == ("text", "vision")


@pytest.mark.parametrize(
    "slices",
    [
        [part(("a", 0, 2))],
        [part(("a", 0, 2), ("b", 4, 6)), part(("b", 0, 1))],
        [part(("", 0, 2), ("a", 2, 4))],
        [part(("a", 0, None), ("b", 0, None))],
        [part(("a", 0, 2), ("a", 1, 3))],
    ],
    ids=str,
)
def test_slices_of_known_models_and_of_the_base_are_right(slices):
    assert list(LayerMap(tuple(slices)).problems(["a", "b"])) == []


@pytest.mark.parametrize(
    ("slices", "problem"),
    [
        ([], "A layer map needs slices, got none."),
        ([part()], "A slice needs a source, got none."),
        ([part(("c", 0, 2))], "A slice takes layers of 'c', which is not a model of the recipe."),
        ([part(("a", 0, 2), ("b", 0, 3))], "The sources of a slice have equally many layers, got a [0, 2), b [0, 3)."),
        ([part(("a", 0, 2), ("", 0, 3))], "The sources of a slice have equally many layers, got a [0, 2), the base [0, 3)."),
        ([part(("a", 0, 2), ("b", 0, None))], "The sources of a slice have equally many layers, got a [0, 2), b [0, None)."),
        ([part(("a", 2, 2))], "Layers [2, 2) of 'a': a range [start, stop) has whole numbers 0 <= start < stop."),
        ([part(("a", -1, 2))], "Layers [-1, 2) of 'a': a range [start, stop) has whole numbers 0 <= start < stop."),
        ([part(("a", "x", 2))], "Layers [x, 2) of 'a': a range [start, stop) has whole numbers 0 <= start < stop."),
        ([part(("a", 0, True))], "Layers [0, True) of 'a': a range [start, stop) has whole numbers 0 <= start < stop."),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(slices, problem):
    assert list(LayerMap(tuple(slices)).problems(["a", "b"])) == [problem]
