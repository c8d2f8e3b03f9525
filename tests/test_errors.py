import pytest

from hf_merge import errors
from hf_merge.errors import HfMergeError, RecipeError, unknown


@pytest.mark.parametrize("name", ["RecipeError", "CheckpointError", "MergeError", "EvaluationError", "PublishError"])
def test_every_error_is_an_hf_merge_error(name):
    assert issubclass(getattr(errors, name), HfMergeError)


def test_a_recipe_error_is_a_value_error():
    assert issubclass(RecipeError, ValueError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tise", "Unknown merge method 'tise'. Did you mean 'ties'? Known: linear, slerp, ties."),
        ("fisher", "Unknown merge method 'fisher'. Known: linear, slerp, ties."),
        (7, "Unknown merge method 7. Known: linear, slerp, ties."),
    ],
)
def test_an_unknown_name_is_told_with_the_closest_and_all_known(given, message):
    assert unknown("merge method", given, ["ties", "linear", "slerp"]) == message


def test_nothing_known_is_said():
    assert unknown("key", "a", []) == "Unknown key 'a'. Known: none."
