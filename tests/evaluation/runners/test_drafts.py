from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import Tokens
from hf_merge.evaluation.runners import generation
from hf_merge.evaluation.runners.drafts import KEPT, Drafts, agreed
from hf_merge.evaluation.runners.generation import TextGeneration

RNG = np.random.default_rng(0)
TOKENS = Tokens(ids=tuple(RNG.integers(3, 64, length) for length in RNG.integers(2, 30, 24)))
ALL = np.arange(24)
DECODERS = pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])


@pytest.fixture
def runner(tokenizer):
    def build(speculative=True, tokens=TOKENS, left=True, max_new_tokens=8, **arguments):
        usual = {"vocabulary": 64, "pad_id": 0, "batch_size": 8, "max_new_tokens": max_new_tokens, "left": left}
        return TextGeneration(tokens, tokenizer=tokenizer, speculative=speculative, **{**usual, **arguments})

    return build


def nearby(model, seed, width=0.003):
    """Another model, as near to it as candidates of a search are to each other."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=width)
    return model


@contextmanager
def passes(model):
    """How many tokens each pass of the model reads."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    yield seen
    hook.remove()


@DECODERS
def test_answers_are_those_of_a_runner_that_generates_every_token(make_model, runner, architecture):
    model, guessing, plain, different = make_model(architecture), runner(), runner(speculative=False), 0
    before = plain(model)
    guessing(model)
    for seed in range(6):
        nearby(model, seed)
        with passes(model) as many:
            expected = plain(model)
        with passes(model) as few:
            assert guessing(model) == expected
        assert len(few) < len(many)
        different += sum(old != new for old, new in zip(before, expected, strict=True))
        before = expected
    assert different > 5


def test_the_same_model_once_more_takes_one_pass_a_batch(make_model, runner):
    model, guessing = make_model("llama"), runner()
    first = guessing(model)
    with passes(model) as seen:
        assert guessing(model) == first
    assert len(seen) == 3


def test_rows_that_a_round_takes_are_guessed_from_their_own_answers(make_model, runner):
    model, guessing = make_model("llama"), runner()
    everything = runner(speculative=False)(model)
    some = np.array([7, 3, 20])
    assert guessing(model, some) == [everything[i] for i in some]
    assert guessing(model, ALL[::-1]) == everything[::-1]
    with passes(model) as seen:
        assert guessing(model, some) == [everything[i] for i in some]
    assert len(seen) == 1


def test_answers_end_at_another_models_stop_token(make_model, runner):
    model, guessing = make_model("llama"), runner()
    long = guessing(model)
    second = [text.split()[1] for text in long if len(text.split()) > 1]
    model.generation_config.eos_token_id = sorted({int(word[1:]) + 3 for word in second})
    ended = guessing(model)
    assert ended == runner(speculative=False)(model)
    assert sum(map(len, ended)) < sum(map(len, long))


def test_models_that_agree_on_nothing_are_not_asked_in_vain(make_model, runner):
    guessing = runner()
    for seed in range(4):
        guessing(make_model("llama", seed=seed))
    assert not guessing._drafts.promising
    model = make_model("llama", seed=9)
    with passes(model) as seen:
        answers = guessing(model)
    with passes(model) as plain:
        assert runner(speculative=False)(model) == answers
    assert seen == plain
    for _ in range(3):
        guessing(model)
    assert guessing._drafts.promising


def test_memory_that_does_not_suffice_makes_smaller_batches(make_model, runner, monkeypatch):
    model, guessing = make_model("llama"), runner()
    expected = guessing(model)
    forward, failed = type(model).forward, []

    def scarce(self, *args, **kwargs):
        if kwargs["input_ids"].shape[0] > 4:
            failed.append(kwargs["input_ids"].shape[0])
            raise RuntimeError("CUDA out of memory.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", scarce)
    assert guessing(model) == expected
    assert failed


@pytest.mark.parametrize("few", [True, False])
def test_logits_that_are_held_at_once_keep_to_the_memory_there_is(make_model, runner, monkeypatch, few):
    model, guessing, seen = make_model("llama"), runner(), []
    forward = type(model).forward
    expected = guessing(model)

    def asked(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0):
        found = forward(self, input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        seen.append(found.logits.shape)
        return found

    def unasked(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return asked(self, input_ids, attention_mask, position_ids, use_cache)

    monkeypatch.setattr(type(model), "forward", asked if few else unasked)
    for tokens, few_of, all_of in [(10**6, 3, 3), (100, 3, 8), (30, 8, 24), (3, 24, 24)]:
        monkeypatch.setattr(generation, "LOGITS", 64 * tokens)
        seen.clear()
        assert guessing(model) == expected
        assert sum(rows for rows, _, _ in seen) == 24
        assert all(rows == 1 or rows * length <= tokens for rows, length, _ in seen)
        assert len(seen) == (few_of if few else all_of)


def test_what_a_model_is_forced_to_write_is_not_guessed(make_model, runner):
    model = make_model("llama")
    model.generation_config.forced_eos_token_id = 2
    guessing, plain = runner(), runner(speculative=False)
    assert guessing(model) == plain(model)
    assert guessing(model) == plain(model)


def test_an_answer_of_an_encoder_and_a_decoder_is_generated(make_model, runner):
    model, guessing = make_model("t5"), runner(left=False)
    assert guessing(model) == guessing(model)
    assert guessing(nearby(model, 0, 0.3)) == runner(speculative=False, left=False)(model)


def test_the_most_frequent_answer_is_guessed_and_the_oldest_of_equals():
    drafts = Drafts()
    for answer in [(1, 2), (1, 3), (1, 3), (4,), (5, 6)]:
        drafts.learn(np.array([0]), [answer])
    assert drafts.guess(0) == (1, 3)
    assert drafts.guess(0, (1, 2)) == (1, 2)
    assert drafts.guess(0, (4,)) == (4,)
    assert drafts.guess(0, (5, 7)) is None
    assert drafts.guess(1) is None


def test_few_answers_are_kept_of_a_row():
    drafts = Drafts()
    drafts.learn(np.array([0, 0]), [(1,), (1,)])
    for answer in range(2, 100):
        drafts.learn(np.array([0]), [(answer,)])
    assert len(drafts._answers[0]) == KEPT
    assert drafts.guess(0) == (1,)
    assert drafts.guess(0, (99,)) == (99,)


@pytest.mark.parametrize(
    ("own", "expected"),
    [((5, 6, 7), (5, 6, 7)), ((5, 6, 8), (5, 6, 8)), ((4, 6, 7), (4,)), ((5, 0, 7), (5, 0))],
)
def test_a_guess_holds_up_to_the_first_token_that_is_otherwise(own, expected):
    assert agreed((5, 6, 7), torch.tensor(own)) == expected


def test_speculation_is_a_switch(make_data):
    data = make_data(labels=("w1",))
    with pytest.raises(EvaluationError, match="speculative"):
        Objective(name="x", dataset=data, task="text-generation", speculative="yes")
