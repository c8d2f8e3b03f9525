import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective

CHOICE = {"name": "o", "task": "multiple-choice", "target": "answer"}


@pytest.fixture
def questions():
    rng = np.random.default_rng(0)

    def words(least, most):
        return " ".join(f"w{i}" for i in rng.integers(0, 60, rng.integers(least, most)))

    choices = [[words(1, 5) for _ in range(rng.integers(2, 5))] for _ in range(60)]
    answers = [int(rng.integers(len(each))) for each in choices]
    every = Dataset.from_dict({"text": [words(3, 30) for _ in choices], "choices": choices, "answer": answers})
    return DatasetDict({"search": every.select(range(30)), "held_out": every.select(range(30, 60))})


def likelihoods(model, tokenizer, context, choices):
    """The log-likelihood of each choice by a plain loop over its tokens."""
    found = []
    for choice in choices:
        ids = tokenizer.convert_tokens_to_ids(f"{context} {choice}".split())
        start = len(context.split())
        with torch.inference_mode():
            probabilities = model(input_ids=torch.tensor([ids])).logits[0].float().softmax(-1)
        found.append(sum(math.log(probabilities[i - 1, ids[i]]) for i in range(start, len(ids))))
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("metric", ["accuracy", "normalized_accuracy"])
def test_the_likeliest_choice_is_that_of_a_plain_loop(
    make_model, evaluator, tokenizer, questions, architecture, batch_size, metric
):
    model, right = make_model(architecture), []
    for row in questions["search"]:
        found = likelihoods(model, tokenizer, row["text"], row["choices"])
        sizes = [len(choice) if metric == "normalized_accuracy" else 1 for choice in row["choices"]]
        right.append(int(np.argmax(np.array(found) / sizes)) == row["answer"])
    assert 0 < sum(right) < len(right)
    objective = Objective(dataset=questions, metric=metric, batch_size=batch_size, **CHOICE)
    assert evaluator(model, objective).measure(model)["o"].outcomes.tolist() == right


def test_normalized_accuracy_may_choose_otherwise(make_model, evaluator, questions):
    model = make_model("llama")
    plain, normalized = (
        evaluator(model, Objective(dataset=questions, metric=metric, **CHOICE)).measure(model)["o"].outcomes
        for metric in ("accuracy", "normalized_accuracy")
    )
    assert plain.tolist() != normalized.tolist()


def test_a_prompt_makes_the_context(make_model, evaluator, questions):
    model = make_model("llama")
    rendered = questions.map(lambda row: {"text": f"w9 {row['text']} w8"})
    one = Objective(dataset=questions, prompt="w9 {text} w8 ", **CHOICE)
    scores = [evaluator(model, objective).measure(model)["o"] for objective in (one, Objective(dataset=rendered, **CHOICE))]
    assert scores[0].outcomes.tolist() == scores[1].outcomes.tolist()


def test_a_long_context_loses_its_start(make_model, evaluator, questions):
    model = make_model("llama")
    short = questions.map(lambda row: {"text": " ".join(row["text"].split()[-4:]), "choices": ["w1", "w2"], "answer": 0})
    long = short.map(lambda row: {"text": "w7 w8 w9 " + row["text"]})
    scores = [
        evaluator(model, Objective(dataset=data, max_length=5, **CHOICE)).measure(model)["o"]
        for data in (long, short.filter(lambda row: len(row["text"].split()) == 4))
    ]
    kept = [len(text.split()) == 4 for text in short["search"]["text"]]
    assert scores[0].outcomes[kept].tolist() == scores[1].outcomes.tolist()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_length": 3}, "or choices longer than the 3 tokens"),
        ({"choices": "options"}, "Unknown column of search 'options'"),
        ({"prompt": "{txt}"}, "Unknown column of search 'txt'. Did you mean 'text'"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(make_model, evaluator, questions, fields, said):
    with pytest.raises(EvaluationError, match=said):
        evaluator(make_model("llama"), Objective(dataset=questions, **{**CHOICE, **fields}))


def test_an_empty_context_is_refused(make_model, evaluator, questions):
    empty = questions["search"].map(lambda row: {"text": ""}).select([0])
    data = DatasetDict({"search": empty, "held_out": questions["held_out"]})
    with pytest.raises(EvaluationError, match="row 0, '', has no context before its choices"):
        evaluator(make_model("llama"), Objective(dataset=data, **CHOICE))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_choices_after_a_shared_context_cost_what_they_cost_alone(make_model, evaluator, questions, architecture):
    model = make_model(architecture)
    runner = evaluator(model, Objective(dataset=questions, **CHOICE))._prepared[0].parts["search"].runner
    rows = np.arange(30)
    shared, apart = (np.concatenate(costs(model, rows)) for costs in (runner.shared, runner._apart))
    assert shared.tolist() == pytest.approx(apart.tolist(), rel=1e-4)


def test_a_context_is_read_once_for_all_choices(make_model, evaluator, questions):
    model, read = make_model("llama"), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    evaluator(model, Objective(dataset=questions, batch_size=1, **CHOICE)).measure(model)
    contexts = [len(text.split()) for text in questions["search"]["text"]]
    longest = [len(each) * (max(len(c.split()) for c in each) - 1) for each in questions["search"]["choices"]]
    assert sum(read) == sum(contexts) + sum(longest)


def test_choices_of_one_token_need_nothing_but_the_context(make_model, evaluator, questions):
    letters = questions.map(lambda row: {"choices": ["w1", "w2", "w3"], "answer": 1})
    model, calls = make_model("llama"), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(1))
    evaluator(model, Objective(dataset=letters, batch_size=1, **CHOICE)).measure(model)
    assert len(calls) == 30


def test_some_rows_are_answered_as_among_all(make_model, evaluator, questions):
    model = make_model("llama")
    runner = evaluator(model, Objective(dataset=questions, **CHOICE))._prepared[0].parts["search"].runner
    rows = np.array([7, 3, 21])
    assert runner.answers(runner(model, rows)).tolist() == runner.answers(runner(model))[rows].tolist()
