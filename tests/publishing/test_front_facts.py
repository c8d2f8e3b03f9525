"""Facts about a front: its growth, its flattery, its points' shares, and what cannot be told apart."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hf_merge.model_ref import ModelRef
from hf_merge.publishing.card import render
from hf_merge.publishing.facts import CardFacts, SearchFacts
from hf_merge.publishing.front_facts import alike, contributions, history, optimism
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.scores import Score
from hf_merge.search.trial import Front, Trial

UP = {"a": "maximize", "b": "maximize"}
ORIGIN = {"a": 0.0, "b": 0.0}


def make(number: int, search: tuple[float, float], held_out: tuple[float, float] | None = None, spread: float = 0.01) -> Trial:
    noise = np.random.default_rng(number).normal(0, spread, (2, 200))
    models = (RecipeModel(ref=ModelRef("x/y"), parameters={"weight": 1 + number}), RecipeModel(ref=ModelRef("x/z")))
    return Trial(
        number=number,
        recipe=Recipe(method="linear", models=models),
        scores={n: Score(value=v, examples=9) for n, v in zip("ab", search, strict=True)},
        held_out={
            n: Score(value=v, examples=9, replicates=v + e) for n, v, e in zip("ab", held_out or search, noise, strict=True)
        },
    )


def of(*trials: Trial, directions: dict[str, str] = UP) -> Front:
    return Front(trials=trials, directions=directions, reference=ORIGIN)


def test_the_history_is_the_hypervolume_after_each_trial() -> None:
    trials = [make(0, (0.5, 0.5)), make(1, (0.4, 0.4)), make(2, (0.8, 0.25)), make(3, (0.6, 0.6))]
    assert history(trials, UP, ORIGIN) == pytest.approx([0.25, 0.25, 0.325, 0.41])


def test_the_history_leaves_out_what_is_on_no_front() -> None:
    trials = [
        make(0, (0.5, 0.5)),
        replace(make(1, (0.9, 0.9)), stopped=True),
        replace(make(2, (0.9, 0.9)), violations={"a": 1.0}),
    ]
    assert history([*trials, replace(make(3, (1, 1)), scores={})], UP, ORIGIN) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(("directions", "expected"), [(UP, 0.15), (dict.fromkeys("ab", "minimize"), -0.15)])
def test_optimism_is_what_the_search_promises_beyond_held_out_data(directions: dict[str, str], expected: float) -> None:
    front = of(make(0, (0.8, 0.2), (0.6, 0.2)), make(1, (0.6, 0.4), (0.5, 0.4)), directions=directions)
    found = optimism(front)
    assert found["a"].value == pytest.approx(expected)
    assert found["a"].clear
    assert found["b"].value == pytest.approx(0.0)
    assert not found["b"].clear


def test_contributions_are_what_would_be_lost() -> None:
    found = contributions(of(make(0, (0.8, 0.2)), make(1, (0.5, 0.5)), make(2, (0.4, 0.4))))
    assert found == pytest.approx({0: 0.06, 1: 0.07, 2: 0.0})


def test_points_within_the_noise_are_alike() -> None:
    front = of(make(0, (0.8, 0.2)), make(1, (0.8001, 0.1999)), make(2, (0.5, 0.5)))
    assert [(a.number, b.number) for a, b in alike(front)] == [(0, 1)]


def test_points_without_replicates_are_not_called_alike() -> None:
    bare = [replace(t, held_out=t.scores) for t in (make(0, (0.8, 0.2)), make(1, (0.8, 0.2)))]
    assert alike(of(*bare)) == []


def test_a_card_says_what_the_front_keeps_and_what_mattered(make_facts: Callable[..., CardFacts]) -> None:
    facts = make_facts()
    assert facts.search is not None
    name = next(iter(facts.directions))
    search = SearchFacts(
        evaluated=30, failed=0, sampler="map", seed=1, seconds=9.0,
        constraints={name: ">= base - 0.01"}, importances={name: {"weight.x": 0.7, "scaling": 0.3}},
    )  # fmt: skip
    card = str(render(replace(facts, search=search)))
    assert f"every point of the front keeps `{name} >= base - 0.01`" in card
    assert "`weight.x` 70%" in card
    assert "than it is on held-out data by" in card
