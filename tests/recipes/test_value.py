import pytest

from hf_merge.errors import RecipeError
from hf_merge.recipes.value import Filtered, layered, numbers, over, parsed, plain, resolved

MLP = {"filter": "mlp", "value": [0, 1]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, 0.5),
        (True, True),
        ("1e-3", 0.001),
        ("much", "much"),
        ([1, "2e0"], (1, 2.0)),
        (MLP, (Filtered("mlp", (0, 1)),)),
        ([MLP, {"value": 0.5}], (Filtered("mlp", (0, 1)), Filtered(None, 0.5))),
        ([MLP, 0.5], (Filtered("mlp", (0, 1)), Filtered(None, 0.5))),
        ((Filtered("mlp", 1),), (Filtered("mlp", 1),)),
    ],
    ids=str,
)
def test_a_value_is_a_number_a_gradient_or_filters(given, expected):
    assert parsed(given) == expected


@pytest.mark.parametrize("given", [{"filter": "mlp"}, {"pattern": "mlp", "value": 1}, {}, {"filter": 3, "value": 1}], ids=str)
def test_a_mapping_that_is_no_filter_is_refused(given):
    with pytest.raises(RecipeError, match="filter"):
        parsed([given])


@pytest.mark.parametrize("given", [0.5, True, [0.0, 1.0], [MLP, {"value": 0.5}], [{"filter": "*", "value": 1}]], ids=str)
def test_a_value_is_written_as_it_was_read(given):
    assert plain(parsed(given)) == given


def test_the_numbers_of_a_value_are_all_that_it_can_become():
    assert list(numbers(parsed([MLP, {"value": 0.5}]))) == [0, 1, 0.5]


@pytest.mark.parametrize(
    ("gradient", "depth", "expected"),
    [
        ((3,), 0.7, 3),
        ((0, 1), 0.0, 0),
        ((0, 1), 0.25, 0.25),
        ((0, 1), 1.0, 1),
        ((0, 10, 0), 0.25, 5),
        ((0, 10, 0), 0.5, 10),
        ((False, True), 0.5, False),
        ((False, True), 0.6, True),
    ],
)
def test_a_gradient_is_interpolated_between_its_points(gradient, depth, expected):
    assert resolved(gradient, "x", depth) == expected


@pytest.mark.parametrize(("tensor", "expected"), [("a.mlp.w", 0.5), ("a.attn.w", 2), ("norm", None)])
def test_the_first_filter_in_the_tensors_name_holds(tensor, expected):
    assert resolved(parsed([MLP, {"filter": "attn", "value": 2}, {"filter": "mlp", "value": 3}]), tensor, 0.5) == expected


@pytest.mark.parametrize("rest", [{"value": 7}, {"filter": "*", "value": 7}, 7], ids=str)
def test_a_last_value_without_a_filter_or_with_a_star_is_for_the_rest(rest):
    assert resolved(parsed([MLP, rest]), "norm", 0.5) == 7


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 9.0),
        ([1, 2], 1.0),
        ([[3]], 3.0),
        ([[2, 2]], 2.0),
        ([True], True),
        ([[0, 1], 2], (0.0, 1.0)),
        ([[{"filter": "*", "value": 1}]], 1.0),
        ([[{"filter": "a", "value": 1}], 2], (Filtered("a", 1.0), Filtered(None, 2.0))),
        (
            [[{"filter": "a", "value": 1}], [{"filter": "b", "value": 2}]],
            (Filtered("a", 1.0), Filtered("b", 2.0), Filtered(None, 9.0)),
        ),
        ([[{"filter": "a", "value": 1}, {"filter": "ab", "value": 2}]], (Filtered("a", 1.0), Filtered(None, 9.0))),
    ],
    ids=str,
)
def test_levels_become_the_shortest_value_that_says_the_same(values, expected):
    found = layered([parsed(value) for value in values], 9)
    assert (found, str(found)) == (expected, str(expected))


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1}, {"a": 2}, {"a": 1}),
        ({"a": [0, 1]}, {"a": 2}, {"a": (0, 1)}),
        ({"a": [MLP]}, {"a": 2}, {"a": (Filtered("mlp", (0, 1)), Filtered(None, 2))}),
        ({"a": [MLP, {"value": 3}]}, {"a": 2}, {"a": (Filtered("mlp", (0, 1)), Filtered(None, 3))}),
        ({"a": [MLP]}, {"a": {"filter": "x", "value": 2}}, {"a": (Filtered("mlp", (0, 1)), Filtered("x", 2))}),
    ],
    ids=str,
)
def test_an_outer_level_holds_where_no_filter_of_the_inner_one_matches(inner, outer, expected):
    assert over({k: parsed(v) for k, v in inner.items()}, {k: parsed(v) for k, v in outer.items()}) == expected
