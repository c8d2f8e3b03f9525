import pytest
import torch

from hf_merge.tensors.weighting import l1_gains, shares


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0, 3.0], [0.25, 0.75]), ([-1.0, -1.0], [0.5, 0.5]), ([1.0, -1.0], [1.0, -1.0]), ([1e-9, 1e-9], [1e-9, 1e-9])],
    ids=str,
)
def test_shares_are_divided_by_a_sum_that_is_not_next_to_zero(weights, expected):
    assert shares(weights, 2, True) == pytest.approx(expected)
    assert shares(weights, 2, False) == weights


def test_gains_give_back_the_norms_of_all_blocks():
    stack = torch.tensor([[1.0, -1, 2], [4.0, 0, 0]])
    blocks = [stack[:, :2], stack[:, 2:]]
    seen = []

    def first_block(number, start, block):
        seen.append((number, start))
        return block * (number == 0)

    assert l1_gains(lambda: blocks, first_block).tolist() == [2.0, 1.0]
    assert seen == [(0, 0), (1, 2)]


@pytest.mark.parametrize(("delta", "left"), [(0.0, 1.0), (1.0, 0.0), (1e-8, 0.5)])
def test_there_is_no_gain_where_a_norm_is_next_to_zero(delta, left):
    assert l1_gains(lambda: [torch.full((1, 3), delta)], lambda _, __, block: left * block).tolist() == [1.0]
