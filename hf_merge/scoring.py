"""From a recipe to its scores: merged in place, measured, kept in a folder; in a search as far as it takes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from transformers import PreTrainedModel

from hf_merge.evaluation.measure import Evaluator
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Scores, load_scores, partial, save_scores
from hf_merge.search.racing import Racing, race
from hf_merge.search.trial import Split, reference_point

REPLICATES = 1000
"""Bootstrap resamples behind the intervals of held-out scores."""


def scores_path(folder: Path, split: Split, digest: str) -> Path:
    """Where a run keeps the scores of a recipe on a split."""
    return folder / "scores" / split / f"{digest}.npz"


class Live(Protocol):
    """A model in memory that becomes what a recipe makes: `LiveModel`, or `Apart`."""

    @property
    def model(self) -> PreTrainedModel:
        """What was loaded last."""

    def load(self, recipe: Recipe) -> None:
        """Become what `recipe` makes."""

    def distance(self, recipe: Recipe) -> float:
        """Σ |θ - θ'| from what another recipe makes."""


@dataclass(eq=False, kw_only=True)
class Scorer:
    """Scores recipes, and keeps what it finds in the `run`'s folder.

    `base` is the recipe whose distance is a model's `delta_norm`, if an objective asks for that. With `racing` a recipe of the
    search is measured only while it may add enough to the front of the others in the folder; those `whole` (by digest; the
    `parents` are among them) are always measured to the end.
    """

    evaluator: Evaluator
    live: Live
    run: Path
    base: Recipe | None = None
    racing: bool = False
    parents: Collection[str] = ()
    whole: Collection[str] = ()
    _known: dict[str, Scores] = field(default_factory=dict)

    def __call__(self, recipe: Recipe, split: Split = "search") -> Scores:
        """The recipe's scores. Those of one that the race stopped are estimates; their `rows` say what was seen."""
        self.live.load(recipe)
        facts = {} if self.base is None else {"delta_norm": self.live.distance(self.base)}
        return self.measured(self.live.model, recipe, split, facts)

    def measured(
        self, model: PreTrainedModel, recipe: Recipe, split: Split, facts: Mapping[str, float] = MappingProxyType({})
    ) -> Scores:
        """The scores of a model in memory that is what `recipe` makes; they are kept. `facts` as in `Evaluator.measure`."""
        scores: Scores
        if split == "search" and self.racing and recipe.digest not in self.whole and (rivals := self._rivals()):
            reference = reference_point([rivals[digest] for digest in self.parents], self.evaluator.directions)
            racing = Racing(self.evaluator.directions, reference, smoothed=self.evaluator.smoothed)
            others = list(rivals.values())
            rounds = self.evaluator.rounds(model, priorities=racing.priorities(others), facts=facts)
            scores, _ = race(rounds, racing, others, tried=len(self._known))
        else:
            replicates = REPLICATES if split == "held_out" else 0
            scores = self.evaluator.measure(model, split, replicates=replicates, facts=facts)
        save_scores(scores_path(self.run, split, recipe.digest), scores)
        return scores

    def _rivals(self) -> Mapping[str, Scores]:
        """What was measured to the end, other workers' included; nothing until all parents are there."""
        for path in (self.run / "scores" / "search").glob("*.npz"):
            if path.stem not in self._known:
                self._known[path.stem] = load_scores(path)
        there = {digest: scores for digest, scores in self._known.items() if scores and not partial(scores)}
        return there if there.keys() >= set(self.parents) else {}
