"""An analytic search problem whose front is known, and whose every evaluation is noted."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score, Scores
from hf_merge.search.space import Space

WHOLE = 5 / 6 + 2 * 0.1 + 0.1**2
"""The hypervolume of the front of `Specialists` above (-0.1, -0.1): ∫₀¹ 1 - (1 - √(1-x))² dx, and the reference's margin."""


@dataclass
class Specialists:
    """Two tasks, each solved by one of two models: f_k = 1 - ½ |w - e_k|², the trimmed methods a little worse.

    The front is w = (t, 1 - t), from (0, 1) to (1, 0). `calls` holds the digest of every recipe evaluated; `before` may
    raise or return scores of its own.
    """

    calls: list[str] = field(default_factory=list)
    before: Callable[[Recipe, int], Scores | None] = lambda recipe, call: None
    directions: dict[str, str] = field(default_factory=lambda: {"x": "maximize", "y": "maximize"})
    space: Space = field(
        default_factory=lambda: Space(models=("lab/x", "lab/y"), base="lab/base")  # type: ignore[arg-type]
    )

    def __call__(self, recipe: Recipe) -> Scores:
        self.calls.append(recipe.digest)
        own = self.before(recipe, len(self.calls))
        if own is not None:
            return own
        weights = dict(zip((m.name for m in recipe.models), recipe.arguments()["weights"], strict=True))
        x, y = weights.get("x", 0.0), weights.get("y", 0.0)
        worse = 0.05 if "ties" in recipe.method else 0.0
        values = {"x": 1 - ((1 - x) ** 2 + y**2) / 2 - worse, "y": 1 - (x**2 + (1 - y) ** 2) / 2 - worse}
        return {name: Score(value=value, examples=100, seconds=0.25) for name, value in values.items()}


@pytest.fixture
def problem() -> Specialists:
    return Specialists()


@pytest.fixture
def whole() -> float:
    return WHOLE
