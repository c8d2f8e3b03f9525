"""Tasks of lm-evaluation-harness from local files: the same numbers as the harness's own run, our rows and splits."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_models import Maker
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_merge.auto import auto_merge
from hf_merge.errors import EvaluationError
from hf_merge.evaluation import lm_eval
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.reader import Reader
from hf_merge.scores import Score

evaluator_module = pytest.importorskip("lm_eval.evaluator")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

MakeModel = Callable[..., PreTrainedModel]
MakeTask = Callable[..., Path]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} w1",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w7"], "do_sample": False, "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "digit", "filter": [{"function": "regex", "regex_pattern": r"w(\d)"}, {"function": "take_first"}]},
        {"name": "all", "filter": [{"function": "take_first"}]},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
F1 = CHOICE | {"metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}], "doc_to_choice": ["w1", "w2"]}


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """`make_task(CHOICE, rows=…, **config)`: a task's YAML over local files with the splits train, validation and test."""

    def build(task: dict[str, Any], rows: int = 24, choices: int = 3, **config: object) -> Path:
        rng = np.random.default_rng(0)
        files = {}
        for split in ("train", "validation", "test"):
            files[split] = str(tmp_path / f"{split}.jsonl")
            lines = [
                {
                    "question": " ".join(f"w{i}" for i in rng.integers(0, 61, 8)),
                    "choices": [f"w{i}" for i in rng.choice(61, choices, replace=False)],
                    "answer": int(rng.integers(0, choices)),
                }
                for _ in range(rows)
            ]
            Path(files[split]).write_text("\n".join(map(json.dumps, lines)))
        data = {"task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        path = tmp_path / "local.yaml"
        path.write_text(yaml.safe_dump({**data, **task, **config}))
        return path

    return build


def measured(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Score:
    objective = Objective.from_lm_eval(path, name="local", **settings)
    return Evaluator([objective], config=model.config, tokenizer=tokenizer).measure(model, replicates=20)["local"]


@pytest.mark.parametrize(
    ("task", "metric", "chosen"),
    [
        (CHOICE, "acc", "none"),
        (CHOICE, "acc_norm", "none"),
        (CHOICE | {"fewshot_split": "train", "num_fewshot": 2}, "acc", "none"),
        (CHOICE | {"fewshot_split": "test", "num_fewshot": 2}, "acc", "none"),
        (GENERATION, "exact_match", "digit"),
        (GENERATION, "exact_match", "all"),
        (ROLLING, "word_perplexity", "none"),
        (F1, "f1", "none"),
    ],
    ids=["choice", "normalized", "few shots", "few shots of the same split", "filtered", "unfiltered", "perplexity", "f1"],
)
def test_the_score_is_the_harness_s_own(
    make_task: MakeTask,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    task: dict[str, Any],
    metric: str,
    chosen: str,
) -> None:
    model, path = make_model("llama"), make_task(task, choices=2 if metric == "f1" else 3)
    own = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    manager = lm_eval._manager(False)
    wanted = evaluator_module.simple_evaluate(own, tasks=[str(path)], task_manager=manager, bootstrap_iters=0)
    score = measured(path, model, tokenizer, metric=metric, filter=chosen, split="test", held_out="validation")
    assert score.value == pytest.approx(wanted["results"]["local"][f"{metric},{chosen}"], rel=1e-5)
    rows = [row for row in wanted["samples"]["local"] if row["filter"] == chosen]
    assert score.examples == len(rows) == 24
    assert score.outcomes is not None
    if isinstance(rows[0][metric], float | int):
        np.testing.assert_allclose(score.outcomes, [row[metric] for row in rows])
    assert score.replicates is not None


def test_an_outcome_of_f1_says_whether_the_class_is_right(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make_task(F1, choices=2)
    model = make_model("llama")
    right = measured(path, model, tokenizer, metric="f1", split="test", held_out="validation").outcomes
    path = make_task({**F1, "metric_list": CHOICE["metric_list"]}, choices=2)
    accuracy = measured(path, model, tokenizer, metric="acc", split="test", held_out="validation").outcomes
    np.testing.assert_array_equal(right, accuracy)


def test_an_outcome_of_perplexity_is_that_of_the_row_alone(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    score = measured(make_task(ROLLING), make_model("llama"), tokenizer, direction="minimize")
    assert score.outcomes is not None
    assert score.value == pytest.approx(np.exp(np.log(score.outcomes.astype(np.float64)).mean()), rel=1e-5)  # rows of 8 words


def test_rows_are_dealt_out_by_their_question(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make_task(CHOICE)
    model = make_model("llama")
    evaluator = Evaluator([Objective.from_lm_eval(path)], config=model.config, tokenizer=tokenizer)
    described = evaluator.describe()[0]
    assert (described["split"], described["held_out"]) == ("50% of test", "the other 50% of test")
    assert described["rows_search"] + described["rows_held_out"] == 24
    assert described["metric"] == "acc"


def test_no_prompt_of_the_search_holds_a_held_out_question(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make_task(CHOICE, fewshot_split="test", num_fewshot=4)
    harness = lm_eval.Harness(Objective.from_lm_eval(path))
    hidden = {text for (text,) in zip(*harness.rows["held_out"].inputs, strict=True)}
    runner = harness.part("search", Reader(config=make_model("llama").config, tokenizer=tokenizer)).runner
    prompts = [request.args[0] for row in runner._requests for request in row]  # type: ignore[attr-defined]
    assert len(hidden) > 5
    assert {prompt.count("\n\n") for prompt in prompts} == {4}  # behind each example
    assert not [question for question in hidden for prompt in prompts if question in prompt]


def test_some_rows_run_as_they_do_among_all(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    harness = lm_eval.Harness(Objective.from_lm_eval(make_task(GENERATION)))
    model = make_model("llama")
    runner = harness.part("search", Reader(config=model.config, tokenizer=tokenizer)).runner
    every = runner(model)
    assert runner(model, np.array([5, 2])) == [every[5], every[2]]


def test_the_model_is_left_as_it_was(make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.generation_config.to_dict()
    padding = tokenizer.pad_token
    measured(make_task(GENERATION), model, tokenizer)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == settings
    assert tokenizer.pad_token == padding


def test_the_harness_leaves_its_level_of_logging(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    before = logging.getLogger("lm_eval").level
    measured(make_task(CHOICE), make_model("llama"), tokenizer)
    assert logging.getLogger("lm_eval").level == before
    assert not [record for record in caplog.records if record.name.startswith("lm_eval") and "already-init" in record.message]


def test_the_fingerprint_hangs_on_rows_and_not_on_where_they_are(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = make_model("llama").config

    def fingerprint(path: Path, **settings: Any) -> str:
        objective = Objective.from_lm_eval(path, name="local", **settings)
        return Evaluator([objective], config=config, tokenizer=tokenizer).fingerprint

    path = make_task(CHOICE)
    first = fingerprint(path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in tmp_path.glob("*.jsonl"):
        (moved / file.name).write_text(file.read_text())
    (moved / "other.yaml").write_text(path.read_text().replace(str(tmp_path), str(moved)))
    assert fingerprint(moved / "other.yaml") == first
    assert fingerprint(path, limit=5) != first
    assert fingerprint(path, metric="acc_norm") != first
    lines = (moved / "test.jsonl").read_text().replace('"answer": 0', '"answer": 1')
    (moved / "test.jsonl").write_text(lines)
    assert fingerprint(moved / "other.yaml") != first


def test_a_model_that_gives_nan_is_refused(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="NaN"):
        measured(make_task(CHOICE), model, tokenizer)


def test_what_the_harness_fails_of_is_said(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = make_task(GENERATION, generation_kwargs={"until": ["w7"], "max_gen_toks": 1000})
    with pytest.raises(EvaluationError, match="The harness failed: AssertionError: Invalid configuration"):
        measured(path, make_model("llama"), tokenizer)


def test_batches_shrink_when_memory_runs_out(
    make_task: MakeTask, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, model = make_task(CHOICE), make_model("llama")
    wanted = measured(path, model, tokenizer).outcomes
    tried: list[int] = []

    def short_of_memory(module: Any, args: tuple[Any, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")

    model.register_forward_pre_hook(short_of_memory)
    np.testing.assert_array_equal(measured(path, model, tokenizer).outcomes, wanted)
    assert max(tried) > 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "acc_mean"}, "Unknown metric of the task 'acc_mean'. Did you mean"),
        ({"task_arguments": {"filter": "strict"}}, "Unknown filter of the task 'strict'"),
        ({"direction": "minimize"}, "The harness says to maximize acc"),
        ({"split": "tset"}, "Unknown split of local 'tset'. Did you mean 'test'"),
        ({"held_out": "nothing"}, "Unknown split of local 'nothing'"),
        ({"task_arguments": {"shots": 1}}, "Unknown task argument of lm-eval 'shots'"),
    ],
)
def test_what_the_task_does_not_have_is_refused(
    make_task: MakeTask,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
    message: str,
) -> None:
    path = make_task(CHOICE)
    objective = Objective(**{"name": "local", "task": "lm-eval", "dataset": path, **settings})
    with pytest.raises(EvaluationError, match=message):
        Evaluator([objective], config=make_model("llama").config, tokenizer=tokenizer)


def test_a_task_that_runs_code_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(EvaluationError, match="without a sandbox: use the task code-generation"):
        lm_eval.Harness(Objective.from_lm_eval(make_task(CHOICE, unsafe_code=True)))


def test_a_missing_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"task file '.*no\.yaml' does not exist"):
        lm_eval.Harness(Objective.from_lm_eval(tmp_path / "no.yaml"))


def test_a_broken_task_file_says_what_broke_it(make_task: MakeTask) -> None:
    path = make_task(CHOICE, output_type="nonsense")
    with pytest.raises(EvaluationError, match=r"could not be opened: ValueError: .*nonsense"):
        lm_eval.Harness(Objective.from_lm_eval(path))


def test_without_the_harness_the_extra_is_named(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "_FOUND", False)
    with pytest.raises(EvaluationError, match=r"pip install 'hf_merge\[lm-eval\]'"):
        lm_eval.Harness(Objective.from_lm_eval(make_task(CHOICE)))


@pytest.mark.slow  # the harness reads its thousands of task files
@pytest.mark.parametrize(("name", "message"), [("gsm8kk", "Did you mean 'gsm8k'"), ("mmlu", "'mmlu' is a group")])
def test_an_unknown_task_of_the_harness_is_refused(name: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        lm_eval.Harness(Objective.from_lm_eval(name))


def test_a_task_is_an_objective_of_auto_merge(make_task: MakeTask, make: Maker, tmp_path: Path) -> None:
    base, *models = make("llama", 3)
    objectives = [
        Objective.from_lm_eval(make_task(CHOICE), name="choice"),
        Objective.from_lm_eval(make_task(CHOICE), name="normalized", metric="acc_norm"),
    ]
    result = auto_merge(base, models, objectives, trials=5, seed=0, folder=tmp_path / "run", progress=False)
    assert result.search.evaluated == 5
    assert result.search.failed == 0
    for trial in result.front:
        assert trial.scores["choice"].outcomes is not None
        assert trial.held_out["choice"].interval is not None
