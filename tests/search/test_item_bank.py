"""Item banks of outcomes drawn from a model whose items and abilities are known."""

import numpy as np
import pytest
from scipy.special import expit

from hf_merge.search.item_bank import ItemBank

ROWS, TRIALS = 400, 40


def drawn(seed, count):
    """Outcomes of `count` test takers on the same items, and how probable each of them was."""
    items = np.random.default_rng(0)
    slopes, intercepts = items.normal(0, 1.5, (ROWS, 2)), items.normal(0, 1.5, ROWS)
    rng = np.random.default_rng(seed)
    right = expit(rng.normal(size=(count, 2)) @ slopes.T + intercepts)
    return (rng.random(right.shape) < right).astype(float), right


@pytest.fixture(scope="module")
def bank():
    return ItemBank.fit(drawn(1, TRIALS)[0])


@pytest.fixture(scope="module")
def others():
    return drawn(2, 60)[0]


def errors(bank, rows, others):
    return np.array([bank.estimate(rows, each[rows]) - each.mean() for each in others])


def test_the_probabilities_of_a_bank_are_those_that_drew_its_outcomes(bank):
    right = drawn(1, TRIALS)[1]
    assert np.corrcoef(bank.probabilities(bank.abilities).ravel(), right.ravel())[0, 1] > 0.9


def test_twenty_chosen_rows_tell_more_than_the_mean_of_twenty_random_ones(bank, others):
    random = np.random.default_rng(3).permutation(ROWS)[:20]
    plain = others[:, random].mean(1) - others.mean(1)
    assert np.std(errors(bank, bank.choose(20), others)) < 0.8 * np.std(plain)


def test_chosen_rows_tell_more_than_random_ones_of_the_same_bank(bank, others):
    random = [errors(bank, np.random.default_rng(seed).permutation(ROWS)[:12], others).std() for seed in range(8)]
    assert errors(bank, bank.choose(12), others).std() < np.mean(random)


def test_more_rows_are_chosen_by_adding_to_fewer(bank):
    assert bank.choose(30)[:10].tolist() == bank.choose(10).tolist()


def test_no_row_is_chosen_twice(bank):
    assert sorted(bank.choose(ROWS + 5)) == list(range(ROWS))


def test_an_estimate_from_all_rows_is_their_mean(bank, others):
    assert bank.estimate(np.arange(ROWS), others[0]) == pytest.approx(others[0].mean())


def test_right_answers_raise_the_estimate(bank):
    rows = bank.choose(20)
    assert bank.estimate(rows, np.ones(20)) > bank.estimate(rows, np.zeros(20)) + 0.03


def test_a_candidate_of_whom_nothing_is_seen_is_like_the_trials(bank):
    nothing = np.array([], dtype=np.int64)
    assert bank.ability(nothing, np.array([])) == pytest.approx(bank.abilities.mean(0))


def test_rows_on_which_all_agree_are_chosen_last():
    outcomes = drawn(4, TRIALS)[0]
    outcomes[:, :100] = 1.0
    assert ItemBank.fit(outcomes).choose(100).min() >= 100


def test_the_same_outcomes_make_the_same_bank(bank):
    again = ItemBank.fit(drawn(1, TRIALS)[0])
    assert again.choose(15).tolist() == bank.choose(15).tolist()


@pytest.mark.parametrize("wrong", [np.full((5, 4), 2.0), np.ones((2, 4)), np.ones(4), np.full((5, 4), np.nan)])
def test_outcomes_that_are_not_right_or_wrong_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ItemBank.fit(wrong)
