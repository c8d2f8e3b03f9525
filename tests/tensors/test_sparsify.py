import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.tensors import sparsify
from hf_merge.tensors.rng import Draws
from hf_merge.tensors.sparsify import cutoffs, drop, kept, per_model, trim

SHAPES = [(), (0,), (1,), (1, 1), (3, 1), (64,), (99,), (5, 7)]
TINY = float(torch.finfo(torch.float32).smallest_normal) / 4


@pytest.fixture(autouse=True, scope="module", params=[(0.02, 1 << 20), (0.0, 1 << 20), (0.0, 3), (0.02, -1)], ids=str)
def windows(request):
    """Cuts that are guessed in a wide or a narrow window, in one that may hold little, and not at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify, "MARGIN", request.param[0])
        patch.setattr(sparsify, "GATHERED", request.param[1])
        yield request.param


def trimmed(rows, density, block=10**9, start_at=0):
    """`rows` cut with thresholds and trims that see `block` elements at a time."""
    stack = torch.as_tensor(rows, dtype=torch.float32)
    starts = range(0, stack.shape[1], block)
    cut = cutoffs(lambda: (stack[:, s : s + block] for s in starts), density, stack.shape[1])
    return torch.cat([stack[:, :0], *(trim(stack[:, s : s + block], cut, s) for s in starts)], dim=1)


@pytest.mark.parametrize(
    ("density", "n", "count"),
    [(0, 10, 0), (0.5, 0, 0), (0.01, 1, 1), (0.01, 64, 1), (0.5, 99, 50), (0.5, 5, 2), (0.7, 5, 4), (0.999, 3, 3), (1, 7, 7)],
)
def test_a_density_keeps_a_rounded_count_and_at_least_one(density, n, count):
    assert kept(density, n) == count


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trim_keeps_exactly_that_many(shape, density, dtype):
    n = math.prod(shape)
    row = (torch.randn(n, generator=torch.Generator().manual_seed(0)).abs() + 0.1).to(dtype).float()
    assert int(trimmed([row.tolist()], [density]).count_nonzero()) == kept(density, n)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.999, 1.0])
def test_of_equal_magnitudes_the_lowest_indices_stay_across_blocks(block, density):
    row = torch.full((1, 1000), -0.5)
    row[0, 900:] = 0.25
    few = kept(density, 1000)
    assert trimmed(row, [density], block)[0].nonzero()[:, 0].tolist() == list(range(few))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    row=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1 + 2**-23, -(1 + 2**-22), 2.0, 1e-42, -1e-42, TINY, 3e38]),
        min_size=1,
        max_size=60,
    ),
    density=st.floats(0, 1),
    block=st.integers(1, 61),
)
def test_trim_keeps_the_largest_magnitudes_in_order_of_index(row, density, block):
    best = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[: kept(density, len(row))]
    expected = torch.tensor([x if i in best else 0.0 for i, x in enumerate(row)])
    assert torch.equal(trimmed([row], [density], block)[0], expected)


def test_every_model_has_its_own_cutoff():
    rows = [[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    assert trimmed(rows, [0.25, 0.5, 0.75, 0.0], block=3).tolist() == [[0, 0, 0, 4], [1, 1, 0, 0], [4, 3, 2, 0], [0, 0, 0, 0]]


def test_magnitudes_that_share_their_upper_bits_are_told_apart():
    row = torch.arange(0x3F800000, 0x3F800000 + 5000, dtype=torch.int32).view(torch.float32)
    assert torch.equal(trimmed(row[None], [0.1], block=999)[0], row * (torch.arange(5000) >= 4500))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.97])
def test_a_first_block_unlike_the_others_does_not_matter(scale, density):
    row = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    row[:2000] *= scale
    best = row.abs().sort(descending=True, stable=True).indices[: kept(density, 20_000)]
    expected = torch.zeros(20_000).index_copy(0, best, row[best])
    assert torch.equal(trimmed(row[None], [density], block=2000)[0], expected)


def test_a_cut_right_above_the_first_guess_is_found():
    row = [1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 0.5]
    assert trimmed([row], [0.5], block=4).tolist() == [[0, 0, 0, 4, 9, 9, 9, 0]]


def passes_over(stack, density, block):
    """How often the blocks of `stack` are read to cut it."""
    reads = []

    def blocks():
        for start in range(0, stack.shape[1], block):
            reads.append(start)
            yield stack[:, start : start + block]

    cutoffs(blocks, density, stack.shape[1])
    return len(reads) * block / stack.shape[1]


def test_like_blocks_are_read_once(windows):
    stack = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert passes_over(stack, [0.2, 0.7], 10_000) == 1 or windows != (0.02, 1 << 20)


def test_no_blocks_are_read_four_times():
    stack = torch.ones(2, 10_000)
    stack[:, :5000] = 0.5
    assert passes_over(stack, [0.2, 0.7], 1000) <= 4


def test_nothing_is_read_at_density_zero():
    assert passes_over(torch.ones(2, 100), [0.0, 0.0], 10) == 0


def test_drop_keeps_and_divides_by_the_rounded_density():
    ones = drop(torch.ones(1, 4096), 0.3, Draws(0, ("ada",), "w", 0)).unique().tolist()
    assert ones == pytest.approx([0.0, sparsify.STEPS / round(0.3 * sparsify.STEPS)])


@pytest.mark.parametrize(("density", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_drop_at_the_ends_keeps_nothing_or_everything(density, expected):
    assert torch.equal(drop(torch.ones(2, 999), density, Draws(0, ("a", "b"), "w", 0)), torch.full((2, 999), expected))


def test_drop_at_a_density_below_its_resolution_keeps_its_expectation():
    draws, n = Draws(0, ("ada",), "w", 0), 1 << 20
    dropped = drop(torch.ones(1, n), 1e-9, draws)[0]
    assert torch.equal(dropped, sparsify.STEPS * (draws.uniform(0, n) == 0).float())
    assert 0 < int(dropped.count_nonzero()) < 32


def test_drop_takes_a_density_of_each_model():
    dropped = drop(torch.ones(3, 10_000), [0.0, 0.25, 1.0], Draws(0, ("a", "b", "c"), "w", 0))
    assert dropped.count_nonzero(dim=1).tolist() == [0, pytest.approx(2500, abs=4 * 44), 10_000]


@pytest.mark.parametrize("value", [0.5, [0.5, 0.5, 0.5], torch.tensor([0.5, 0.5, 0.5])], ids=str)
def test_a_number_or_one_for_each_model_becomes_a_column(value):
    assert per_model(value, torch.ones(3, 7)).tolist() == [[0.5]] * 3


def test_another_number_of_values_than_models_is_refused():
    with pytest.raises(RuntimeError):
        per_model([0.5, 0.5], torch.ones(3, 7))
