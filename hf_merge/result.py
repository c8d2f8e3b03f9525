"""What `auto_merge()` gives back: the front, every trial behind it, and what can be done with them."""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.errors import HfMergeError, PublishError, RecipeError
from hf_merge.merging.live import LiveModel, load_tokenizer
from hf_merge.merging.plan import open_inputs, plan
from hf_merge.publishing.card import render
from hf_merge.publishing.facts import SearchFacts
from hf_merge.publishing.front_facts import alike, contributions, history, optimism
from hf_merge.publishing.plots import Figure, plot_front, png
from hf_merge.publishing.position import Gap, hypervolume_gain
from hf_merge.publishing.push import check_writable, push_collection
from hf_merge.recipes.yaml import from_dict, to_dict
from hf_merge.scores import Score, Scores, load_scores, save_scores
from hf_merge.scoring import scores_path
from hf_merge.search.trial import Front, Split, Trial
from hf_merge.single import card_facts, merge_to_hub
from hf_merge.version import __version__

RESULT = "result.json"
PICTURE = "front.png"
SPLITS: tuple[Split, Split] = ("search", "held_out")


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeResult:
    """The outcome of a search.

    `front`: the trials that no other dominates on search data, re-scored on held-out data. `trials`: all of them, failures with
    their error. `parents`: each model alone; `others`: the uniform average and the base; both re-scored as well.
    `objectives`: what was measured, as plain facts. `search`: how. `front.reference` is the hypervolume's reference point,
    fixed from the parents.
    """

    front: Front
    trials: tuple[Trial, ...]
    parents: tuple[Trial, ...]
    others: tuple[Trial, ...]
    objectives: tuple[Mapping[str, Any], ...]
    search: SearchFacts
    online: Callable[[Mapping[str, float], int], Trial] | None = field(default=None, repr=False)

    def choose(self, preference: Mapping[str, float] | Literal["knee"] = "knee", *, objective: str | None = None) -> Trial:
        """A point of the front: nearest to a `preference`, best in one `objective`, or the knee. Decided on search scores."""
        return self.front.choose(preference, objective=objective)

    def for_preference(self, preference: Mapping[str, float], *, paths: int = 0) -> Trial:
        """The point for a preference (weights by objective): the nearest of the front, or with `paths` the best path after so
        many more were scored for it, starting from the trained policy. Raises `RecipeError` where no paths were searched in
        this session."""
        if not paths:
            return self.choose(preference)
        if self.online is None:
            raise RecipeError("Only auto_merge(strategy='hierarchical') can go on searching paths, right after it ran.")
        return self.online(preference, paths)

    def architecture_gain(self) -> Gap | None:
        """How much held-out hypervolume paths through layers added to the front of the merges alone, with a paired interval.
        None if none were searched."""
        if not self.search.paths:
            return None
        merges = [t for t in self.trials if t.recipe.layers is None]
        alone = Front.of(merges, self.front.directions, self.front.reference)
        return hypervolume_gain(self.front, alone, self.front.directions, self.front.reference)

    def plot(self, split: Split = "held_out", *, chosen: Trial | None = None) -> Figure:
        """Picture of the front with parents, base and uniform average on one split."""
        return plot_front(self.front, self.parents, self.others, chosen=chosen, split=split)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a trial: recipe, scores on search and on held-out data (in columns of their own), seconds, error."""
        on_front, adds = {trial.number for trial in self.front}, contributions(self.front)
        rows = []
        for trial in self.trials:
            own = {
                "trial": trial.number,
                "label": trial.label,
                "on_front": trial.number in on_front,
                "recipe": str(trial.recipe),
            }
            for split in SPLITS:
                scores = trial.on(split)
                own |= {f"{split}.{name}": scores[name].value if name in scores else None for name in self.front.objectives}
            own["held_out.adds"] = adds.get(trial.number)
            rows.append(own | {"seconds": trial.seconds, "error": trial.error})
        return pandas.DataFrame(rows)

    def history(self) -> pandas.Series:
        """The front's hypervolume on search data after each trial, by its number."""
        values = history(self.trials, self.front.directions, self.front.reference)
        return pandas.Series(values, index=pandas.Index([t.number for t in self.trials], name="trial"), name="hypervolume")

    def optimism(self) -> pandas.DataFrame:
        """By objective: how much better the front looks on search data than on held-out data, on average, and between which
        bounds (95 %, of the held-out rows). Positive is flattering. Without objectives whose search rows are smoothed: those
        scores are no accuracies."""
        smoothed = {objective["name"] for objective in self.objectives if objective.get("smoothed")}
        rows = {name: (g.value, g.low, g.high) for name, g in optimism(self.front).items() if name not in smoothed}
        return pandas.DataFrame.from_dict(rows, orient="index", columns=["optimism", "low", "high"])

    def alike(self) -> list[tuple[int, int]]:
        """The numbers of the front's trials that held-out data do not tell apart in any objective, in pairs."""
        return [(a.number, b.number) for a, b in alike(self.front)]

    def importances(self) -> pandas.DataFrame:
        """How much each searched parameter mattered (rows) for each objective (columns), each column summing to 1 (PED-ANOVA,
        arXiv:2304.10255). Empty after a short search."""
        return pandas.DataFrame(self.search.importances).fillna(0.0)

    def build(
        self, trial: Trial | None = None, *, device: str | torch.device | None = None, token: str | bool | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The merged model of a trial (the knee unless given) in memory, and its tokenizer."""
        recipe = (trial or self.choose()).recipe
        opened = open_inputs(recipe, hub_api(token))
        live = LiveModel(recipe, opened, device=torch.device(device) if device else None)
        return live.model, load_tokenizer(opened[recipe.primary])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        trial: Trial | int | None = None,
        preference: Mapping[str, float] | Literal["knee"] = "knee",
        objective: str | None = None,
        private: bool | None = None,
        consent: bool = False,
        max_shard_size: int | str = "5GB",
        token: str | bool | None = None,
        progress: bool = True,
    ) -> str:
        """Publish a point of the front: weights streamed shard by shard, card, picture, recipe and front in one commit.

        The point is a `trial` (or its number), or chosen by `preference` or `objective`. Returns its address. Raises
        `PublishError` if the repository cannot be written, or if a parent's license needs `consent`.
        """
        api = hub_api(token)
        repo_id = check_writable(repo_id, api, private=private)
        chosen = self._trial(trial) if trial is not None else self.choose(preference, objective=objective)
        compiled = plan(chosen.recipe, open_inputs(chosen.recipe, api), max_shard_size=max_shard_size)
        facts = card_facts(
            compiled,
            chosen,
            repo_id,
            api,
            consent=consent,
            front=self.front,
            parents=self.parents,
            others=self.others,
            objectives=self.objectives,
            search=self.search,
            picture=PICTURE,
            added=self.architecture_gain(),
        )
        files = {
            "README.md": str(render(facts)).encode(),
            "front.json": json.dumps(self.to_dict(), indent=1).encode(),
            PICTURE: self._png(chosen),
        }
        message = f"{compiled.method.title} merge, a point of the Pareto front between {', '.join(self.front.objectives)}"
        return merge_to_hub(compiled, repo_id, files, api, private=private, message=message, progress=progress)

    def push_front_to_hub(self, prefix: str, *, title: str | None = None, private: bool | None = None, **more: Any) -> str:
        """Publish every merged point of the front as `{prefix}-{number}`, and a collection of them along the front.

        Parents that are on the front are repositories already and are left out. `more` goes to `push_to_hub`. Returns the
        collection's slug.
        """
        known = {trial.recipe.digest for trial in (*self.parents, *self.others)}
        entries = []
        for trial in self.front:
            if trial.recipe.digest not in known:
                repo_id = f"{prefix}-{trial.number}"
                self.push_to_hub(repo_id, trial=trial, private=private, **more)
                values = ", ".join(f"{name} {score.value:.3f}" for name, score in trial.held_out.items())
                entries.append((repo_id, f"held out: {values}; {trial.recipe}"))
        if not entries:
            raise PublishError("The front holds no merge: its points are the parents themselves, or their average.")
        about = f"The Pareto front between {', '.join(self.front.objectives)}, merged with hf_merge"
        namespace = prefix.partition("/")[0] if "/" in prefix else None
        name = title or f"{prefix.rpartition('/')[2]}: a Pareto front"
        return push_collection(
            name, entries, hub_api(more.get("token")), namespace=namespace, description=about, private=bool(private)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-example outcomes, as JSON."""
        return {
            "hf_merge": __version__,
            "directions": dict(self.front.directions),
            "reference": dict(self.front.reference),
            "hypervolume": {split: self.front.hypervolume(split) for split in SPLITS if all(t.on(split) for t in self.front)},
            "objectives": [dict(objective) for objective in self.objectives],
            "search": asdict(self.search),
            "front": [trial.number for trial in self.front],
            "parents": [_trial_to_dict(trial) for trial in self.parents],
            "others": [_trial_to_dict(trial) for trial in self.others],
            "trials": [_trial_to_dict(trial) for trial in self.trials],
        }

    def save(self, folder: Path | str) -> Path:
        """Write the result to a folder: result.json, the picture, and each score with its per-example outcomes."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        for trial in (*self.trials, *self.parents, *self.others):
            for split in SPLITS:
                path = scores_path(where, split, trial.recipe.digest)
                if trial.on(split) and not path.exists():
                    save_scores(path, trial.on(split))
        (where / RESULT).write_text(json.dumps(self.to_dict(), indent=1))
        if self.front:
            (where / PICTURE).write_bytes(self._png())
        return where

    @classmethod
    def load(cls, folder: Path | str) -> "MergeResult":
        """A result as `save` wrote it. Raises `HfMergeError` if there is none."""
        where = Path(folder)
        try:
            content = json.loads((where / RESULT).read_text())
        except (OSError, ValueError) as error:
            raise HfMergeError(f"{where} holds no result of a search ({RESULT}): {error}") from error
        trials = {entry["number"]: _trial_from_dict(entry, where) for entry in content["trials"]}
        front = Front(
            trials=tuple(trials[number] for number in content["front"]),
            directions=content["directions"],
            reference=content["reference"],
        )
        return cls(
            front=front,
            trials=tuple(trials.values()),
            parents=tuple(_trial_from_dict(entry, where) for entry in content["parents"]),
            others=tuple(_trial_from_dict(entry, where) for entry in content["others"]),
            objectives=tuple(content["objectives"]),
            search=SearchFacts(**content["search"]),
        )

    def _trial(self, given: Trial | int) -> Trial:
        if isinstance(given, Trial):
            return given
        for trial in (*self.front, *self.trials):
            if trial.number == given:
                return trial
        raise RecipeError(f"There is no trial {given}. The front's: {', '.join(str(t.number) for t in self.front)}.")

    def _png(self, chosen: Trial | None = None) -> bytes:
        return png(self.plot(chosen=chosen))

    def __repr__(self) -> str:
        volumes = ", ".join(
            f"{self.front.hypervolume(split):.4g} on {split} data" for split in SPLITS if all(t.on(split) for t in self.front)
        )
        corner = ", ".join(f"{name} {value:.3g}" for name, value in self.front.reference.items())
        return f"{self.front!r}\nHypervolume {volumes} above ({corner}); {self.search.evaluated} recipes evaluated."

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        rest = ["on_front", "held_out.adds", "error", "seconds"]
        shown = table[table.on_front].drop(columns=rest).to_html(index=False, float_format="%.4f")
        picture = base64.b64encode(self._png()).decode()
        return f'{shown}<img alt="Pareto front" style="max-width:100%" src="data:image/png;base64,{picture}">'


def _trial_to_dict(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "label": trial.label,
        "digest": trial.recipe.digest,
        "recipe": to_dict(trial.recipe),
        "scores": _scores_to_dict(trial.scores),
        "held_out": _scores_to_dict(trial.held_out),
        "seconds": trial.seconds,
        "error": trial.error,
        "violations": dict(trial.violations),
        "stopped": trial.stopped,
    }


def _scores_to_dict(scores: Scores) -> dict[str, Any]:
    return {
        name: {"value": s.value, "examples": s.examples, "seconds": s.seconds, "interval": s.interval}
        for name, s in scores.items()
    }


def _trial_from_dict(content: Mapping[str, Any], folder: Path) -> Trial:
    recipe = from_dict(content["recipe"])
    scores = {split: load_scores(scores_path(folder, split, recipe.digest)) for split in SPLITS}
    return Trial(
        number=content["number"],
        label=content["label"],
        recipe=recipe,
        error=content["error"],
        seconds=content["seconds"],
        violations=content.get("violations", {}),
        stopped=content.get("stopped", False),
        scores=scores["search"] or _plain(content["scores"]),
        held_out=scores["held_out"] or _plain(content["held_out"]),
    )


def _plain(content: Mapping[str, Any]) -> dict[str, Score]:
    """Scores without their outcomes, as a published front.json has them."""
    return {name: Score(value=s["value"], examples=s["examples"], seconds=s["seconds"]) for name, s in content.items()}
