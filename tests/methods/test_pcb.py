"""PCB-Merging against the published algorithm on sorted arrays in float64, and PAINT."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_merge.methods import METHODS, method, pcb

PCB, PAINT = METHODS["pcb"], METHODS["paint"]


# Where shares are next to 0 their ratio has few digits in float32.
CLOSE = {"rtol": 1e-3, "atol": 1e-7}


def stack_of(models, n, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(models, n, generator=generator) * torch.rand(models, n, generator=generator)


def on_unit_range(values, low, high):
    return (values - low) / (high - low)


def pcb_reference(stack, weights, ratio):
    """arXiv:2410.02396 in the form of its published code: sort, clamp, score, clamp, average."""
    deltas = stack.double().numpy()
    models, n = deltas.shape
    together = deltas.sum(0)
    total, divisor = np.zeros(n), np.zeros(n)
    for delta, weight in zip(deltas, weights, strict=True):
        magnitudes = np.sort(np.abs(delta))
        cut_off = math.floor(n / 10_000)
        low, high = magnitudes[cut_off], magnitudes[n - 1 - cut_off]
        clamped = np.clip(np.abs(delta), low, high)
        score = np.exp(models * on_unit_range(clamped, low, high) ** 2) * np.tanh(delta * together)
        ascending = np.sort(score)
        quantile = ascending[int(n * (1 - ratio))]
        share = on_unit_range(np.maximum(score, quantile), quantile, ascending[-1])
        total += weight * share * clamped * np.sign(delta)
        divisor += share
    return torch.tensor(total / np.maximum(divisor, 1e-12), dtype=torch.float32)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("models", "n"), [(1, 200), (2, 999), (3, 30_000), (5, 2_000)])
def test_pcb_is_the_published_algorithm(models, n, ratio):
    stack, weights = stack_of(models, n), [1.2, 0.5, -1.0, 2.0, 1.0][:models]
    merged = PCB(stack, weights=weights, ratio=ratio)
    torch.testing.assert_close(merged, pcb_reference(stack, weights, ratio), **CLOSE)


def test_pcb_over_a_whole_model_is_pcb_of_its_tensors_laid_end_to_end():
    stack, borders = stack_of(3, 20_000), [0, 5_000, 5_007, 20_000]
    stack[:, :5_000] *= 10
    tensors = [stack[:, a:b] for a, b in pairwise(borders)]
    arguments = {"weights": [1.0, 1.0, 1.0], "ratio": 0.1, "whole_model": True}
    scales = PCB.measured(lambda: tensors, 20_000, arguments)
    parts = [pcb.pcb(tensor, measured=scales, **arguments) for tensor in tensors]
    torch.testing.assert_close(torch.cat(parts), pcb_reference(stack, [1.0] * 3, 0.1), **CLOSE)


def test_pcb_of_a_whole_model_keeps_less_of_its_small_tensors_than_pcb_of_each():
    stack = stack_of(2, 4_000)
    stack[:, 2_000:] *= 0.01
    per_tensor, whole = PCB(stack[:, 2_000:], ratio=0.1), PCB(stack, ratio=0.1)[2_000:]
    assert int(whole.count_nonzero()) < int(per_tensor.count_nonzero()) / 10


@pytest.mark.parametrize("block", [64, 1_000])
def test_pcb_measures_the_same_whatever_the_blocks(block, monkeypatch):
    stack = stack_of(3, 3_001)
    whole = PCB(stack)
    monkeypatch.setattr(method, "BLOCK", block)
    assert torch.equal(PCB(stack), whole)


def test_pcb_clamps_one_in_ten_thousand_outliers():
    stack = stack_of(1, 20_000)
    stack[0, 7], stack[0, 8], stack[0, 9] = 50.0, -40.0, 2.0
    merged = PCB(stack)
    assert merged[[7, 8, 9]].tolist() == [2.0, -2.0, 2.0]


def test_pcb_gives_an_element_to_the_models_that_agree():
    stack = stack_of(3, 1_000)
    stack[:, 0] = torch.tensor([0.4, 0.3, -0.6])
    assert 0.3 <= float(PCB(stack)[0]) <= 0.4


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,)], ids=str)
def test_pcb_keeps_something_of_a_tensor_too_small_for_a_quantile(shape):
    assert PCB(torch.rand(2, *shape) + 0.1).count_nonzero() > 0


def test_a_model_that_changed_nothing_takes_no_share():
    stack = stack_of(2, 500)
    stack[1] = 0
    assert PCB(stack, ratio=1.0).count_nonzero() == 499  # all but the lowest score of the other one


def test_pcb_of_very_many_models_stays_in_range():
    assert PCB(stack_of(120, 300)).isfinite().all()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_paint_goes_from_the_base_to_the_mean_of_the_models(t):
    base = torch.randn(5, 7)
    models = torch.randn(3, 5, 7)
    torch.testing.assert_close(base + PAINT(models - base, t=t), (1 - t) * base + t * models.mean(0))


def test_paint_of_one_model_at_one_is_the_model_bit_for_bit():
    stack = stack_of(1, 100)
    assert torch.equal(PAINT(stack, t=1.0), stack[0])
