"""What a card is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from hf_merge.publishing.license import Declared
from hf_merge.publishing.position import Gap
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Trial


@dataclass(frozen=True, kw_only=True)
class SearchFacts:
    """How the front was found: recipes `evaluated` (`failed` ones among them, and `paths` through layers), the sampler's name
    and seed, the wall time, the `constraints` that the front keeps, and by objective how much each parameter mattered
    (`importances`, summing to 1)."""

    evaluated: int
    failed: int
    sampler: str
    seed: int
    seconds: float
    paths: int = 0
    constraints: Mapping[str, str] = field(default_factory=dict)
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class CardFacts:
    """All that a card says. For a written recipe, without front or scores, the first three will do.

    Args:
        repo_id: where the model is (going to be), `namespace/name`, or a local folder.
        trial: the published one, with its held-out scores if it was measured.
        front: the front it was chosen from; its trials carry held-out scores.
        parents, others: what to compare with, labelled and with held-out scores: the models that were merged; the base and the
            uniform average.
        objectives: for each one `name`, `task`, `metric`, `implementation`, `direction`, `dataset`, `split`, `held_out`,
            `rows_search`, `rows_held_out`, as strings and numbers, and whether it was `searched_on_test` data or
            `smoothed`; what is missing is left out.
        licenses: what each model that was read declares, by id (see `license.licenses_of`).
        consent: whether the user agreed to publish under licenses that forbid commercial use or derived works.
        model_name: the title; the last part of `repo_id` unless given.
        auto_class: the transformers class that loads the model, such as "AutoModelForCausalLM".
        added: how much held-out hypervolume paths through layers added to the front of the merges alone.
        picture: the file name of the front's picture in the repository; None leaves it out.
        maps_before: the positions of the path before which the model maps its stream, by code of its own.
        versions: of the packages that made the model, such as {"hf_merge": "0.1.0"}.
    """

    repo_id: str
    trial: Trial
    licenses: Mapping[str, Declared]
    consent: bool = False
    model_name: str = ""
    front: Front | None = None
    parents: tuple[Trial, ...] = ()
    others: tuple[Trial, ...] = ()
    objectives: Sequence[Mapping[str, Any]] = ()
    search: SearchFacts | None = None
    languages: Sequence[str] = ()
    pipeline_tag: str | None = None
    auto_class: str = "AutoModel"
    picture: str | None = "front.png"
    added: Gap | None = None
    maps_before: Sequence[int] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The title."""
        return self.model_name or self.repo_id.rstrip("/").rpartition("/")[2]

    @property
    def recipe(self) -> Recipe:
        """What was merged and how."""
        return self.trial.recipe

    @property
    def rivals(self) -> tuple[Trial, ...]:
        """Parents, then others."""
        return (*self.parents, *self.others)

    @property
    def directions(self) -> Mapping[str, str]:
        """Each objective's direction: the front's, or else as described, or else of whatever was measured."""
        if self.front is not None:
            return self.front.directions
        described = {str(o["name"]): str(o.get("direction", MAXIMIZE)) for o in self.objectives}
        return described or dict.fromkeys(self.trial.held_out, MAXIMIZE)

    def objective(self, name: str) -> Mapping[str, Any]:
        """What is known about one objective. Of a dataset that is a path, only the last part: the rest is this machine's."""
        known = next((o for o in self.objectives if o.get("name") == name), {})
        dataset = PurePath(str(known.get("dataset") or ""))
        return (
            {**known, "dataset": dataset.name}
            if dataset.is_absolute() or dataset.parts[:1] in ((".",), ("~",), ("..",))
            else known
        )
