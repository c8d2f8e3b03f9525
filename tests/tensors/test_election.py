import pytest
import torch

from hf_merge.tensors.consensus import elected


def elect_unweighted(deltas, weights, normalize):
    return elected(deltas, torch.ones_like(weights), weights, normalize)


def column(*values):
    return torch.tensor(values).reshape(-1, 1)


@pytest.mark.parametrize(
    ("values", "weights", "normalized", "total"),
    [
        ((3.0, -2.0), (0.5, 1.0), 3.0, 1.5),
        ((-3.0, 2.0), (0.5, 1.0), -3.0, -1.5),
        ((1.0, 3.0, -1.0), (1.0, 3.0, 9.0), 2.5, 10.0),
        ((1.0, -1.0), (1.0, 9.0), 1.0, 1.0),
        ((3.0, -9.0), (1.0, 0.0), 0.0, 0.0),
        ((3.0, 0.0), (1.0, 5.0), 3.0, 3.0),
        ((4.0,), (-0.5,), -4.0, -2.0),
        ((0.0, 0.0), (1.0, 1.0), 0.0, 0.0),
    ],
    ids=str,
)
def test_deltas_elect_the_sign_and_weights_only_the_shares(values, weights, normalized, total):
    assert elect_unweighted(column(*values), column(*weights), True).tolist() == [normalized]
    assert elect_unweighted(column(*values), column(*weights), False).tolist() == [total]


def test_deltas_that_cancel_exactly_elect_plus_in_any_order():
    votes = column(0.1015625, 0.333984375, -0.435546875)
    assert all(elect_unweighted(v, column(0.4, 0.4, 0.4), True).item() > 0 for v in (votes, votes.flip(0), votes.roll(1, 0)))
