import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.tensors.consensus import disjoint, weighted_sum


def column(*values):
    return torch.tensor(values).reshape(-1, 1)


def test_a_weighted_sum_adds_each_model_times_its_weight():
    stack = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    assert weighted_sum(stack, column(1.0, 0.5, -2.0)).tolist() == [-194.0, -388.0]


@pytest.mark.parametrize(
    ("values", "weights", "normalized", "total"),
    [
        ((1.0, 2.0, -1.0), (1.0, 1.0, 1.0), 1.5, 3.0),
        ((-1.0, -2.0, 1.0), (1.0, 1.0, 1.0), -1.5, -3.0),
        ((1.0, -1.0), (1.0, 1.0), 1.0, 1.0),
        ((3.0, -2.0), (0.5, 1.0), -2.0, -2.0),
        ((3.0, -2.0), (1.0, -1.0), 2.5, 5.0),
        ((3.0, 0.0), (1.0, 5.0), 3.0, 3.0),
        ((3.0, -9.0), (1.0, 0.0), 3.0, 3.0),
        ((0.0, 0.0), (1.0, 1.0), 0.0, 0.0),
        ((4.0,), (0.5,), 4.0, 2.0),
        ((4.0,), (-0.5,), -4.0, -2.0),
    ],
    ids=str,
)
def test_the_models_that_agree_with_the_elected_sign_are_merged(values, weights, normalized, total):
    assert disjoint(column(*values), column(*weights), True).tolist() == [normalized]
    assert disjoint(column(*values), column(*weights), False).tolist() == [total]


@settings(derandomize=True, deadline=None)
@given(data=st.data(), k=st.integers(1, 5))
def test_each_column_is_elected_and_merged_alone(data, k):
    value = st.floats(-10, 10, width=32)
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -0.25, 2.0, 0.0]), min_size=k, max_size=k))
    columns = data.draw(st.lists(st.lists(value, min_size=k, max_size=k), min_size=1, max_size=6))
    merged = disjoint(torch.tensor(columns).T.contiguous(), column(*weights), False)
    for votes, result in zip(columns, merged.tolist(), strict=True):
        products = [v * w for v, w in zip(votes, weights, strict=True)]
        positive = math.fsum(products) >= 0
        expected = math.fsum(p for p in products if (p > 0) == positive)
        assert result == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_deltas_that_cancel_exactly_elect_plus_in_any_order():
    weight, third = 0.4, torch.tensor(1 / 3).bfloat16().item()
    votes = torch.tensor([[0.1015625], [third], [-(0.1015625 + third)]])
    orders = [votes, votes.flip(0), votes.roll(1, 0), votes.roll(2, 0)]
    assert all(disjoint(v, column(*[weight] * 3), True).item() > 0 for v in orders)


@pytest.mark.parametrize("models", [2, 3, 5, 16])
@pytest.mark.parametrize("normalize", [True, False])
def test_coarse_deltas_are_elected_and_merged_as_in_exact_arithmetic(models, normalize):
    generator = torch.Generator().manual_seed(models)
    deltas = torch.randint(-3, 4, (models, 20_000), generator=generator) * 2.0**-9 * (1 + 2.0**-7)
    weights = torch.tensor([0.1, 0.3, -0.7, 1.1])[torch.randint(0, 4, (models, 1), generator=generator)]
    products = deltas.double() * weights.double()
    positive = products.sum(0) >= 0
    agree = ((products > 0) == positive) & (products != 0)
    expected = (products * agree).sum(0)
    if normalize:
        expected /= (weights.abs().double() * agree).sum(0).clamp_min(1e-30)
    torch.testing.assert_close(disjoint(deltas, weights, normalize), expected.float(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1000])
def test_a_column_has_the_same_bits_whatever_stands_beside_it(columns):
    deltas = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    weights = column(0.3, 0.7, -0.1)
    for merge in (weighted_sum, lambda d, w: disjoint(d, w, True)):
        assert torch.equal(merge(deltas[:, -columns:], weights), merge(deltas, weights)[-columns:])
