"""What holds for every runner."""

import copy

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.runners.table import RUNNERS

RNG = np.random.default_rng(0)
COUNT = 24
TAGS = ["O", "B-x", "I-x"]
LISTS = [[f"w{i}" for i in RNG.integers(0, 60, RNG.integers(2, 25))] for _ in range(COUNT)]
TABLE = {
    "text": [" ".join(words) for words in LISTS],
    "words": LISTS,
    "tags": [[TAGS[i] for i in RNG.integers(0, 3, len(words))] for words in LISTS],
    "label": [("pos", "neg")[i] for i in RNG.integers(0, 2, COUNT)],
    "image": [Image.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(COUNT)],
    "choices": [["w1 w2", "w3", "w4 w5 w6"]] * COUNT,
    "place": RNG.integers(0, 3, COUNT).tolist(),
    "number": RNG.normal(size=COUNT).tolist(),
}
CASES = {
    "text-classification": ("bert", {}),
    "token-classification": ("bert-tagger", {"input": "words", "target": "tags"}),
    "image-classification": ("vit", {"input": "image"}),
    "language-modeling": ("llama", {}),
    "fill-mask": ("bert-masked", {}),
    "text-generation": ("llama", {"max_new_tokens": 3}),
    "multiple-choice": ("llama", {"target": "place"}),
    "sentence-similarity": ("bert-body", {"input": ("text", "label"), "target": "number"}),
    "text-retrieval": ("bert-body", {"target": "text"}),
}
ELSEWHERE = {"code-generation"}  # runs programs: it has tests of its own


def test_every_runner_is_tried_here():
    assert set(CASES) | ELSEWHERE == set(RUNNERS)


@pytest.fixture
def prepared(make_model, evaluator, tokenizer):
    def build(task):
        architecture, fields = CASES[task]
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"mask_token": "w60"})
        every = Dataset.from_dict(TABLE)
        data = DatasetDict({"search": every.select(range(16)), "held_out": every.select(range(16, COUNT))})
        model = make_model(architecture)
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
        objective = Objective(name="o", task=task, dataset=data, batch_size=4, **fields)
        return model, evaluator(model, objective, tokenizer=own, processor=processor)

    return build


def same(found, expected):
    if isinstance(expected[0], np.ndarray | np.number):
        return all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))
    return found == expected


@pytest.mark.parametrize("task", CASES)
def test_the_predictions_of_some_rows_are_theirs_among_all_in_the_order_asked_for(prepared, task):
    model, evaluator = prepared(task)
    runner = evaluator._prepared[0].parts["search"].runner
    whole, rows = runner(model), np.array([11, 2, 5])
    expected = whole[rows] if isinstance(whole, np.ndarray) else [whole[i] for i in rows]
    assert same(runner(model, rows), expected)


@pytest.mark.parametrize("task", CASES)
def test_every_task_gives_a_finite_score_with_an_outcome_a_row(prepared, task):
    model, evaluator = prepared(task)
    score = evaluator.measure(model, replicates=20)["o"]
    assert np.isfinite(score.value)
    assert score.outcomes.shape == (16,)
    assert np.isfinite(score.outcomes).all()
    assert np.isfinite(score.replicates).all()


CHOOSING = ("text-classification", "image-classification", "multiple-choice")


@pytest.mark.parametrize("task", CASES)
def test_the_right_answer_leads_where_it_is_given(prepared, task):
    model, evaluator = prepared(task)
    score = evaluator.measure(model)["o"]
    if task in CHOOSING:
        assert (score.margins > 0).tolist() == (score.outcomes == 1).tolist()
    else:
        assert score.margins is None


@pytest.mark.parametrize("task", CASES)
def test_measuring_changes_nothing_of_the_model(prepared, task):
    model, evaluator = prepared(task)
    model.train()
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    evaluator.measure(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("task", CASES)
def test_a_description_names_the_data_and_the_metric(prepared, task):
    _, evaluator = prepared(task)
    [facts] = evaluator.describe()
    assert facts["task"] == task
    assert facts["implementation"].startswith("hf_merge ")
    assert (facts["rows_search"], facts["rows_held_out"]) == (16, 8)
