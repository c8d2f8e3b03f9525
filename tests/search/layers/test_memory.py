"""What the critic learns from the paths that were scored."""

import numpy as np
import pytest
import torch

from hf_merge.search.layers.ledger import Ledger
from hf_merge.search.layers.memory import Memory, tokens_of
from hf_merge.search.layers.pool import Pool

POOL = Pool.of({"a": 3})
VALUES = {(0, 1): [1.0, 0.0], (0, 2): [0.0, 1.0], (1,): [0.4, 0.4]}


@pytest.fixture
def memory():
    ledger = Ledger(lambda path: VALUES[POOL.encode(path)])
    for actions in VALUES:
        ledger(POOL.decode(actions))
    return Memory(POOL, ledger, longest=3, heads=4, share=0.7, rng=np.random.default_rng(0))


def lesson(memory, preference):
    """Targets by the actions of the path."""
    found = memory.lessons(9, np.array([preference]))
    return {
        tuple(t for t in row[1:].tolist() if t < POOL.stop): target[inside].tolist()
        for row, target, inside in zip(found.tokens, found.targets, found.inside, strict=True)
    }


@pytest.mark.parametrize("preference", [[1.0, 0.0], [0.0, 1.0]])
def test_a_beginning_is_worth_the_best_path_through_it(memory, preference):
    first, second = (1.0, 0.0) if preference[0] else (0.0, 1.0)
    assert lesson(memory, preference) == {
        (0, 1): [1, 1, first, first],
        (0, 2): [1, 1, second, second],
        (1,): pytest.approx([1, 0.4, 0.4]),
    }


def test_a_path_is_not_its_own_beginning(memory):
    memory.ledger.score = lambda path: [5.0, 5.0]
    memory.ledger(POOL.decode((1, 2)))
    assert lesson(memory, [1.0, 0.0])[(1,)] == pytest.approx([5, 5, 0.4])


def test_nothing_scored_teaches_nothing():
    empty = Memory(POOL, Ledger(lambda path: [0.0]), longest=3, heads=2, share=0.7, rng=np.random.default_rng(0))
    assert empty.lessons(4, np.array([[1.0, 0.0]])) is None


def test_heads_learn_from_different_paths(memory):
    memory.refresh()
    votes = np.array(memory.votes)
    assert 0 < votes.sum() < votes.size


def test_tokens_begin_with_the_start_and_are_padded_with_stops():
    tokens, log_scales = tokens_of(POOL, [POOL.decode((2, 1), (1.0, 0.5))], 3)
    assert tokens.tolist() == [[4, 2, 1, 3, 3]]
    assert torch.allclose(log_scales, torch.tensor([[0, 0, np.log(0.5), 0, 0]], dtype=torch.float32))
