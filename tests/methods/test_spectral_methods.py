"""TSV-Merge, Iso-C and WUDI-Merging against what their papers say, in numpy with full SVDs."""

import numpy as np
import pytest
import torch

from hf_merge.methods import METHODS

TSV, ISO_C, WUDI = METHODS["tsv"], METHODS["iso_c"], METHODS["wudi"]
SPECTRAL = [pytest.param(m, id=m.name) for m in (TSV, ISO_C, WUDI)]
SHAPES = [(24, 24), (40, 9), (9, 40), (12, 3, 2, 2)]
WEIGHTS = [1.0, 0.5, -2.0]

every_spectral = pytest.mark.parametrize("merge", SPECTRAL)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def stack_of(models, shape, seed=0):
    return 1e-2 * torch.randn(models, *shape, generator=torch.Generator().manual_seed(seed))


def low_rank(models, rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(models, rows, rank, generator=generator) @ torch.randn(models, rank, columns, generator=generator)


def matrices(stack, weights):
    shape = stack.shape
    return [w * m for w, m in zip(weights, stack.double().numpy().reshape(shape[0], shape[1], -1), strict=True)]


def procrustes(columns):
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


def tsv_reference(stack, weights):
    """arXiv:2412.00081: truncate to 1/K of the rank, concatenate, orthogonalize, reconstruct."""
    lefts, sizes, rights = [], [], []
    for matrix in matrices(stack, weights):
        left, size, right = np.linalg.svd(matrix, full_matrices=False)
        rank = len(size) // len(stack)
        lefts.append(left[:, :rank])
        sizes.append(size[:rank])
        rights.append(right[:rank])
    left, right = procrustes(np.concatenate(lefts, 1)), procrustes(np.concatenate(rights, 0))
    return left @ np.diag(np.concatenate(sizes)) @ right


def iso_c_reference(stack, weights):
    """arXiv:2502.04959: the sum's singular values replaced by their mean."""
    left, size, right = np.linalg.svd(sum(matrices(stack, weights)), full_matrices=False)
    return left @ np.diag(np.full_like(size, size.mean())) @ right


def wudi_loss(merged, deltas):
    """The objective of arXiv:2503.08099 for one linear layer."""
    return sum(np.linalg.norm((merged - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2 for d in deltas)


def wudi_reference(stack, weights):
    """Its minimum nearest to the sum, by least squares: merged dᵀ / |d| = d dᵀ / |d| for every model at once."""
    deltas = matrices(stack, weights)
    left = np.concatenate([d / np.linalg.norm(d) for d in deltas], 0)
    right = np.concatenate([d @ d.T / np.linalg.norm(d) for d in deltas], 1)
    total = sum(deltas)
    return total + np.linalg.lstsq(left, (right - total @ left.T).T, rcond=1e-5)[0].T


def same(merged, reference, **tolerance):
    torch.testing.assert_close(merged.double(), torch.tensor(reference).reshape(merged.shape), **tolerance)


@every_shape
@pytest.mark.parametrize("models", [2, 3])
def test_tsv_is_the_papers_algorithm(shape, models):
    stack, weights = stack_of(models, shape), WEIGHTS[:models]
    same(TSV(stack, weights=weights), tsv_reference(stack, weights), rtol=1e-5, atol=1e-8)


@every_shape
@pytest.mark.parametrize("models", [1, 3])
def test_iso_c_is_the_papers_algorithm(shape, models):
    stack, weights = stack_of(models, shape), WEIGHTS[:models]
    same(ISO_C(stack, weights=weights), iso_c_reference(stack, weights), rtol=1e-5, atol=1e-8)


@every_shape
@pytest.mark.parametrize("models", [2, 3])
def test_wudi_is_the_least_squares_solution(shape, models):
    stack, weights = stack_of(models, shape), WEIGHTS[:models]
    same(WUDI(stack, weights=weights, ridge=1e-9), wudi_reference(stack, weights), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_wudi_leaves_the_sum_where_its_loss_says_nothing(ridge):
    stack = low_rank(2, 20, 50, 3)
    same(WUDI(stack, ridge=ridge), wudi_reference(stack, [1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_no_step_away_from_wudi_lowers_its_loss():
    stack = stack_of(3, (16, 16))
    deltas, merged = matrices(stack, [1.0] * 3), WUDI(stack, ridge=1e-9).double().numpy()
    steps = np.random.default_rng(0).normal(size=(20, 16, 16)) * 1e-3
    assert all(wudi_loss(merged + step, deltas) > wudi_loss(merged, deltas) for step in steps)


@pytest.mark.parametrize("steps", [1, 50])
def test_wudis_own_path_is_adam_on_its_loss(steps):
    stack = stack_of(3, (12, 10)).double()
    merged = stack.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((((merged - d) @ d.T) ** 2).sum() / (d**2).sum() for d in stack).backward()
        optimizer.step()
    found = WUDI(stack.float(), closed_form=False, steps=steps)
    torch.testing.assert_close(found, merged.detach().float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [3e-4, 2e-3])
def test_the_default_ridge_lowers_wudis_loss_as_much_as_the_papers_steps_do(scale):
    stack = low_rank(3, 64, 64, 6) + 0.3 * stack_of(3, (64, 64), seed=1) / 1e-2
    stack *= scale / stack.std()
    deltas = matrices(stack, [1.0] * 3)
    closed, adam = (wudi_loss(WUDI(stack, closed_form=c).double().numpy(), deltas) for c in (True, False))
    assert closed < adam < 0.5 * wudi_loss(sum(deltas), deltas)


def test_wudis_own_path_ends_at_its_closed_form():
    stack = stack_of(3, (12, 8))
    far = WUDI(stack, closed_form=False, steps=3_000, step_size=1e-4)
    torch.testing.assert_close(far, WUDI(stack, ridge=1e-9), rtol=0, atol=1e-4)


def test_wudi_does_to_each_models_directions_what_the_model_does_where_they_can_be_told_apart():
    stack = low_rank(3, 20, 60, 4)
    merged = WUDI(stack, ridge=1e-10)
    torch.testing.assert_close(merged @ stack.mT, stack @ stack.mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("models", [2, 3])
def test_wudi_merges_equal_models_to_themselves(models):
    stack = stack_of(1, (12, 8)).expand(models, -1, -1)
    torch.testing.assert_close(WUDI(stack, ridge=1e-9), stack[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("models", [2, 3])
def test_tsv_merges_equal_models_to_their_leading_directions(models):
    stack = stack_of(1, (12, 18)).expand(models, -1, -1)
    left, size, right = np.linalg.svd(stack[0].double().numpy(), full_matrices=False)
    rank = 12 // models
    same(TSV(stack), left[:, :rank] @ np.diag(size[:rank]) @ right[:rank], rtol=1e-5, atol=1e-8)


def test_tsv_adds_deltas_that_have_nothing_in_common():
    stack = torch.zeros(2, 8, 8)
    stack[0, :4, :4], stack[1, 4:, 4:] = torch.randn(4, 4), torch.randn(4, 4)
    torch.testing.assert_close(TSV(stack), stack.sum(0), rtol=1e-5, atol=1e-6)


def test_tsv_of_deltas_of_low_rank_uses_no_arbitrary_directions():
    stack = low_rank(2, 30, 30, 3)
    assert torch.linalg.matrix_rank(TSV(stack), rtol=1e-4) == 6


def test_iso_c_makes_all_directions_of_the_sum_the_same_size():
    sizes = torch.linalg.svdvals(ISO_C(stack_of(3, (20, 14))))
    torch.testing.assert_close(sizes, sizes.mean().expand(14), rtol=1e-5, atol=0)


def test_iso_c_of_deltas_of_low_rank_uses_no_arbitrary_directions():
    stack = low_rank(2, 30, 40, 3)
    sizes, original = torch.linalg.svdvals(ISO_C(stack)), torch.linalg.svdvals(stack.sum(0))
    expected = torch.cat([original[:6].mean().expand(6), torch.zeros(24)])
    torch.testing.assert_close(sizes, expected, rtol=1e-4, atol=1e-4)


@every_spectral
@pytest.mark.parametrize("shape", [(), (0,), (1,), (99,), (0, 3), (3, 0)], ids=str)
def test_vectors_are_averaged_and_empty_tensors_stay_empty(merge, shape):
    stack = stack_of(3, shape)
    torch.testing.assert_close(merge(stack), stack.mean(0))


@every_spectral
def test_a_model_that_changed_nothing_or_weighs_nothing_does_not_disturb_the_others(merge):
    stack = low_rank(3, 15, 15, 2)
    without = merge(stack[[0, 2]])
    torch.testing.assert_close(merge(stack, weights=[1.0, 0.0, 1.0]), without, rtol=1e-4, atol=1e-4)
    stack[1] = 0
    torch.testing.assert_close(merge(stack), without, rtol=1e-4, atol=1e-4)


@every_spectral
def test_the_order_of_the_models_does_not_matter_where_deltas_cancel_or_are_shared(merge):
    stack = low_rank(4, 18, 12, 2)
    stack[1], stack[2] = -stack[0], stack[3]
    torch.testing.assert_close(merge(stack.flip(0)), merge(stack), rtol=1e-4, atol=1e-4)


@every_spectral
def test_the_number_of_threads_does_not_matter_beyond_rounding(merge):
    stack, threads = stack_of(3, (160, 130)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merge(stack)
        torch.set_num_threads(2)
        two = merge(stack)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
