"""Merges first, then paths through layers, on the real specialists: what is scored, what is kept, what is said of it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from tiny_models import Maker
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_merge.auto import auto_merge
from hf_merge.demo.hub.server import LocalHub
from hf_merge.demo.specialists import FamilyFolder
from hf_merge.errors import MergeError, RecipeError
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.recipes.path import path_of
from hf_merge.result import MergeResult
from hf_merge.search.trial import Front
from hf_merge.single import merge

Run = Callable[..., MergeResult]
TRIALS, PATHS = 8, 10


def rows_of(family: FamilyFolder) -> list[Objective]:
    """96 rows of each task and split."""

    def rows(task: str) -> DatasetDict:
        return DatasetDict({split: family.dataset(task, split).select(range(96)) for split in ("search", "held_out")})

    return [Objective(name=t.name, dataset=rows(t.name), labels=t.labels) for t in family.family.tasks]


def words(low: int, high: int) -> DatasetDict:
    """Rows of random words."""
    rng = np.random.default_rng(low)
    rows = [" ".join(f"w{i}" for i in rng.integers(low, high, 12)) for _ in range(24)]
    return DatasetDict({s: Dataset.from_dict({"text": part}) for s, part in (("search", rows[:12]), ("held_out", rows[12:]))})


@pytest.fixture
def objectives(specialists: FamilyFolder) -> list[Objective]:
    return rows_of(specialists)


@pytest.fixture
def run(specialists: FamilyFolder, objectives: list[Objective], tmp_path: Path) -> Run:
    def search(**settings: object) -> MergeResult:
        usual = {"trials": TRIALS, "paths": PATHS, "preferences": 4, "seed": 3, "folder": tmp_path / "run", "progress": False}
        usual |= {"strategy": "hierarchical"} | settings
        models = list(specialists.models.values())
        return auto_merge(specialists.base, models, objectives, **usual)  # type: ignore[arg-type]

    return search


def paths_of(result: MergeResult) -> list[tuple[str, dict[str, float]]]:
    return [
        (t.recipe.digest, {name: s.value for name, s in t.scores.items()}) for t in result.trials if t.recipe.layers is not None
    ]


def test_paths_are_trials_like_others_and_none_is_scored_twice(run: Run) -> None:
    result = run()
    paths = paths_of(result)
    assert 0 < result.search.paths == len(paths) <= PATHS
    assert result.search.evaluated == TRIALS + len(paths)
    assert len({digest for digest, _ in paths}) == len(paths)
    assert not any(trial.error for trial in result.trials)
    assert all(trial.held_out for trial in result.front)
    gain = result.architecture_gain()
    assert gain is not None
    assert gain.interval is not None


def test_a_search_that_has_ended_measures_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert paths_of(run()) == paths_of(first)


def test_more_paths_begin_with_the_same_ones(run: Run, tmp_path: Path) -> None:
    few = paths_of(run(paths=6, folder=tmp_path / "few"))
    assert paths_of(run())[: len(few)] == few


def test_a_preference_is_answered_from_the_front_or_by_more_paths(run: Run) -> None:
    result = run()
    first, *_ = result.front.objectives
    assert result.for_preference({first: 1.0}) is result.choose({first: 1.0})
    found = result.for_preference({first: 1.0}, paths=3)
    assert found.scores
    assert found.held_out
    with pytest.raises(RecipeError, match="nonsense"):
        result.for_preference({"nonsense": 1.0}, paths=3)
    with pytest.raises(RecipeError, match="right after it ran"):
        replace(result, online=None).for_preference({first: 1.0}, paths=3)


def test_paths_take_layers_of_several_merges_and_are_what_their_recipes_say(
    run: Run, objectives: list[Objective], tmp_path: Path
) -> None:
    result = run(merges=3, paths=25, trials=12)
    made = result.online.__self__  # type: ignore[union-attr]
    names = list(made.score.model.recipes)
    assert names == ["merged", "merged 2", "merged 3"]
    whole = [t for t in result.trials if t.recipe.layers is None and len(t.recipe.models) > 1]
    knee = Front.of(whole, result.front.directions, result.front.reference).choose()
    assert made.known[made.pool.identity("merged")].recipe == knee.recipe
    scored = {t.recipe.digest: t for t in result.trials}
    taken = {t.recipe.digest: made.score.path_of(t.recipe) for t in result.trials if t.recipe.layers is not None}
    used = {step.model for path in taken.values() for step in path}
    assert used & set(names[1:])
    assert all(len({step.model for step in path} & set(names)) <= 1 for path in taken.values())
    digest = next(digest for digest, path in taken.items() if {step.model for step in path} & set(names[1:]))
    with pytest.raises(RecipeError, match="another merge"):
        made.score(replace(scored[digest].recipe, parameters={"weight": 0.123}))
    merge(scored[digest].recipe, tmp_path / "out", progress=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    again = Evaluator(objectives, tokenizer=tokenizer, config=model.config, seed=3, progress=False).measure(model)
    assert {k: s.value for k, s in again.items()} == {k: s.value for k, s in scored[digest].scores.items()}


def test_a_published_path_loads_with_plain_transformers_and_scores_what_its_card_says(
    run: Run, objectives: list[Objective], hub: LocalHub, tmp_path: Path
) -> None:
    result = run()
    chosen = next(t for t in result.trials if t.recipe.layers is not None and len(t.recipe.layers.slices) > 1)
    scored = replace(chosen, held_out=result.online.__self__.score(chosen.recipe, "held_out"))  # type: ignore[union-attr]
    result.push_to_hub("demo/path", trial=scored, progress=False)
    model = AutoModelForSequenceClassification.from_pretrained("demo/path")
    evaluator = Evaluator(
        objectives, tokenizer=AutoTokenizer.from_pretrained("demo/path"), config=model.config, seed=3, progress=False
    )
    again = evaluator.measure(model.eval(), "held_out")
    assert {k: s.value for k, s in again.items()} == {k: s.value for k, s in scored.held_out.items()}
    card = str(ModelCard.load("demo/path"))
    assert "position" in card
    assert "The paths added" in card
    assert "Searched in two steps" in card


def test_a_published_path_of_another_depth_loads_with_plain_transformers_and_scores_what_its_card_says(
    make: Maker, hub: LocalHub, tmp_path: Path
) -> None:
    tasks = [Objective(name=f"t{i}", task="language-modeling", dataset=words(46 * i, 46 * i + 46)) for i in range(2)]
    base, *models = make("llama", num_hidden_layers=4)
    result = auto_merge(
        base, models, tasks, trials=6, strategy="hierarchical", paths=12, preferences=3, folder=tmp_path / "run", progress=False
    )
    chosen = next(t for t in result.trials if t.recipe.layers is not None and len(path_of(t.recipe.layers)) != 4)
    assert chosen.recipe.layers is not None
    scored = replace(chosen, held_out=result.online.__self__.score(chosen.recipe, "held_out"))  # type: ignore[union-attr]
    result.push_to_hub("demo/deep", trial=scored, progress=False)
    model = AutoModelForCausalLM.from_pretrained("demo/deep")
    assert model.config.num_hidden_layers == len(path_of(chosen.recipe.layers)) == len(model.model.layers)
    tokenizer = AutoTokenizer.from_pretrained("demo/deep")
    again = Evaluator(tasks, tokenizer=tokenizer, config=model.config, progress=False).measure(model.eval(), "held_out")
    assert {k: s.value for k, s in again.items()} == {k: s.value for k, s in scored.held_out.items()}
    card = ModelCard.load("demo/deep")
    told = {result.metric_value for result in card.data.eval_results}
    assert {round(score.value, 6) for score in scored.held_out.values()} <= told
    assert "is a path through layers" in str(card)
    assert "position" in str(card)


def test_models_of_different_depths_have_paths_through_both(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    shallow = make("llama", count=1, num_hidden_layers=2, parent="shallow")[0]
    deep = make("llama", count=2, num_hidden_layers=4, parent="deep")[1]
    tasks = [Objective(name=f"t{i}", task="language-modeling", dataset=words(46 * i, 46 * i + 46)) for i in range(2)]
    settings = {"trials": 6, "paths": 10, "preferences": 3, "folder": tmp_path / "run", "progress": False}
    result = auto_merge(None, [shallow, deep], tasks, strategy="hierarchical", **settings)  # type: ignore[arg-type]
    assert [len(trial.recipe.models) for trial in result.trials if trial.recipe.layers is None] == [1, 1]
    paths = [path_of(trial.recipe.layers) for trial in result.trials if trial.recipe.layers is not None]
    assert any({step.model for step in path} == {shallow.name, deep.name} for path in paths)
    chosen = next(t for t in result.trials if t.recipe.layers is not None)
    scored = replace(chosen, held_out=result.online.__self__.score(chosen.recipe, "held_out"))  # type: ignore[union-attr]
    result.push_to_hub("demo/both", trial=scored, progress=False)
    model = AutoModelForCausalLM.from_pretrained("demo/both")
    tokenizer = AutoTokenizer.from_pretrained("demo/both")
    again = Evaluator(tasks, tokenizer=tokenizer, config=model.config, progress=False).measure(model.eval(), "held_out")
    assert {k: s.value for k, s in again.items()} == {k: s.value for k, s in scored.held_out.items()}


def test_models_of_different_widths_are_refused_from_their_configs_alone(make: Maker, tmp_path: Path) -> None:
    narrow = make("llama", count=1, num_hidden_layers=2, parent="narrow")[0]
    wide = make("llama", count=1, num_hidden_layers=4, hidden_size=64, parent="wide")[0]
    for file in (*narrow.glob("*.safetensors"), *wide.glob("*.safetensors")):
        file.write_bytes(b"not to be read")
    tasks = [Objective(name="t", task="language-modeling", dataset=words(0, 46))]
    with pytest.raises(MergeError, match="one width"):
        auto_merge(None, [narrow, wide], tasks, strategy="hierarchical", folder=tmp_path / "run", progress=False)


def test_a_race_stops_paths_too_and_none_of_those_is_on_the_front(run: Run) -> None:
    result = run(racing=True, paths=20)
    paths = [trial for trial in result.trials if trial.recipe.layers is not None]
    assert any(trial.stopped for trial in paths)
    assert not any(trial.stopped for trial in result.front)


KILLED = """
import json, sys
from pathlib import Path
from hf_merge.auto import auto_merge
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.specialists import build_family
from test_hierarchical import PATHS, TRIALS, rows_of
family = build_family(CLASSIFIERS, progress=False)
auto_merge(family.base, list(family.models.values()), rows_of(family), trials=TRIALS, strategy="hierarchical", paths=PATHS,
           preferences=4, seed=3, folder=Path(sys.argv[1]), progress=False)
"""


def test_a_search_killed_among_the_paths_goes_on_with_the_next_one(run: Run, specialists: FamilyFolder, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    scores, environment = folder / "scores" / "search", {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)
    until = time.monotonic() + 200
    while len(list(scores.glob("*.npz"))) < TRIALS + 3:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in scores.glob("*.npz")}
    resumed, whole = run(folder=folder), run()
    after = {path.name: path.stat().st_mtime_ns for path in scores.glob("*.npz")}
    assert {name: after[name] for name in before} == before
    assert paths_of(resumed) == paths_of(whole)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "hierachical"}, "hierarchical"),
        ({"paths": 0}, "a path and a merge"),
        ({"preferences": 0}, "a preference"),
        ({"merges": 0}, "a merge"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_read(run: Run, settings: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        run(**settings)
