"""Second readings of delta methods, DELLA, Breadcrumbs, SCE and RAM against slow references that share no code with them."""

import math
from statistics import pvariance

import numpy as np
import pytest
import torch

from hf_merge.methods import METHODS, method
from hf_merge.tensors.rng import Draws

NAMES = ("ada", "bob", "cyd")
WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 0.25, 1.5], [1.0, -0.75, 0.5]]
SHAPES = [(6, 9), (40,), (3, 4, 5), (7, 1)]

every_weight = pytest.mark.parametrize("weights", WEIGHTS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def deltas(*shape, seed=0, step=0.0):
    """Three deltas; with a `step`, on a grid that has many equal magnitudes."""
    found = 0.1 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    return (found / step).round() * step if step else found


def rows_of(tensor):
    return tensor.reshape(-1, tensor.shape[-1]).tolist()


def largest_first(row):
    return sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))


def assert_is(merged, expected):
    np.testing.assert_allclose(merged.numpy().ravel(), np.asarray(expected).ravel(), rtol=2e-6, atol=1e-7)


def summed(kept, weights):
    return [math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*kept, strict=True)]


def elected(kept, weights, normalize=True, votes=None):
    merged = []
    for column in zip(*kept, strict=True):
        sign = 1 if math.fsum(v * x for v, x in zip(votes or weights, column, strict=True)) >= 0 else -1
        signed = [(w, x) for w, x, v in zip(weights, column, votes or weights, strict=True) if v * x * sign > 0]
        total, mass = math.fsum(w * x for w, x in signed), math.fsum(abs(w) for w, _ in signed)
        merged.append(total / mass if normalize and mass else total)
    return merged


def with_l1_of(kept, whole):
    return [[x * math.fsum(map(abs, d)) / math.fsum(map(abs, k)) for x in k] for k, d in zip(kept, whole, strict=True)]


def magprune_reference(stack, density, epsilon, rescale, seed=3, tensor="w"):
    """The masks of the documented draws, row by row; the largest magnitude has the greatest chance."""
    kept = []
    for model, delta in enumerate(stack):
        uniform = Draws(seed, NAMES, tensor, 0).uniform(model, delta.numel()).tolist()
        found, n = [], delta.shape[-1]
        for number, row in enumerate(rows_of(delta)):
            order = largest_first(row)[::-1]
            for i, x in enumerate(row):
                chance = density - epsilon + 2 * epsilon * order.index(i) / (n - 1) if n > 1 else density
                steps = round(chance * 65536)
                found.append(x * (65536 / steps if rescale else 1) if uniform[number * n + i] < steps else 0.0)
        kept.append(found)
    return kept


@every_weight
@every_shape
@pytest.mark.parametrize("step", [0.0, 0.05])
@pytest.mark.parametrize("rescale", [True, False])
def test_della_is_the_papers_with_the_documented_masks(weights, shape, step, rescale):
    stack = deltas(*shape, step=step)
    given = {"density": 0.6, "epsilon": 0.2, "rescale": rescale, "weights": weights, "seed": 3, "models": NAMES, "tensor": "w"}
    kept = magprune_reference(stack, 0.6, 0.2, rescale)
    assert_is(METHODS["della_linear"](stack, **given), summed(kept, weights))
    assert_is(METHODS["della"](stack, **given), elected(kept, weights))


@pytest.mark.parametrize("name", ["della", "della_linear", "dare_linear", "dare_ties"])
def test_matching_l1_keeps_each_deltas_norm_whatever_stays(name, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 16)
    stack = deltas(20, 8)
    merged = METHODS[name](stack[:1], density=0.5, match_l1=True)
    assert float(merged.abs().sum()) == pytest.approx(float(stack[0].abs().sum()), rel=1e-6)
    factors = (merged / stack[0])[merged != 0]
    assert float(factors.max() - factors.min()) < 1e-5 * float(factors.max())


@every_weight
@pytest.mark.parametrize(("name", "normalize"), [("della", True), ("della", False), ("della_linear", False)])
def test_della_with_matched_l1_is_the_masked_delta_with_the_deltas_norm(weights, name, normalize):
    stack = deltas(6, 9)
    given = {"density": 0.5, "epsilon": 0.1, "match_l1": True, "weights": weights, "seed": 3, "models": NAMES, "tensor": "w"}
    kept = with_l1_of(magprune_reference(stack, 0.5, 0.1, False), stack.reshape(3, -1).tolist())
    expected = elected(kept, weights, normalize) if name == "della" else summed(kept, weights)
    assert_is(METHODS[name](stack, normalize=normalize, **given), expected)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_stays_without_rescale_is_the_delta(name):
    stack = deltas(20, 30)[:1]
    merged = METHODS[name](stack, density=0.5, rescale=False)
    kept = merged != 0
    assert 200 < int(kept.sum()) < 400
    torch.testing.assert_close(merged[kept], stack[0][kept], rtol=3e-7, atol=0)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_the_mean_of_della_over_seeds_is_the_delta(density):
    delta, seeds = deltas(1, 64)[:1], 2000
    total = sum(METHODS["della_linear"](delta, density=density, epsilon=0.2, seed=seed).double() for seed in range(seeds))
    error = delta[0].abs().double() * math.sqrt((1.2 - density) / (density - 0.2) / seeds)
    assert ((total / seeds - delta[0]).abs() <= 4 * error).all()


def test_the_masks_of_della_keep_large_changes_more_often():
    stack = torch.arange(1.0, 2001.0).repeat(1, 100, 1)
    kept = (METHODS["della_linear"](stack, density=0.5, epsilon=0.3) != 0).double().mean(0)
    expected = torch.linspace(0.2, 0.8, 2000, dtype=torch.float64)
    assert float((kept.reshape(20, 100).mean(1) - expected.reshape(20, 100).mean(1)).abs().max()) < 0.02


def middle_reference(row, density, gamma):
    n = len(row)
    count = max(1, round(density * n)) if density > 0 else 0
    skip = min(math.floor(gamma * n), n - count)
    keep = set(largest_first(row)[skip : skip + count])
    return [x if i in keep else 0.0 for i, x in enumerate(row)]


@every_weight
@every_shape
@pytest.mark.parametrize("step", [0.0, 0.05])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.25), (0.5, 0.0), (0.9, 0.2), (1.0, 0.5), (0.0, 0.1)])
@pytest.mark.parametrize("row_wise", [True, False])
def test_breadcrumbs_keeps_the_middle_magnitudes(weights, shape, step, density, gamma, row_wise):
    stack = deltas(*shape, step=step)
    rows = [rows_of(delta) if row_wise else [delta.flatten().tolist()] for delta in stack]
    kept = [[x for row in model for x in middle_reference(row, density, gamma)] for model in rows]
    given = {"density": density, "gamma": gamma, "row_wise": row_wise, "weights": weights}
    assert_is(METHODS["breadcrumbs"](stack, **given), summed(kept, weights))
    assert_is(METHODS["breadcrumbs_ties"](stack, **given), elected(kept, weights))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_matching_l1_of_a_trim_keeps_each_deltas_norm(name, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 16)
    stack = deltas(99)[:1]
    plain = METHODS[name](stack, density=0.3, normalize=False)
    factor = float(stack[0].abs().sum() / plain.abs().sum())
    torch.testing.assert_close(METHODS[name](stack, density=0.3, normalize=False, match_l1=True), factor * plain)


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"])
def test_normalize_divides_by_the_sum_of_weights_unless_it_is_zero(name):
    stack = deltas(6, 9)
    given = {"weights": [0.5, 1.5, 2.0], "seed": 1}
    plain = METHODS[name](stack, **given)
    torch.testing.assert_close(METHODS[name](stack, normalize=True, **given), plain / 4)
    given["weights"] = [1.0, -0.5, -0.5]
    assert torch.equal(METHODS[name](stack, normalize=True, **given), METHODS[name](stack, **given))


@every_weight
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_with_the_papers_election_counts_every_models_vote_alike(weights, density):
    stack = deltas(99)
    kept = [middle_reference(row, density, 0.0) for row in stack.tolist()]
    merged = METHODS["ties"](stack, weights=weights, density=density, weighted_election=False)
    assert_is(merged, elected(kept, weights, votes=[1.0] * 3))


def test_the_papers_election_worked_by_hand():
    stack = torch.tensor([[3.0], [-2.0]])
    assert METHODS["ties"](stack, density=1.0, weights=[0.5, 1.0], weighted_election=False).tolist() == [3.0]


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_ties_can_trim_the_whole_model_as_one_tensor(density):
    ties, small, large = METHODS["ties"], deltas(5, 7), 10 * deltas(99, seed=1)
    arguments = {"density": density, "whole_model": True}
    blocks = [small.reshape(3, -1), large[:, :60], large[:, 60:]]
    measured = ties.measured(lambda: iter(blocks), 35 + 99, arguments)
    starts = [0, 35, 95]
    merged = [
        ties.merge_block(b, arguments, rng=Draws(0, NAMES, "w", 0), measured=measured, start=s)
        for b, s in zip(blocks, starts, strict=True)
    ]
    expected = [middle_reference(row, density, 0.0) for row in torch.cat(blocks, dim=1).tolist()]
    assert_is(torch.cat(merged), elected(expected, [1.0] * 3))


def sce_reference(stack, fraction):
    models = stack.reshape(3, -1).double().tolist()
    spread = [pvariance(column) if len(set(column)) > 1 else 0.0 for column in zip(*models, strict=True)]
    count = max(1, round(fraction * sum(s > 0 for s in spread)))
    keep = set(range(len(spread))) if fraction == 1 else set(largest_first(spread)[:count])
    kept = [[x if i in keep else 0.0 for i, x in enumerate(model)] for model in models]
    sizes = [math.fsum(x * x for x in model) for model in kept]
    return elected(kept, [size / math.fsum(sizes) for size in sizes], votes=[1.0] * 3)


@every_shape
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("block", [4, 10**6])
def test_sce_selects_calculates_and_erases(shape, fraction, block, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    stack = deltas(*shape) * torch.tensor([0.5, 1.0, 2.0]).reshape(3, *[1] * len(shape))
    expected = sce_reference(stack, fraction) if fraction else [0.0] * stack[0].numel()
    assert_is(METHODS["sce"](stack, select_topk=fraction), expected)


def test_sce_weighs_small_deltas_alike_only_if_asked():
    stack = 1e-4 * torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    torch.testing.assert_close(METHODS["sce"](stack), torch.full((2,), 2.8e-4))
    torch.testing.assert_close(METHODS["sce"](stack, uniform_fallback=True), torch.full((2,), 2e-4))
    torch.testing.assert_close(METHODS["sce"](1e3 * stack, uniform_fallback=True), torch.full((2,), 0.28))


RAM = torch.tensor([[1.0, 2, 0, 0, -3, 1e-6], [1.0, 0, 4, 0, 5, 0], [1.0, 0, 0, 0, 0, 2e-5]])


def test_ram_averages_what_models_share_and_keeps_what_one_has():
    torch.testing.assert_close(METHODS["ram"](RAM), torch.tensor([1.0, 2, 4, 0, 1, 2e-5]))


@pytest.mark.parametrize(("alpha", "factors"), [(9.0, (3.0, 3.0, 2.0)), (1.5, (2.5, 2.5, 2.0))])
@pytest.mark.parametrize("block", [1, 6])
def test_ram_plus_enlarges_what_one_model_has_by_how_much_it_shares(alpha, factors, block, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    # The first model shares two elements and has one alone, and so does the second; the third shares one and has one.
    merged = METHODS["ramplus_tl"](RAM, r=1.0, alpha=alpha)
    torch.testing.assert_close(merged, torch.tensor([1.0, 2 * factors[0], 4 * factors[1], 0, 1, 2e-5 * factors[2]]))


def test_ram_leaves_out_changes_up_to_epsilon():
    assert METHODS["ram"](torch.tensor([[0.5, 0.25], [0.5, 1.0]]), epsilon=0.5).tolist() == [0.0, 1.0]
