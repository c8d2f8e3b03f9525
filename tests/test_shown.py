"""What a notebook shows of our objects, by IPython's own account."""

from io import BytesIO

import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from hf_merge.evaluation.objective import Objective
from hf_merge.publishing.plots import plot_front
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

RECIPE = Recipe(method="linear", models=("you/math", "you/code"), parameters={"weight": 0.5})
TRIAL = Trial(
    number=7,
    recipe=RECIPE,
    scores={"math": Score(value=0.5, examples=10), "code": Score(value=0.25, examples=10)},
    held_out={"math": Score(value=0.4, examples=10), "code": Score(value=0.125, examples=10)},
)
OBJECTIVE = Objective(name="math", dataset="gsm8k", task="text-generation", metric="exact_match")


def shown(value: object) -> dict[str, object]:
    found: dict[str, object] = DisplayFormatter().format(value)[0]
    return found


@pytest.mark.parametrize("value", [RECIPE, TRIAL, OBJECTIVE], ids=lambda value: type(value).__name__)
def test_a_notebook_shows_what_is_printed(value: object) -> None:
    assert shown(value) == {"text/plain": str(value)}


def test_a_trial_says_what_it_is_and_what_it_scored_where() -> None:
    assert str(TRIAL).splitlines() == [
        f"trial 7: {RECIPE}",
        "  on search rows: math 0.5000, code 0.2500",
        "  held out: math 0.4000, code 0.1250",
    ]


def test_a_trial_that_failed_or_was_stopped_says_so() -> None:
    failed = Trial(number=1, recipe=RECIPE, error="MergeError: too large")
    stopped = Trial(
        number=2, recipe=RECIPE, scores={"math": Score(value=0.5, examples=10)}, stopped=True, violations={"math": 0.01}
    )
    assert str(failed).endswith("\n  failed: MergeError: too large")
    assert str(stopped).endswith("\n  on search rows, estimated: math 0.5000\n  misses math by 0.01")


def test_a_picture_is_shown_without_pyplot() -> None:
    directions = dict.fromkeys(("math", "code"), "maximize")
    figure = plot_front(Front.of([TRIAL], directions, dict.fromkeys(directions, 0.0)))
    data = shown(figure)["image/png"]
    assert isinstance(data, bytes)
    assert min(Image.open(BytesIO(data)).size) > 300
