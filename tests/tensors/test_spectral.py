"""Singular vectors by way of the smaller Gram matrix."""

import pytest
import torch

from hf_merge.tensors.spectral import orthonormal, rows_and_columns, singular

SHAPES = [(1, 1), (7, 7), (40, 9), (9, 40), (500, 3)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_shape
def test_the_singular_vectors_rebuild_the_matrix(shape):
    matrix = matrix_of(*shape)
    left, values, right = singular(matrix)
    torch.testing.assert_close((left * values) @ right.T, matrix, rtol=0, atol=1e-10)


@every_shape
def test_the_singular_vectors_are_orthonormal(shape):
    left, values, right = singular(matrix_of(*shape))
    identity = torch.eye(len(values), dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(right.T @ right, identity, rtol=0, atol=1e-9)


@every_shape
def test_the_singular_values_are_those_of_an_svd(shape):
    matrix = matrix_of(*shape)
    torch.testing.assert_close(singular(matrix)[1], torch.linalg.svdvals(matrix))


@pytest.mark.parametrize("scale", [1e-42, 1e30])
def test_the_rank_is_that_of_the_directions_above_float32_rounding(scale):
    matrix = (matrix_of(30, 4) @ matrix_of(4, 20, seed=1)).float().double() * scale
    assert len(singular(matrix)[1]) == 4


@pytest.mark.parametrize("shape", [(5, 3), (3, 0), (0, 3), (0, 0)], ids=str)
def test_a_matrix_of_zeros_has_no_directions(shape):
    left, values, right = singular(torch.zeros(shape, dtype=torch.float64))
    assert (left.shape, values.shape, right.shape) == ((shape[0], 0), (0,), (shape[1], 0))


def test_the_nearest_orthonormal_columns_of_orthogonal_ones_are_their_directions():
    matrix = torch.linalg.qr(matrix_of(12, 5))[0]
    torch.testing.assert_close(orthonormal(matrix * torch.arange(1.0, 6.0)), matrix)


def test_equal_columns_stay_equal_when_they_are_made_orthonormal():
    first, second = orthonormal(matrix_of(12, 1).expand(-1, 2)).T
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("shape", "seen"), [((), None), ((5,), None), ((2, 3), (2, 3)), ((4, 3, 2, 2), (4, 12)), ((0, 3), (0, 3))]
)
def test_kernels_are_seen_as_matrices_and_vectors_are_not(shape, seen):
    assert rows_and_columns(shape) == seen
