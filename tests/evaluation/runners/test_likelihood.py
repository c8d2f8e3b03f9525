import copy
import math

import numpy as np
import pytest
import torch
from datasets import DatasetDict

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective

FILL = {"name": "o", "task": "fill-mask"}


@pytest.fixture
def masking(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"mask_token": "w60"})
    return own


@pytest.mark.parametrize("batch_size", [1, 16])
def test_masked_tokens_are_predicted_as_by_a_plain_loop(make_model, evaluator, masking, make_data, batch_size):
    model, data = make_model("bert-masked"), make_data(20, shortest=2)
    part = evaluator(model, Objective(dataset=data, batch_size=batch_size, **FILL), tokenizer=masking)
    runner = part._prepared[0].parts["search"].runner
    total, count, means = 0.0, 0, []
    for text, ids, targets in zip(data["search"]["text"], runner.items.ids, runner.items.targets, strict=True):
        places = np.flatnonzero(targets != -100)
        own = masking(text)["input_ids"]
        assert len(places) == max(1, round(0.15 * sum(i not in masking.all_special_ids for i in own)))
        assert set(ids[places]) == {masking.mask_token_id}
        assert np.where(targets == -100, ids, targets).tolist() == own
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids[None])).logits[0].log_softmax(-1)
        costs = [-logits[place, targets[place]].item() for place in places]
        means.append(np.mean(costs))
        total, count = total + sum(costs), count + len(costs)
    score = part.measure(model)["o"]
    assert score.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert score.outcomes.tolist() == pytest.approx(means, rel=1e-4)


def test_which_tokens_are_masked_hangs_on_the_text_alone(make_model, evaluator, masking, make_data):
    model, data = make_model("bert-masked"), make_data(20, shortest=2)
    turned = DatasetDict({**data, "search": data["search"].select(range(19, -1, -1))})
    one, two = (
        evaluator(model, Objective(dataset=rows, **FILL), tokenizer=masking).measure(model)["o"] for rows in (data, turned)
    )
    assert one.outcomes.tolist() == pytest.approx(two.outcomes[::-1].tolist(), rel=1e-4)


def test_texts_of_one_length_are_masked_in_different_places(make_model, evaluator, masking, make_data):
    model, data = make_model("bert-masked"), make_data(30, shortest=20)
    cut = data.map(lambda row: {"text": " ".join(row["text"].split()[:20])})
    runner = evaluator(model, Objective(dataset=cut, **FILL), tokenizer=masking)._prepared[0].parts["search"].runner
    assert len({tuple(np.flatnonzero(targets != -100)) for targets in runner.items.targets}) > 20


def test_masked_tokens_that_are_ranked_first_are_counted(make_model, evaluator, masking, make_data):
    model, data = make_model("bert-masked"), make_data(20, shortest=10)
    score = evaluator(model, Objective(dataset=data, metric="token_accuracy", **FILL), tokenizer=masking).measure(model)["o"]
    with torch.no_grad():
        model.cls.predictions.bias.fill_(-1e4)[63] = 0  # it always says w60
    always = evaluator(model, Objective(dataset=data, metric="token_accuracy", **FILL), tokenizer=masking).measure(model)["o"]
    assert always.value == 0 <= score.value


def test_a_tokenizer_without_a_mask_is_refused(make_model, evaluator, make_data):
    with pytest.raises(EvaluationError, match="needs a tokenizer with a mask token"):
        evaluator(make_model("bert-masked"), Objective(dataset=make_data(), **FILL))
