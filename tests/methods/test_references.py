"""The methods against slow and obvious references written from the papers, which share nothing with the code."""

import math
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_merge.methods import METHODS, method

WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 0.25, 1.5], [1.0, -0.75, 0.5], [-1.0, -0.5, -2.0], [0.0, 1.0, 0.25]]
DENSITIES = [0.0, 0.01, 0.2, 0.5, 0.7, 1.0]


def deltas(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trim_reference(row, density):
    """Section 4 of arXiv:2306.01708, step 1, on one flattened tensor: the largest magnitudes stay, the first of equal ones."""
    keep = max(1, round(density * len(row))) if density > 0 else 0
    best = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:keep]
    return [value if i in best else 0.0 for i, value in enumerate(row)]


def elect_and_merge_reference(rows, weights, normalize=True):
    """Steps 2 and 3, where a model with weight w stands for w models: one column after the other."""
    merged = []
    for column in zip(*rows, strict=True):
        votes = [w * x for w, x in zip(weights, column, strict=True)]
        sign = 1 if math.fsum(votes) >= 0 else -1
        winners = [(v, abs(w)) for v, w in zip(votes, weights, strict=True) if v * sign > 0]
        total, mass = math.fsum(v for v, _ in winners), math.fsum(w for _, w in winners)
        merged.append(total / mass if normalize and winners else total)
    return merged


def split_mix_64(state, count):
    """The generator as its authors print it (Steele, Lea and Flood, 2014)."""
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def mask_reference(seed, model, tensor, block, density, count):
    """DARE's mask from the documented key: element i stays if its 16 bits are below round(65536 density)."""
    digest = blake2b(f"{seed}\0{model}\0{tensor}\0{block}".encode(), digest_size=8).digest()
    words = split_mix_64(int.from_bytes(digest, "little"), count // 4 + 1)
    sixteen = [(int(word) >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    return [value < round(65536 * density) for value in sixteen[:count]]


def dare_reference(rows, names, seed, tensor, density, block=method.BLOCK):
    dropped = []
    for name, row in zip(names, rows, strict=True):
        mask = [
            keep
            for number in range(math.ceil(len(row) / block))
            for keep in mask_reference(seed, name, tensor, number, density, min(block, len(row) - number * block))
        ]
        rate = round(65536 * density) / 65536
        dropped.append([x / rate if keep else 0.0 for x, keep in zip(row, mask, strict=True)])
    return dropped


def slerp_reference(first, second, t):
    """Shoemake (1985) in float64, the angle from the chords of the unit vectors."""
    a, b = np.asarray(first, np.float64).ravel(), np.asarray(second, np.float64).ravel()
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def assert_is(merged, expected):
    np.testing.assert_allclose(merged.numpy().ravel(), np.asarray(expected).ravel(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_average(weights, normalize):
    stack = deltas(3, 5, 7)
    expected = np.tensordot(np.array(weights), stack.double().numpy(), 1) / (sum(weights) if normalize else 1)
    assert_is(METHODS["linear"](stack, weights=weights, normalize=normalize), expected)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_task_arithmetic_is_the_weighted_sum(weights):
    stack = deltas(3, 5, 7)
    expected = np.tensordot(np.array(weights), stack.double().numpy(), 1)
    assert_is(METHODS["task_arithmetic"](stack, weights=weights), expected)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_the_papers(weights, density, normalize):
    stack = deltas(3, 99)
    trimmed = [trim_reference(row, density) for row in stack.tolist()]
    merged = METHODS["ties"](stack, weights=weights, density=density, normalize=normalize)
    assert_is(merged, elect_and_merge_reference(trimmed, weights, normalize))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    block=st.sampled_from([1, 3, 8, 64]),
)
@example(rows=[[1] * 5], density=0.7, block=64)  # round(3.5) in float64, 3.4999999 in float32
def test_ties_is_the_papers_where_magnitudes_are_equal_and_cross_blocks(rows, density, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "BLOCK", block)
        merged = METHODS["ties"](torch.tensor(rows, dtype=torch.float32), density=density)
    assert_is(merged, elect_and_merge_reference([trim_reference(row, density) for row in rows], [1.0] * len(rows)))


@pytest.mark.parametrize("own", [[0.0, 0.5, 1.0], [0.1, 0.2, 0.9]], ids=str)
def test_ties_trims_each_model_to_its_own_density(own):
    stack = deltas(3, 99)
    trimmed = [trim_reference(row, density) for row, density in zip(stack.tolist(), own, strict=True)]
    assert_is(METHODS["ties"](stack, density=own), elect_and_merge_reference(trimmed, [1.0] * 3))


def test_ties_worked_by_hand():
    stack = torch.tensor([[4.0, -1.0, 3.0, 0.5], [2.0, -3.0, -5.0, 0.1]])
    # Half of four stay: [4, 0, 3, 0] and [0, -3, -5, 0]; the signs elected are +, -, -, +.
    assert METHODS["ties"](stack, density=0.5).tolist() == [4.0, -3.0, -5.0, 0.0]


def test_ties_at_full_density_with_equal_signs_is_the_weighted_mean():
    stack = deltas(3, 99).abs()
    merged = METHODS["ties"](stack, density=1.0, weights=[0.5, 1.0, 2.5])
    assert_is(merged, np.average(stack.double().numpy(), axis=0, weights=[0.5, 1.0, 2.5]))


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_vote_that_is_even_elects_plus(name):
    assert METHODS[name](torch.tensor([[2.0], [-2.0]]), density=1.0).tolist() == [2.0]


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_signs_are_elected_on_weighted_deltas(name):
    stack = torch.tensor([[3.0], [-2.0]])
    assert METHODS[name](stack, density=1.0, weights=[0.5, 1.0]).tolist() == [-2.0]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(99,), (5, 7), (1,)], ids=str)
def test_dare_linear_is_the_papers_with_the_documented_masks(weights, density, shape):
    stack, names = deltas(3, *shape), ("ada", "bob", "cyd")
    merged = METHODS["dare_linear"](stack, weights=weights, density=density, seed=11, models=names, tensor="a.weight")
    dropped = dare_reference(stack.reshape(3, -1).tolist(), names, 11, "a.weight", density)
    assert_is(merged, np.array(weights) @ np.array(dropped))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_ties_is_the_papers_with_the_documented_masks(weights, density, normalize, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 32)
    stack, names = deltas(3, 99), ("ada", "bob", "cyd")
    arguments = {"weights": weights, "density": density, "normalize": normalize}
    merged = METHODS["dare_ties"](stack, seed=11, models=names, tensor="a.weight", **arguments)
    dropped = dare_reference(stack.tolist(), names, 11, "a.weight", density, block=32)
    assert_is(merged, elect_and_merge_reference(dropped, weights, normalize))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_dare_linear_at_full_density_is_task_arithmetic_bit_for_bit(weights):
    stack = deltas(3, 5, 7)
    merged = METHODS["dare_linear"](stack, weights=weights, density=1.0)
    assert torch.equal(merged, METHODS["task_arithmetic"](stack, weights=weights))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_dare_ties_at_full_density_is_ties_bit_for_bit(weights):
    stack = deltas(3, 5, 7)
    arguments = {"weights": weights, "density": 1.0}
    assert torch.equal(METHODS["dare_ties"](stack, **arguments), METHODS["ties"](stack, **arguments))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_mean_of_dare_over_seeds_is_the_delta(density):
    delta, seeds = deltas(1, 64), 2000
    total = sum(METHODS["dare_linear"](delta, density=density, seed=seed).double() for seed in range(seeds))
    error = delta[0].abs().double() * math.sqrt((1 - density) / density / seeds)
    assert ((total / seeds - delta[0]).abs() <= 4 * error).all()


def test_dare_drops_its_share_of_elements():
    kept = int(METHODS["dare_linear"](torch.ones(1, 400_000), density=0.3).count_nonzero())
    assert abs(kept - 120_000) <= 4 * math.sqrt(400_000 * 0.3 * 0.7)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(2,), (99,), (5, 7)], ids=str)
@pytest.mark.parametrize("mix", [0.9, 0.0, -0.5, 2.0], ids=lambda m: f"mix{m}")
def test_slerp_is_shoemakes(t, shape, mix):
    first, second = deltas(2, *shape)
    second = second + mix * first
    assert_is(METHODS["slerp"](torch.stack([first, second]), t=t), slerp_reference(first, second, t))


def test_slerp_measures_the_angle_over_all_blocks(monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 10)
    first, second = deltas(2, 99)
    assert_is(METHODS["slerp"](torch.stack([first, second]), t=0.3), slerp_reference(first, second, 0.3))


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("kind", ["apart", "parallel", "antiparallel", "zero"])
def test_slerp_ends_exactly_at_its_models(end, kind):
    first, second = deltas(2, 99)
    second = {"apart": second, "parallel": 3 * first, "antiparallel": -2 * first, "zero": 0 * first}[kind]
    stack = torch.stack([first, second])
    assert torch.equal(METHODS["slerp"](stack, t=float(end)), stack[end])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(t=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_keeps_the_norm_of_models_of_equal_norm(t, seed):
    stack = torch.nn.functional.normalize(deltas(2, 99, seed=seed), dim=1)
    assert float(METHODS["slerp"](stack, t=t).norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("second", [3.0, -3.0, 0.0], ids=["parallel", "antiparallel", "zero"])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_is_linear_where_there_is_no_angle(second, t):
    first = deltas(1, 99)[0]
    merged = METHODS["slerp"](torch.stack([first, second * first]), t=t)
    assert_is(merged, (1 - t) * first.double().numpy() + t * second * first.double().numpy())


def test_slerp_of_two_zero_tensors_is_zero():
    assert torch.equal(METHODS["slerp"](torch.zeros(2, 5, 7), t=0.3), torch.zeros(5, 7))


def test_slerp_of_almost_parallel_models_is_next_to_both_readings():
    first, noise = deltas(2, 999)
    stack = torch.stack([first, first + 0.03 * noise])  # |cosine| is about 0.9995, where the formula changes
    expected = slerp_reference(*stack, 0.5)
    np.testing.assert_allclose(METHODS["slerp"](stack, t=0.5), expected, rtol=2e-4, atol=1e-7)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def logarithm(at: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The tangent vector at one unit vector that leads to another."""
    flat = to - (at @ to) * at
    length = np.linalg.norm(flat)
    return flat * (np.arccos(np.clip(at @ to, -1, 1)) / length) if length > 1e-14 else np.zeros_like(at)


def exponential(at: np.ndarray, tangent: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(tangent)
    return np.cos(length) * at + np.sin(length) * tangent / length if length > 1e-14 else at


def some_vectors(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=40) + 0.7 * rng.normal(size=(count, 40))) * rng.uniform(0.5, 2, size=(count, 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_karcher_is_where_the_tangents_to_all_directions_cancel(count: int, seed: int) -> None:
    vectors = some_vectors(count, seed)
    merged = METHODS["karcher"](torch.tensor(vectors, dtype=torch.float32), max_iter=100, tol=1e-12).double().numpy()
    directions = [unit(v) for v in vectors]
    assert np.linalg.norm(sum(logarithm(unit(merged), d) for d in directions)) < 1e-5
    assert np.linalg.norm(merged) == pytest.approx(np.mean([np.linalg.norm(v) for v in vectors]), rel=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (3.0, 1.0, 0.0)])
def test_multislerp_is_one_step_in_the_tangent_space_at_the_mean_direction(weights: tuple[float, ...]) -> None:
    vectors, share = some_vectors(3, 0), np.array(weights) / sum(weights)
    start = unit(sum(w * unit(v) for w, v in zip(share, vectors, strict=True)))
    step = sum(w * logarithm(start, unit(v)) for w, v in zip(share, vectors, strict=True))
    expected = exponential(start, step) * (share @ np.linalg.norm(vectors, axis=1))
    merged = METHODS["multislerp"](torch.tensor(vectors, dtype=torch.float32), weights=list(weights))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_multislerp_of_two_models_of_one_norm_is_slerp_where_they_are_equally_far(t: float) -> None:
    first, second = torch.eye(2, 8)
    between = METHODS["slerp"](torch.stack([first, second]), t=0.5)
    merged = METHODS["multislerp"](torch.stack([first, second]), weights=[0.5, 0.5])
    torch.testing.assert_close(merged, between)


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_directions_that_cancel_and_tensors_of_zero_have_a_defined_mean(name: str) -> None:
    vector = torch.randn(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(METHODS[name](torch.stack([vector, -vector])), torch.zeros(30))
    torch.testing.assert_close(METHODS[name](torch.stack([vector, torch.zeros(30)])), vector)
    assert torch.equal(METHODS[name](torch.zeros(3, 30)), torch.zeros(30))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_model_stock_is_the_paper_s_ratio_of_the_average(count: int) -> None:
    deltas = some_vectors(count, 1)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosine = np.mean([unit(deltas[i]) @ unit(deltas[j]) for i, j in pairs])
    ratio = count * cosine / (1 + (count - 1) * cosine)
    merged = METHODS["model_stock"](torch.tensor(deltas, dtype=torch.float32))
    np.testing.assert_allclose(merged.numpy(), ratio * deltas.mean(0), rtol=1e-5, atol=1e-6)


def test_model_stock_of_models_at_right_angles_or_further_apart_is_the_base() -> None:
    assert torch.equal(METHODS["model_stock"](torch.eye(3, 9)), torch.zeros(9))
    assert torch.equal(METHODS["model_stock"](torch.stack([torch.ones(9), -torch.ones(9)])), torch.zeros(9))


def test_magmax_takes_each_element_from_the_model_that_changed_it_most() -> None:
    deltas = torch.tensor([[1.0, -3.0, 0.0, 2.0], [-2.0, 1.0, 0.0, -2.0], [0.5, 2.0, 0.0, 1.0]])
    assert METHODS["magmax"](deltas).tolist() == [-2.0, -3.0, 0.0, 2.0]


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("agreement", [0, 1, 2, 3])
def test_consensus_keeps_what_enough_tall_masks_keep(threshold: float, agreement: int) -> None:
    deltas, weights = some_vectors(3, 2), (0.5, 1.0, 0.7)
    expected = []
    for column in deltas.T:
        total = sum(w * d for w, d in zip(weights, column, strict=True))
        votes = sum(abs(d) > threshold * abs(total - d) for d in column)
        expected.append(total if votes >= agreement else 0.0)
    merged = METHODS["consensus"](torch.tensor(deltas), weights=list(weights), threshold=threshold, agreement=agreement)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)
    assert agreement < 3 or 0 < np.count_nonzero(expected) < len(expected)
