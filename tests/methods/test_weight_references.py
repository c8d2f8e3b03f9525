"""NuSLERP, NearSwap, Arcee Fusion, passthrough and the switches of the spherical methods against slow references."""

import math

import numpy as np
import pytest
import torch

from hf_merge.methods import METHODS, method


def pair(*shape, seed=0, near=1.0):
    first, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.stack([first, first + near * noise])


def slerp_reference(first, second, t):
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle) if angle > 1e-6 else (1 - t) * a + t * b


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [0.0, 2.0]], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (20,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("block", [8, 10**6])
@pytest.mark.parametrize("vectors", ["whole", "last", "first"])
def test_nuslerp_interpolates_whole_tensors_rows_or_columns(weights, shape, block, vectors, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    stack, t = pair(*shape), weights[1] / sum(weights)
    flat = stack.numpy().reshape(2, *{"whole": (1, -1), "last": (-1, shape[-1]), "first": (shape[0], -1)}[vectors])
    flat = flat.transpose(0, 2, 1) if vectors == "first" else flat
    expected = np.stack([slerp_reference(a, b, t) for a, b in zip(*flat, strict=True)])
    expected = (expected.T if vectors == "first" else expected).reshape(shape)
    merged = METHODS["nuslerp"](
        stack, weights=weights, nuslerp_flatten=vectors == "whole", nuslerp_row_wise=vectors in ("first", "whole")
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [True, False])
def test_nuslerp_of_parallel_vectors_is_linear_and_a_zero_stands_at_right_angles(rows):
    first = torch.tensor([3.0, 4.0])
    flatten = {"nuslerp_flatten": not rows, "weights": [1.0, 3.0]}
    torch.testing.assert_close(METHODS["nuslerp"](torch.stack([first, 2 * first]), **flatten), 1.75 * first)
    torch.testing.assert_close(METHODS["nuslerp"](torch.stack([first, -2 * first]), **flatten), -1.25 * first)
    half = math.sin(math.pi / 8) * first
    torch.testing.assert_close(METHODS["nuslerp"](torch.stack([first, 0 * first]), **flatten), half)


def test_nuslerp_with_weights_that_cancel_stands_in_the_middle():
    stack = pair(9)
    assert torch.equal(METHODS["nuslerp"](stack, weights=[1.0, -1.0]), METHODS["nuslerp"](stack))


def test_nearswap_moves_each_element_by_at_most_t():
    stack = torch.tensor([[0.0, 0, 0, 0, 1], [1.0, -2, 0.05, -0.01, 1.5]])
    torch.testing.assert_close(METHODS["nearswap"](stack, t=0.1), torch.tensor([0.1, -0.1, 0.05, -0.01, 1.1]))
    assert torch.equal(METHODS["nearswap"](stack, t=9.0), stack[1])
    assert torch.equal(METHODS["nearswap"](stack, t=0.0), stack[0])


def fusion_reference(stack):
    base, other = stack.double().numpy().reshape(2, -1, stack.shape[-1])
    importance = np.zeros_like(base)
    for i, (a, b) in enumerate(zip(base, other, strict=True)):
        q, p = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        importance[i] = np.abs(b - a) * (p * np.log(p / q)).sum()
    first, middle, third = (np.sort(importance.ravel())[math.floor(q * (importance.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= (middle + 1.5 * (third - first)) * (1 - 1e-6), other, base)


@pytest.mark.parametrize("shape", [(6, 9), (40,), (3, 4, 5), (5, 2), (30, 33)], ids=str)
@pytest.mark.parametrize("block", [8, 10**6])
def test_arcee_fusion_takes_the_important_changes(shape, block, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    stack = pair(*shape, near=0.1)
    merged = METHODS["arcee_fusion"](stack)
    assert torch.equal(merged, torch.from_numpy(fusion_reference(stack)).float().reshape(shape))
    assert shape == (5, 2) or not torch.equal(merged, stack[0])


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_passthrough_is_the_model_times_its_scale(scale):
    stack = pair(5, 7)[:1]
    assert torch.equal(METHODS["passthrough"](stack, scale=[scale]), scale * stack[0])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.3]], ids=str)
def test_multislerp_without_steps_has_the_mean_direction_and_the_mean_norm(weights):
    stack = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [2.0], [0.5]])
    vectors, share = stack.double().numpy(), np.array(weights) / sum(weights)
    norms = np.linalg.norm(vectors, axis=1)
    direction = share @ (vectors / norms[:, None])
    expected = direction / np.linalg.norm(direction) * (share @ norms)
    np.testing.assert_allclose(METHODS["multislerp"](stack, weights=weights, steps=0), expected, rtol=1e-5, atol=1e-6)


def test_multislerp_takes_weights_as_they_are_if_asked():
    stack, weights = pair(40), [0.5, 2.0]
    whole = METHODS["multislerp"](stack, weights=weights, normalize_weights=False)
    torch.testing.assert_close(whole, 2.5 * METHODS["multislerp"](stack, weights=weights))


def ratio_reference(deltas):
    count = len(deltas)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for i, a in enumerate(deltas) for b in deltas[:i]]
    mean = float(np.mean(cosines))
    return count * mean / (1 + (count - 1) * mean)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 9), (20,), (3, 4, 5)], ids=str)
def test_model_stock_can_have_a_ratio_for_each_row(count, shape):
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(shape, generator=generator) + torch.randn(count, *shape, generator=generator)
    rows = stack.double().numpy().reshape(count, -1, shape[-1])
    expected = [ratio_reference(rows[:, i]) * rows[:, i].mean(0) for i in range(rows.shape[1])]
    merged = METHODS["model_stock"](stack, filter_wise=True, clamp=False)
    np.testing.assert_allclose(merged.numpy().reshape(-1, shape[-1]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [True, False])
def test_model_stock_without_a_clamp_goes_beyond_the_base(filter_wise):
    stack = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    expected = ratio_reference(stack.double().numpy())
    assert expected < 0
    merged = METHODS["model_stock"](stack, filter_wise=filter_wise, clamp=False)
    torch.testing.assert_close(merged, expected * stack.mean(0))
    assert torch.equal(METHODS["model_stock"](stack, filter_wise=filter_wise), torch.zeros(2))
