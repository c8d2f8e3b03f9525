import pytest
import torch

from hf_merge.tensors.ranks import band, bands, magprune, middle, prune_in_norm
from hf_merge.tensors.rng import STEPS, Draws

DRAWS = Draws(0, ("ada", "bob", "cyd"), "w", 0)


@pytest.mark.parametrize(
    ("density", "gamma", "n", "expected"),
    [(0.5, 0.1, 10, (5, 1)), (0.9, 0.2, 10, (9, 1)), (1, 0.5, 10, (10, 0)), (0, 0.2, 10, (0, 2)), (0.01, 0.01, 10, (1, 0))],
)
def test_a_band_keeps_its_density_and_skips_what_is_left(density, gamma, n, expected):
    assert band(density, gamma, n) == expected


def test_the_middle_of_each_row_stays_the_first_of_equals_being_the_largest():
    rows = torch.tensor([[[4.0, -3, 2, 1], [1, 1, -1, 1], [0, 0, 0, 5]]]).reshape(1, -1)
    assert middle(rows, 0.5, 0.25, 4).reshape(3, 4).tolist() == [[0, -3, 2, 0], [0, 1, -1, 0], [0, 0, 0, 0]]


def test_the_middle_takes_a_density_and_a_gamma_of_each_model():
    rows = torch.tensor([[4.0, 3, 2, 1]]).repeat(3, 1)
    assert middle(rows, torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0.5, 0.5, 0.5]), 4).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 2, 0],
        [4, 3, 2, 1],
    ]


@pytest.mark.parametrize("block", [1, 7, 40])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.2), (0.5, 0.0), (1.0, 0.3), (0.0, 0.2)])
def test_the_band_of_a_whole_tensor_is_the_middle_of_one_row(block, density, gamma):
    stack = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16().float().round(decimals=1)
    starts = range(0, 40, block)
    found = bands(lambda: (stack[:, s : s + block] for s in starts), density, gamma, 40)
    parts = torch.cat([found.of(stack[:, s : s + block], s) for s in starts], dim=1)
    assert torch.equal(parts, middle(stack, density, gamma, 40))


def test_a_large_magnitude_stays_where_a_small_one_goes():
    draws = DRAWS.uniform(0, 2000)
    kept = magprune(torch.arange(1.0, 2001.0)[None], 0.5, 0.5, 2000, DRAWS, rescale=False)[0] != 0
    chances = (torch.arange(2000, dtype=torch.float64) / 1999 * STEPS).round().clamp_min(1)
    assert torch.equal(kept, draws < chances)


def test_of_equal_magnitudes_the_first_has_the_greatest_chance():
    draws, chances = DRAWS.uniform(0, 500), torch.linspace(0.9, 0.1, 500, dtype=torch.float64) * STEPS
    kept = magprune(torch.ones(1, 500), 0.5, 0.4, 500, DRAWS)[0] != 0
    assert torch.equal(kept, draws < chances.round())


@pytest.mark.parametrize("density", [0.05, 0.95])
def test_a_window_that_does_not_fit_shrinks_and_keeps_the_density(density):
    fits = magprune(torch.ones(1, 500), density, 0.05, 500, DRAWS)
    assert torch.equal(magprune(torch.ones(1, 500), density, 0.4, 500, DRAWS), fits)


@pytest.mark.parametrize(("density", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_at_the_ends_nothing_or_everything_stays(density, expected):
    assert torch.equal(magprune(torch.ones(2, 99), density, 0.3, 9, DRAWS), torch.full((2, 99), expected))


def test_in_rows_of_one_element_the_chance_is_the_density():
    kept = magprune(torch.ones(1, 4000), 0.25, 0.2, 1, DRAWS)
    assert kept.unique().tolist() == [0.0, 4.0]
    assert torch.equal(kept[0] != 0, DRAWS.uniform(0, 4000) < STEPS // 4)


@pytest.mark.parametrize("digits", [torch.bfloat16, torch.float32], ids=str)
def test_magnitudes_of_few_and_of_many_digits_are_ranked_alike(digits):
    rows = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).to(digits).float()
    kept = magprune(rows.reshape(1, -1), 0.5, 0.5, 100, DRAWS, rescale=False).reshape(3, 100) != 0
    draws = DRAWS.uniform(0, 300).reshape(3, 100)
    for row, mask, drawn in zip(rows.abs().tolist(), kept.tolist(), draws.tolist(), strict=True):
        order = sorted(range(100), key=lambda i: (-row[i], i))
        assert mask == [drawn[i] < max(1, round((99 - order.index(i)) / 99 * STEPS)) for i in range(100)]


NORMAL = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
ROWS = {
    "many digits": NORMAL,
    "few digits": NORMAL.bfloat16().float(),
    "few values": NORMAL.round(),
    "signs": NORMAL.sign(),
    "mostly zero": NORMAL.where(NORMAL > 1.5, 0),
    "many orders of magnitude": NORMAL * torch.exp(20 * NORMAL.flip(1)),
    "almost equal": 1 + 1e-6 * NORMAL,
    "a short row": NORMAL[:, :3],
}


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("epsilon", [0.02, 0.4])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_row_is_pruned_by_the_ranks_in_it(rows, epsilon, rescale):
    n = rows.shape[1]
    order = rows.abs().sort(dim=1, descending=True, stable=True).indices
    steps = ((0.5 + epsilon - 2 * epsilon * torch.arange(n, dtype=torch.float64) / (n - 1)) * STEPS).round()
    chances = torch.empty(rows.shape, dtype=torch.float64).scatter_(1, order, steps.expand(rows.shape))
    stays = DRAWS.uniform(0, rows.numel()).reshape(rows.shape) < chances
    found = magprune(rows.reshape(1, -1), 0.5, epsilon, n, DRAWS, rescale).reshape(rows.shape)
    torch.testing.assert_close(found, (rows * stays * (STEPS / chances if rescale else 1)).float(), rtol=1e-6, atol=0)


def test_pruning_in_norm_gives_back_the_norms_of_the_whole_tensor():
    stack = torch.stack([NORMAL, 3 * NORMAL.flip(0), 0 * NORMAL]).reshape(3, -1)
    blocks, draws = stack.split(20 * 70, dim=1), [Draws(0, DRAWS.models, "w", number) for number in range(2)]
    pruning = prune_in_norm(lambda: blocks, 0.5, 0.1, 70, draws.__getitem__)
    parts = [pruning.of(block, number) for number, block in enumerate(blocks)]
    torch.testing.assert_close(torch.cat(parts, 1).abs().sum(1), stack.abs().sum(1))
    for part, block, rng in zip(parts, blocks, draws, strict=True):
        assert torch.equal(part != 0, magprune(block, 0.5, 0.1, 70, rng, rescale=False) != 0)
