"""Which parameters are said to have mattered."""

from typing import Any

import pytest

from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score, Scores
from hf_merge.search.importance import LEAST, importances
from hf_merge.search.loop import search


def first_weight(recipe: Recipe) -> float:
    return float(next((m.parameters.get("weight", 0.0) for m in recipe.models), 0.0))  # type: ignore[arg-type]


def found(problem: Any, sign: float, trials: int = 60) -> dict[str, dict[str, float]]:
    def score(recipe: Recipe) -> Scores:
        return {"it": Score(value=sign * (first_weight(recipe) - 0.5) ** 2, examples=1)}

    direction = "minimize" if sign > 0 else "maximize"
    return importances(search(score, problem.space, {"it": direction}, trials=trials, sampler="random", progress=False))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_parameter_that_decides_is_the_most_important(problem: Any, sign: float) -> None:
    shares = found(problem, sign)["it"]
    assert next(iter(shares)).startswith("weight.")
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_nothing_is_said_after_few_trials(problem: Any) -> None:
    assert found(problem, 1.0, trials=LEAST - 1) == {}
