"""Measuring in rounds: growing, nested, stratified parts of the rows that end in what `measure` gives."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.rounds import SHARES, race_order

KINDS = [
    pytest.param("bert", {}, id="accuracy"),
    pytest.param("bert", {"metric": "f1"}, id="f1"),
    pytest.param("llama", {"task": "language-modeling"}, id="perplexity"),
    pytest.param("llama", {"task": "text-generation", "metric": "exact_match", "max_new_tokens": 3}, id="exact match"),
]


@pytest.fixture
def build(make_model, make_data, tokenizer):
    def made(architecture, seed=0, rows=96, **fields):
        model = make_model(architecture)
        objective = Objective(name="o", dataset=make_data(rows, shortest=2), **fields)
        return model, Evaluator([objective], tokenizer=tokenizer, config=model.config, seed=seed, progress=False)

    return made


@pytest.fixture
def rows_run(monkeypatch):
    """How many rows the model sees in each call."""
    seen = []

    def count(model):
        forward = model.forward

        def counting(*args, **kwargs):
            seen.append(len(kwargs["input_ids"]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counting)
        return seen

    return count


@pytest.mark.parametrize(("architecture", "fields"), KINDS)
def test_the_last_round_is_what_measure_gives(build, architecture, fields):
    model, evaluator = build(architecture, **fields)
    *_, last = evaluator.rounds(model)
    whole = evaluator.measure(model)
    assert last["o"].value == pytest.approx(whole["o"].value, rel=1e-6)
    assert last["o"].outcomes.tolist() == pytest.approx(whole["o"].outcomes.tolist(), rel=1e-5)
    assert last["o"].rows is None
    assert last["o"].examples == whole["o"].examples == 96


def test_right_and_wrong_of_the_last_round_equal_those_of_measure_exactly(build):
    model, evaluator = build("bert")
    *_, last = evaluator.rounds(model)
    whole = evaluator.measure(model)
    assert last["o"].value == whole["o"].value
    assert last["o"].outcomes.tolist() == whole["o"].outcomes.tolist()


@pytest.mark.parametrize(("architecture", "fields"), KINDS)
def test_a_rounds_outcomes_are_those_of_its_rows(build, architecture, fields):
    model, evaluator = build(architecture, **fields)
    whole = evaluator.measure(model)["o"].outcomes
    first, *_ = evaluator.rounds(model)
    assert len(first["o"].rows) == 6
    assert first["o"].outcomes.tolist() == pytest.approx(whole[first["o"].rows].tolist(), rel=1e-5)


def test_a_rounds_margins_are_those_of_its_rows(build):
    model, evaluator = build("bert")
    whole = evaluator.measure(model)["o"].margins
    first, *_, last = evaluator.rounds(model)
    assert first["o"].margins.tolist() == pytest.approx(whole[first["o"].rows].tolist(), rel=1e-4, abs=1e-5)
    assert last["o"].margins.tolist() == pytest.approx(whole.tolist(), rel=1e-4, abs=1e-5)


def test_every_round_holds_the_rows_of_the_one_before_it(build):
    model, evaluator = build("bert")
    rows = [found["o"].rows for found in evaluator.rounds(model)]
    assert [len(r) for r in rows[:-1]] == [round(share * 96) for share in SHARES]
    assert all(np.array_equal(after[: len(before)], before) for before, after in pairwise(rows[:-1]))


def test_a_round_runs_only_its_new_rows(build, rows_run):
    model, evaluator = build("bert")
    seen = rows_run(model)
    counts = [sum(seen) for _ in evaluator.rounds(model)]
    assert counts == [6, 12, 24, 48, 96]


def test_a_race_that_ends_early_costs_only_its_rows(build, rows_run):
    model, evaluator = build("bert")
    seen = rows_run(model)
    next(evaluator.rounds(model))
    assert sum(seen) == 6


def test_every_model_meets_the_rows_in_the_same_order(build, make_model):
    model, evaluator = build("bert")
    first, second = (next(evaluator.rounds(m))["o"].rows for m in (model, make_model("bert", seed=1)))
    assert first.tolist() == second.tolist()


def test_rows_of_the_highest_priority_come_first_after_a_share_of_all(build):
    model, evaluator = build("bert")
    plain, *_ = evaluator.rounds(model)
    priority = np.arange(96.0) // 10
    first, second, *_, last = evaluator.rounds(model, priorities={"o": priority})
    assert first["o"].rows.tolist() == plain["o"].rows.tolist()
    drawn, added = np.split(second["o"].rows, [6])
    assert drawn.tolist() == plain["o"].rows.tolist()
    assert sorted(priority[added]) == sorted(np.delete(priority, drawn))[-6:]
    assert last["o"].outcomes.tolist() == evaluator.measure(model)["o"].outcomes.tolist()


def test_equal_priorities_leave_the_order(build):
    model, evaluator = build("bert")
    plain, same = (
        [found["o"].rows for found in evaluator.rounds(model, priorities=priorities)] for priorities in ({}, {"o": np.ones(96)})
    )
    assert all(np.array_equal(a, b) for a, b in zip(plain[:-1], same[:-1], strict=True))


def test_another_seed_is_another_order(build):
    first, second = (next(evaluator.rounds(model))["o"].rows for model, evaluator in (build("bert"), build("bert", seed=1)))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 1 / 2])
def test_every_prefix_has_each_class_in_its_share(share):
    classes = np.array([0] * 500 + [1] * 200 + [2] * 100)
    prefix = classes[race_order(classes, 0)[: round(share * 800)]]
    assert np.abs(np.bincount(prefix, minlength=3) - share * np.array([500, 200, 100])).max() <= 1


@pytest.mark.parametrize("references", [["a"] * 50, np.linspace(0, 1, 50), np.zeros(50, dtype=np.int64)])
def test_an_order_holds_every_row_once(references):
    assert sorted(race_order(references, 3)) == list(range(50))


def test_a_metric_undefined_on_few_rows_is_missing_until_it_is_defined(build):
    def picky(predictions, references):
        return 0.5 if len(predictions) > 20 else float("nan")

    model, evaluator = build("bert", metric=picky)
    assert ["o" in scores for scores in evaluator.rounds(model)] == [False, False, True, True, True]


def test_an_objective_without_data_is_whole_in_every_round(make_model, make_data, tokenizer):
    model = make_model("bert")
    objectives = [Objective(name="o", dataset=make_data()), Objective(name="size", task="none", metric="size")]
    evaluator = Evaluator(objectives, tokenizer=tokenizer, config=model.config, progress=False)
    first = next(evaluator.rounds(model))
    assert first["size"].rows is None
    assert first["size"].value == evaluator.measure(model)["size"].value


def test_rows_that_cannot_be_run_apart_are_all_in_the_first_round(build, monkeypatch):
    model, evaluator = build("bert")
    monkeypatch.setattr(type(evaluator._prepared[0].parts["search"].runner), "divisible", False)
    first = next(evaluator.rounds(model))
    assert first["o"].rows is None
    assert first["o"].value == evaluator.measure(model)["o"].value


def test_held_out_rows_have_rounds_too(build):
    model, evaluator = build("bert")
    *_, last = evaluator.rounds(model, "held_out")
    assert last["o"].value == evaluator.measure(model, "held_out")["o"].value


def test_an_unknown_split_is_refused(build):
    model, evaluator = build("bert")
    with pytest.raises(EvaluationError, match="split"):
        next(evaluator.rounds(model, "test"))


def test_a_model_that_gives_nan_is_told_with_the_objectives_name(build):
    model, evaluator = build("bert")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="Objective 'o'"):
        next(evaluator.rounds(model))
