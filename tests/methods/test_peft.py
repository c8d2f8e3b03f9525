"""The methods beside those of PEFT: equal where both mean the same, and where they differ, how."""

import pytest
import torch
from peft.utils import merge_utils

from hf_merge.methods import METHODS
from hf_merge.tensors.sparsify import cutoffs, trim

pytestmark = pytest.mark.filterwarnings("ignore:The density 1")


def deltas(*shape):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -0.25, 1.5]], ids=str)
def test_task_arithmetic_is_pefts(weights):
    stack = deltas(3, 10, 10)
    theirs = merge_utils.task_arithmetic(list(stack), torch.tensor(weights))
    torch.testing.assert_close(METHODS["task_arithmetic"](stack, weights=weights), theirs)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_trim_is_pefts_where_no_rounding_is_needed(density):
    stack = deltas(1, 100)
    mine = trim(stack, cutoffs(lambda: [stack], [density], 100))[0]
    assert torch.equal(mine, merge_utils.prune(stack[0], density, "magnitude"))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_ties_is_pefts_at_weights_of_one(density):
    stack = deltas(3, 10, 10)
    theirs = merge_utils.ties(list(stack), torch.ones(3), density)
    torch.testing.assert_close(METHODS["ties"](stack, density=density), theirs)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_at_full_density_and_weights_of_one(name):
    stack = deltas(3, 10, 10)
    theirs = getattr(merge_utils, name)(list(stack), torch.ones(3), 1.0)
    torch.testing.assert_close(METHODS[name](stack, density=1.0), theirs)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_dare_rescales_as_peft_does(density):
    ones = torch.ones(1, 1000)
    mine = METHODS["dare_linear"](ones, density=density).unique()
    theirs = merge_utils.dare_linear(list(ones), torch.ones(1), density).unique()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)  # the density is a multiple of 2**-16


def test_peft_divides_by_the_number_of_models_so_that_weights_shrink_its_ties():
    stack = deltas(3, 10, 10)
    theirs = merge_utils.ties(list(stack), torch.full((3,), 0.25), 0.5)
    torch.testing.assert_close(METHODS["ties"](stack, density=0.5, weights=0.25), 4 * theirs)


def test_peft_elects_signs_on_deltas_without_their_weights():
    stack, weights = torch.tensor([[3.0], [-2.0]]), [0.5, 1.0]
    assert merge_utils.ties(list(stack), torch.tensor(weights), 1.0).tolist() == [1.5]
    assert METHODS["ties"](stack, density=1.0, weights=weights).tolist() == [-2.0]


@pytest.mark.parametrize(("n", "density", "theirs", "mine"), [(5, 0.1, 0, 1), (5, 0.7, 3, 4), (7, 0.5, 3, 4)])
def test_peft_rounds_the_number_of_kept_elements_down_and_even_to_none(n, density, theirs, mine):
    stack = deltas(1, n)
    assert int(merge_utils.ties(list(stack), torch.ones(1), density).count_nonzero()) == theirs
    assert int(METHODS["ties"](stack, density=density).count_nonzero()) == mine
