"""The compiled loops and the operations of torch that other devices get say the same."""

import numpy as np
import pytest
import torch

from hf_merge.methods import METHODS
from hf_merge.tensors import loops
from hf_merge.tensors.precision import mix, narrow, widen
from hf_merge.tensors.ranks import magprune
from hf_merge.tensors.rng import Draws

DRAWS = Draws(seed=0, models=("a", "b", "c"), tensor="w", block=0)


@pytest.fixture
def torch_alone(monkeypatch):
    """A call's result without the compiled loops, as on other devices."""

    def call(function, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr(loops, "served", lambda values: None)
            return function(*arguments, **keywords)

    return call


def deltas(models=3, n=5000):
    values = torch.randn(models, n, generator=torch.Generator().manual_seed(0))
    return (values * values.abs()).bfloat16().float()


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "sce", "breadcrumbs"]
)
@pytest.mark.parametrize("switches", [{}, {"match_l1": True}, {"normalize": True}, {"normalize": False}], ids=str)
def test_a_method_gives_with_both_what_it_gives_with_one(method, switches, torch_alone):
    merge = METHODS[method]
    arguments = {name: value for name, value in switches.items() if name in merge.parameters}
    stack = deltas().reshape(3, 50, 100)
    torch.testing.assert_close(merge(stack, **arguments), torch_alone(merge, stack, **arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [1, 2, 8, 100, 1000, 5000])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rescale", [True, False])
def test_ranks_decide_the_same_elements(row, epsilon, rescale, torch_alone):
    arguments = (deltas(), 0.5, epsilon, row, DRAWS, rescale)
    torch.testing.assert_close(magprune(*arguments), torch_alone(magprune, *arguments), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(3, 500),
        torch.zeros(2, 300),
        torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)) ** 9,
        torch.randn(2, 1000, generator=torch.Generator().manual_seed(2)).round(),
        torch.randn(4, 1, generator=torch.Generator().manual_seed(3)),
        torch.cat([torch.full((1, 200), 1e-30), torch.full((1, 1), 1e30)], 1),
    ],
    ids=["ones", "zeros", "tails", "ties", "single", "far"],
)
def test_ranks_are_those_of_a_stable_sort(rows):
    order = np.empty(rows.shape, np.int32)
    loops.rank(rows.numpy(), order)
    assert (order == np.argsort(-rows.abs().numpy(), axis=1, kind="stable")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2047, 5000])
def test_a_mix_rounds_as_torch_does(dtype, base, n):
    sources = [values.to(dtype) for values in deltas(4, n)]
    origin = sources.pop()
    factors = [0.3, -0.2, 1.5]
    result, finite = mix(sources, factors, origin if base else None, 0.7, dtype)
    anchor = origin.float() if base else torch.zeros(n)
    total = sum((torch.tensor(f) * (s.float() - anchor) for f, s in zip(factors, sources, strict=True)), torch.zeros(n))
    expected = (anchor + (0.7 if base else 1.0) * total).to(dtype)
    assert (result.dtype, finite) == (dtype, True)
    torch.testing.assert_close(result.float(), expected.float(), rtol=2**-7 if dtype is torch.bfloat16 else 1e-3, atol=1e-6)
    assert (result != expected).float().mean().nan_to_num() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("place", [0, 2048, 4999])
def test_what_is_not_finite_is_noticed(bad, dtype, place):
    values = deltas(1)[0].to(dtype)
    values[place] = bad
    out = torch.empty(5000)
    assert not widen(values, None, out)
    assert not widen(values, torch.zeros(5000), out)
    assert not mix([values, values], [1.0, 0.5], None, 1.0, dtype)[1]
    assert not narrow(values.float(), None, 1.0, dtype)[1]


def test_what_overflows_by_rounding_is_noticed():
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    assert not narrow(largest, None, 1.0, torch.bfloat16)[1]
    assert narrow(largest, None, 1.0, torch.float32)[1]


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 10_000])
def test_sizes_are_sums_of_magnitudes(n):
    values = deltas(1, n)[0]
    assert loops.sizes(values.numpy()) == pytest.approx(float(values.double().abs().sum()), rel=1e-6)
    flags = (torch.arange(n) % 3 == 0).to(torch.uint8)
    left = float((values.double().abs() * flags).sum())
    total = float(values.double().abs().sum())
    assert loops.flagged_sizes(values.numpy(), flags.numpy()) == pytest.approx((total, left), rel=1e-6)
