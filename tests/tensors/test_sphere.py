import pytest
import torch

from hf_merge.tensors.sphere import RUN, gram

SIZES = [1, 1000, RUN, RUN + 1, 5 * RUN + 77]


def exact(stack):
    return stack.double() @ stack.double().T


def stack_of(n, models=3):
    return 0.02 * torch.randn(models, n, generator=torch.Generator().manual_seed(n)) + 0.003


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_inner_products_are_those_of_float64_to_1e_7_of_the_norms(n, models):
    stack = stack_of(n, models)
    found, norms = gram(lambda: stack.split(3 * RUN + 5, dim=1), models), exact(stack).diagonal().sqrt()
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert float(((found - exact(stack)).abs() / torch.outer(norms, norms)).max()) < 1e-7


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_squares_beyond_float32_are_added_up_too(scale):
    stack = stack_of(3 * RUN) * scale
    torch.testing.assert_close(gram(lambda: [stack], 3), exact(stack), rtol=1e-6, atol=0)


def test_tensors_of_zeros_have_products_of_zero():
    assert not gram(lambda: [torch.zeros(2, 3 * RUN)], 2).any()


def test_an_empty_tensor_has_products_of_zero():
    assert not gram(lambda: [torch.zeros(2, 0)], 2).any()


def test_where_in_memory_the_numbers_lie_does_not_matter():
    stack = stack_of(4 * RUN)
    usual = gram(lambda: [stack], 3)
    for offset in range(1, 17):
        moved = torch.empty(3, 4 * RUN + 16)[:, offset : offset + 4 * RUN].copy_(stack)
        assert torch.equal(gram(lambda moved=moved: [moved], 3), usual)
