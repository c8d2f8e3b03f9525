import logging
import math
import warnings

import numpy as np
import pytest
import torch

from hf_merge.errors import EvaluationError
from hf_merge.evaluation import predict
from hf_merge.evaluation.predict import IGNORED, Tokens, cut
from hf_merge.evaluation.runners.classification import Classification
from hf_merge.evaluation.runners.generation import TextGeneration
from hf_merge.evaluation.runners.likelihood import Likelihood, hits, negative_log_likelihood

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(2, 30, 40)
ROWS = tuple(RNG.integers(3, 64, length) for length in LENGTHS)
TOKENS = Tokens(ids=ROWS)


def alone(model, row):
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(row)[None]).logits[0].float()


def classify(model, tokens=TOKENS, classes=range(5), pad_id=0, batch_size=8):
    runner = Classification(tokens, classes=tuple(classes), pad_id=pad_id, batch_size=batch_size)
    return runner.answers(runner(model))


def count(model, what=negative_log_likelihood, batch_size=8, tokens=TOKENS):
    following = Tokens(ids=tokens.ids, targets=tuple(np.append(row[1:], IGNORED) for row in tokens.ids))
    return Likelihood(following, count=what, pad_id=0, batch_size=batch_size, logits=64)(model)


@pytest.fixture
def generate(tokenizer):
    def run(model, tokens=TOKENS, batch_size=8, left=True):
        runner = TextGeneration(
            tokens, tokenizer=tokenizer, max_new_tokens=6, vocabulary=64, pad_id=0, batch_size=batch_size, left=left
        )
        return runner(model)

    return run


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 10**9), (10**9, 64), (7, 50)])
def test_batches_hold_every_row_once_and_keep_to_the_budget(rows, tokens, exact):
    batches = cut(LENGTHS, rows=rows, tokens=tokens, exact=exact)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    assert all(len(batch) <= rows for batch in batches)
    assert all(len(batch) == 1 or len(batch) * LENGTHS[batch].max() <= tokens for batch in batches)


def test_the_longest_rows_come_first():
    lengths = [LENGTHS[batch].max() for batch in cut(LENGTHS, rows=5, tokens=10**9)]
    assert lengths == sorted(lengths, reverse=True)


def test_exact_batches_hold_rows_of_one_length():
    assert all(len(set(LENGTHS[batch])) == 1 for batch in cut(LENGTHS, rows=50, tokens=10**9, exact=True))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_classes_are_those_of_each_row_alone_whatever_the_batches(make_model, batch_size):
    model = make_model("bert")
    expected = [int(alone(model, row).argmax()) for row in ROWS]
    assert len(set(expected)) > 2
    assert classify(model, batch_size=batch_size).tolist() == expected


def test_only_the_given_classes_compete_and_they_are_numbered_in_their_order(make_model):
    model = make_model("bert")
    expected = [int(alone(model, row)[[4, 1]].argmax()) for row in ROWS]
    assert set(expected) == {0, 1}
    assert classify(model, classes=(4, 1)).tolist() == expected


def test_a_decoder_without_a_padding_token_classifies_in_batches(make_model):
    model = make_model("gpt2-classifier", pad_token_id=None)
    rows = tuple(np.append(row, 2) for row in ROWS)  # ends with what often serves as padding
    expected = [int(alone(model, row).argmax()) for row in rows]
    assert classify(model, Tokens(ids=rows), pad_id=None, batch_size=64).tolist() == expected
    assert model.config.pad_token_id is None


def test_a_decoder_with_a_padding_token_classifies_in_batches(make_model):
    model = make_model("gpt2-classifier", pad_token_id=0)
    expected = [int(alone(model, row).argmax()) for row in ROWS]
    assert classify(model, pad_id=0, batch_size=64).tolist() == expected


def test_the_texts_of_a_pair_are_told_apart(make_model):
    model = make_model("bert")
    types = tuple((np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in ROWS)
    with torch.inference_mode():
        expected = [
            int(model(input_ids=torch.from_numpy(row)[None], token_type_ids=torch.from_numpy(kind)[None]).logits.argmax())
            for row, kind in zip(ROWS, types, strict=True)
        ]
    assert classify(model, Tokens(ids=ROWS, types=types)).tolist() == expected
    assert expected != classify(model).tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_likelihoods_equal_those_of_a_plain_loop_over_tokens(make_model, architecture, batch_size):
    model = make_model(architecture)
    expected = []
    for row in ROWS:
        probabilities = alone(model, row).softmax(-1)
        expected.append(-sum(math.log(probabilities[i, row[i + 1]]) for i in range(len(row) - 1)))
    assert count(model, batch_size=batch_size).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_hits_equal_those_of_a_plain_loop_over_tokens(make_model, batch_size):
    model = make_model("llama")
    rows = tuple(np.append(row, int(alone(model, row)[-1].argmax())) for row in ROWS)
    expected = [float((alone(model, row)[:-1].argmax(-1).numpy() == row[1:]).sum()) for row in rows]
    assert min(expected) >= 1
    assert count(model, what=hits, tokens=Tokens(ids=rows), batch_size=batch_size).tolist() == expected


def test_a_half_precision_model_is_counted_in_full_precision(make_model):
    model = make_model("llama").to(torch.bfloat16)
    logits = [alone(model, row) for row in ROWS]
    expected = [
        torch.nn.functional.cross_entropy(values[:-1], torch.from_numpy(row[1:]), reduction="sum").item()
        for values, row in zip(logits, ROWS, strict=True)
    ]
    assert count(model, batch_size=1).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_texts_are_those_of_greedy_decoding_by_hand(make_model, generate, tokenizer, architecture, batch_size):
    model = make_model(architecture)
    expected = []
    for row in ROWS:
        ids = row
        while len(ids) < len(row) + 6 and ids[-1] != 2:
            ids = np.append(ids, int(alone(model, ids)[-1].argmax()))
        expected.append(tokenizer.decode(ids[len(row) :], skip_special_tokens=True))
    assert generate(model, batch_size=batch_size) == expected


def test_a_continuation_ends_at_the_stop_token(make_model, generate):
    model = make_model("llama")
    first = [int(alone(model, row)[-1].argmax()) for row in ROWS]
    model.generation_config.eos_token_id = sorted(set(first))
    model_texts = generate(model)
    assert all(len(text.split()) <= 1 for text in model_texts)


def test_a_model_with_encoder_and_decoder_generates(make_model, generate, tokenizer):
    model = make_model("t5")
    short = Tokens(ids=ROWS[:6])
    texts = generate(model, short, left=False, batch_size=4)
    expected = []
    for row in ROWS[:6]:
        decoder = [0]
        while len(decoder) < 7 and decoder[-1] != 1:
            with torch.inference_mode():
                logits = model(input_ids=torch.from_numpy(row)[None], decoder_input_ids=torch.tensor([decoder])).logits
            decoder.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(decoder, skip_special_tokens=True))
    assert texts == expected


def test_sampling_beams_and_penalties_of_the_model_are_set_aside_and_put_back(make_model, generate, caplog):
    model = make_model("llama")
    plain = generate(model)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=4, repetition_penalty=9.0, max_length=1)
    before = model.generation_config.to_dict()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        logging.getLogger("transformers").propagate = True
        assert generate(model) == plain
    assert caplog.text == ""
    assert model.generation_config.to_dict() == before


def test_the_mode_of_every_module_is_put_back(make_model):
    model = make_model("bert", hidden_dropout_prob=0.9).train()
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    first, second = classify(model), classify(model)
    assert first.tolist() == second.tolist()
    assert [module.training for module in model.modules()] == modes


def test_the_mode_is_put_back_after_an_error(make_model):
    model = make_model("gpt2").train()
    with pytest.raises(EvaluationError, match="GPT2LMHeadModel gives logits"):
        classify(model)
    assert model.training


def test_a_classifier_is_no_language_model(make_model):
    with pytest.raises(EvaluationError, match="expected one for every token"):
        count(make_model("bert"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_classifier_with_broken_weights_is_refused(make_model, value):
    model = make_model("bert")
    with torch.no_grad():
        model.classifier.bias[0] = value
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        classify(model)


@pytest.mark.parametrize("what", [negative_log_likelihood, hits])
def test_a_language_model_with_broken_weights_is_refused(make_model, what):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        count(model, what=what)


def test_a_runner_follows_weights_that_change_in_place(make_model):
    model, other = make_model("bert"), make_model("bert", seed=1)
    runner = Classification(TOKENS, classes=range(5), pad_id=0, batch_size=8)
    before = runner.answers(runner(model))
    model.load_state_dict(other.state_dict())
    assert runner.answers(runner(model)).tolist() == classify(other).tolist() != before.tolist()


@pytest.mark.parametrize("ragged", [False, True])
def test_margins_are_what_the_right_answer_has_more_than_the_likeliest_other_one(ragged):
    runner = Classification(TOKENS, classes=range(3), pad_id=0, batch_size=8)
    found = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 1.0, 5.0]])
    found = [*found, np.array([7.0]), np.array([0.5, 0.25])] if ragged else found
    references = np.array([1, 2, 0, 0, 1][: len(found)])
    assert runner.answers(found).tolist() == [1, 1, 0, 0, 0][: len(found)]
    assert runner.margins(found, references).tolist() == [1.0, -1.0, 0.0, 1.0, -0.25][: len(found)]


def small_memory(model, most, seen):
    def forward(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape)
        if kwargs["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return own(*args, **kwargs)

    own, model.forward = model.forward, forward


def test_batches_shrink_when_memory_runs_out_and_stay_small(make_model):
    model, seen = make_model("bert"), []
    expected = classify(model).tolist()
    small_memory(model, 60, seen)
    runner = Classification(TOKENS, classes=range(5), pad_id=0, batch_size=64)
    assert runner.answers(runner(model)).tolist() == expected
    seen.clear()
    assert runner.answers(runner(model)).tolist() == expected
    assert max(rows * width for rows, width in seen) <= 60


def test_a_row_that_does_not_fit_alone_is_an_error(make_model):
    model = make_model("bert")
    small_memory(model, 3, [])
    with pytest.raises(torch.OutOfMemoryError):
        classify(model)


def test_the_logits_of_a_large_vocabulary_make_smaller_batches(make_model, monkeypatch):
    monkeypatch.setattr(predict, "LOGITS", 64 * 40)
    seen = []
    model = make_model("llama")
    small_memory(model, 10**9, seen)
    count(model, batch_size=64)
    assert all(rows == 1 or rows * width <= 40 for rows, width in seen)
