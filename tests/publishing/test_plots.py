import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.plots import plot_front, save_png
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

NAMES = ("a", "b", "c", "d", "e")


def draw(facts: CardFacts) -> Figure:
    assert facts.front is not None
    return plot_front(
        facts.front, facts.parents, facts.others, facts.trial, metrics=dict.fromkeys(facts.directions, "accuracy")
    )


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def with_objectives(facts: CardFacts, count: int) -> tuple[Front, list[Trial]]:
    assert facts.front is not None

    def widened(trial: Trial, shift: int) -> Trial:
        values = {n: 0.5 + 0.08 * ((k * 7 + shift * 3) % 5) for k, n in enumerate(NAMES[:count])}
        return replace(trial, held_out={n: Score(value=v, examples=1) for n, v in values.items()})

    trials = tuple(widened(t, shift) for shift, t in enumerate(facts.front))
    directions = dict.fromkeys(NAMES[:count], "maximize")
    front = Front(trials=trials, directions=directions, reference=dict.fromkeys(directions, 0.0))
    return front, [widened(t, 9 + shift) for shift, t in enumerate(facts.parents)]


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_picture_is_wide_and_light(make_facts: Callable[..., CardFacts], tmp_path: Path, objectives: int) -> None:
    save_png(draw(make_facts(objectives)), tmp_path / "front.png")
    assert Image.open(tmp_path / "front.png").width == 1600
    assert (tmp_path / "front.png").stat().st_size < 150_000


def test_the_same_front_gives_the_same_bytes(facts: CardFacts, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_png(draw(facts), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_picture_carries_no_metadata(facts: CardFacts, tmp_path: Path) -> None:
    save_png(draw(facts), tmp_path / "front.png")
    assert Image.open(tmp_path / "front.png").info == {}


def test_the_chosen_model_the_parents_and_the_others_are_named(facts: CardFacts) -> None:
    assert {"trial 12", "sentiment", "question", "base", "uniform average"} <= set(texts(draw(facts)))


@pytest.mark.parametrize("objectives", [2, 3])
def test_names_do_not_cover_each_other(make_facts: Callable[..., CardFacts], objectives: int) -> None:
    for axes in draw(make_facts(objectives)).axes:
        boxes = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        assert len(boxes) > 2
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_axes_say_what_is_measured_and_where_better_is(facts: CardFacts) -> None:
    assert draw(facts).axes[0].get_xlabel() == "sentiment, accuracy  → better"


def test_less_is_to_the_right_where_less_is_better(front: Front) -> None:
    turned = replace(front, directions={"sentiment": "minimize", "question": "maximize"})
    left, right = plot_front(turned).axes[0].get_xlim()
    low, high = plot_front(turned).axes[0].get_ylim()
    assert left > right
    assert low < high


def test_a_small_front_is_shown_closer_as_well(facts: CardFacts, front: Front) -> None:
    assert len(draw(facts).axes) == 2
    assert len(plot_front(front).axes) == 1


def test_the_two_splits_are_never_mixed(facts: CardFacts, front: Front) -> None:
    unseen = [replace(t, held_out={}) for t in facts.parents]
    assert "question" not in texts(plot_front(front, unseen, split="held_out"))
    assert "question" in texts(plot_front(front, unseen, split="search"))


@pytest.mark.parametrize(("objectives", "panels"), [(1, 1), (2, 1), (3, 3), (4, 1), (5, 1)])
def test_any_number_of_objectives_can_be_drawn(facts: CardFacts, tmp_path: Path, objectives: int, panels: int) -> None:
    front, parents = with_objectives(facts, objectives)
    figure = plot_front(front, parents, chosen=front[0])
    save_png(figure, tmp_path / "front.png")
    assert len(figure.axes) in (panels, 2 * panels)


def test_a_front_of_nothing_is_an_empty_picture(tmp_path: Path) -> None:
    front = Front(trials=(), directions={"a": "maximize", "b": "maximize"}, reference={"a": 0.0, "b": 0.0})
    save_png(plot_front(front), tmp_path / "front.png")


def test_a_name_is_not_a_formula(facts: CardFacts, tmp_path: Path) -> None:
    strange = replace(facts.parents[0], label=r"$\frac{1}{$ _x_ \alpha " + "long " * 20)
    save_png(draw(replace(facts, parents=(strange,))), tmp_path / "front.png")


def test_drawing_leaves_pyplot_alone() -> None:
    code = "import sys, hf_merge.publishing.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
