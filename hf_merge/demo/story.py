"""The demo's inner half: specialists to the Hub, a search, the knee published with its card, and loaded back to be checked."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_merge.auto import auto_merge
from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.generator_objectives import objectives as generative_objectives
from hf_merge.demo.generators import GENERATORS
from hf_merge.demo.specialists import FamilyFolder, build_family
from hf_merge.errors import HfMergeError
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.plots import save_png
from hf_merge.publishing.position import hypervolume_gain
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.result import PICTURE, MergeResult
from hf_merge.single import merge

PUBLISHED = "bert-tiny-all-three"
SUMMARY = "summary.json"
MERGES, PATHS, SEARCH_ROWS = 24, 48, 64
PUBLISHED_PATH, PATHS_PICTURE = "llama-tiny-path", "paths.png"
_DATASET_CARD = """\
---
configs:
- config_name: default
  data_files:
  - {{split: search, path: search.parquet}}
  - {{split: held_out, path: held_out.parquet}}
---

Rows of the task {task}, none of which a specialist was trained on.
"""


def tell(folder: Path, *, trials: int, seed: int, cards: Path | None, progress: bool) -> None:
    """The whole story; prints what it does and leaves a summary in `folder`."""
    with chapter("Building the specialists: a base and three fine-tunes (cached after the first time)"):
        family = build_family(CLASSIFIERS, progress=progress)
    names = family.family
    with chapter(f"Publishing them to a Hub on this machine, {os.environ['HF_ENDPOINT']}"):
        publish(family, hub_api())
    models = [names.repo_id(task.model) for task in names.tasks]
    with chapter("Merging one written recipe, streamed from the Hub"):
        recipe = Recipe(
            method="ties",
            base=ModelRef(names.repo_id(names.base)),
            models=tuple(RecipeModel(ref=ModelRef(model), parameters={"weight": 1.0, "density": 0.5}) for model in models),
        )
        print(merge(recipe, folder / "ties", progress=progress).plan)
    objectives = [Objective(name=t.name, dataset=names.repo_id(f"{t.name}-rows"), labels=t.labels) for t in names.tasks]
    with chapter(
        f"Searching {trials} recipes for the front of {len(objectives)} objectives, then re-scoring it on held-out data"
    ):
        result = auto_merge(
            names.repo_id(names.base),
            models,
            objectives,
            trials=trials,
            seed=seed,
            folder=folder / "run",
            progress=progress,
        )
    chosen, repo_id = result.choose(), names.repo_id(PUBLISHED)
    with chapter(f"Publishing the knee, {chosen.name}, as {repo_id}"):
        address = result.push_to_hub(repo_id, trial=chosen, progress=progress)
    with chapter("Loading it back with plain transformers and measuring it again"):
        checked = reproduce(repo_id, objectives, seed, AutoModelForSequenceClassification)
        print(table(["objective", "on the card", "measured again"], [[k, *map(repr, v)] for k, v in checked.items()]))
    card = Path(hf_hub_download(repo_id, "README.md"))
    picture = Path(hf_hub_download(repo_id, PICTURE))
    if cards is not None:
        cards.mkdir(parents=True, exist_ok=True)
        # The picture stands beside the card under a name of its own.
        text = card.read_text(encoding="utf-8").replace(PICTURE, f"{PUBLISHED}.png")
        (cards / f"{PUBLISHED}.md").write_text(text, encoding="utf-8")
        shutil.copyfile(picture, cards / f"{PUBLISHED}.png")
    shutil.copyfile(card, folder / "card.md")
    shutil.copyfile(picture, folder / PICTURE)
    paths = tell_of_paths(folder, seed=seed, progress=progress)
    checked |= {f"{name} (path)": pair for name, pair in paths.items()}
    volumes = compare(result)
    print(f"\n{result}\n")
    print(table(["held-out hypervolume of the front, more than that of", "gain", "95 % interval"], volumes))
    print(f"\nThe card: {folder / 'card.md'}\nThe picture: {folder / PICTURE}\nThe run: {folder / 'run'}")
    summary = {"address": address, "card": str(folder / "card.md"), "picture": str(folder / PICTURE), "scores": checked}
    (folder / SUMMARY).write_text(json.dumps(summary | {"front": len(result.front), "gains": volumes}, indent=1))
    if any(before != again for before, again in checked.values()):
        raise HfMergeError("The published model does not score what its card says.")


def tell_of_paths(folder: Path, *, seed: int, progress: bool) -> dict[str, tuple[float, float]]:
    """The chapters on layers of generative models; leaves a picture in `folder`. By objective, what the published path scores
    on its card and when it is loaded back."""
    with chapter("Building a small language model and three fine-tunes: translation, math, code (cached after the first time)"):
        family = build_family(GENERATORS, progress=progress)
    names = family.family
    with chapter("Publishing them to the same Hub"):
        publish(family, hub_api())
    objectives = generative_objectives(family, rows=SEARCH_ROWS)
    with chapter(f"Searching {MERGES} merges, then {PATHS} paths through the layers of the models and of the best merge (HM3)"):
        result = auto_merge(
            names.repo_id(names.base),
            [names.repo_id(task.model) for task in names.tasks],
            objectives,
            trials=MERGES,
            strategy="hierarchical",
            paths=PATHS,
            preferences=8,
            seed=seed,
            folder=folder / "paths",
            progress=progress,
        )
        save_png(result.plot(), folder / PATHS_PICTURE)
        gain = result.architecture_gain()
        added = "" if gain is None or gain.interval is None else " [{:+.4f}, {:+.4f}]".format(*gain.interval)
        print(f"{result}\nThe paths added {gain.value if gain else 0:+.4f}{added} to the merges' held-out hypervolume.")
        print(f"The picture: {folder / PATHS_PICTURE}")
    chosen = next((trial for trial in result.front if trial.recipe.layers is not None), result.choose())
    repo_id = names.repo_id(PUBLISHED_PATH)
    with chapter(f"Publishing {chosen.name} as {repo_id}, loading it back with plain transformers and measuring it again"):
        result.push_to_hub(repo_id, trial=chosen, progress=progress)
        checked = reproduce(repo_id, objectives, seed, AutoModelForCausalLM)
        print(table(["objective", "on the card", "measured again"], [[k, *map(repr, v)] for k, v in checked.items()]))
    shutil.copyfile(hf_hub_download(repo_id, "README.md"), folder / "path_card.md")
    return checked


def publish(family: FamilyFolder, api: HfApi) -> None:
    """Every model, and each task's search and held-out rows, as repositories on the Hub."""
    names = family.family
    for folder in (family.base, *family.models.values()):
        repo_id = names.repo_id(folder.name)
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add the model")
    for task, splits in family.data.items():
        repo_id = names.repo_id(f"{task}-rows")
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_file(
            repo_id=repo_id,
            repo_type="dataset",
            path_in_repo="README.md",
            path_or_fileobj=_DATASET_CARD.format(task=task).encode(),
        )
        for split in ("search", "held_out"):
            api.upload_file(
                repo_id=repo_id, repo_type="dataset", path_in_repo=f"{split}.parquet", path_or_fileobj=str(splits[split])
            )


def reproduce(repo_id: str, objectives: list[Objective], seed: int, cls: Any) -> dict[str, tuple[float, float]]:
    """By objective: the held-out score on the card of a repository, and what its model scores when transformers' `cls` loads
    it back."""
    model = cls.from_pretrained(repo_id)
    evaluator = Evaluator(
        objectives, tokenizer=AutoTokenizer.from_pretrained(repo_id), config=model.config, seed=seed, progress=False
    )
    scores = evaluator.measure(model, "held_out")
    results = ModelCard.load(repo_id).data.eval_results or []
    on_card = {str(entry.metric_name).partition(":")[0]: float(entry.metric_value) for entry in results}
    # A card gives six digits.
    return {name: (on_card[name], round(score.value, 6)) for name, score in scores.items()}


def compare(result: MergeResult) -> list[list[str]]:
    """How much more held-out hypervolume the front has than each parent, the uniform average and the base."""
    rows = []
    for rival in (*result.parents, *result.others):
        gain = hypervolume_gain(result.front, [rival], result.front.directions, result.front.reference)
        low, high = gain.interval or (float("nan"), float("nan"))
        rows.append([rival.name, f"{gain.value:+.4f}", f"{low:+.4f} … {high:+.4f}"])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text under a header."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])


@contextmanager
def chapter(title: str) -> Iterator[None]:
    """A heading, and how long what stands under it took."""
    print(f"\n■ {title}", flush=True)
    started = time.monotonic()
    yield
    print(f"  {time.monotonic() - started:.1f} s", flush=True)


def main() -> int:
    """The command line that `walk` calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cards", type=Path)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    try:
        tell(options.folder, trials=options.trials, seed=options.seed, cards=options.cards, progress=not options.quiet)
    except HfMergeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
