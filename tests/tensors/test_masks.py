import pytest
import torch

from hf_merge.tensors.masks import only, pack


@pytest.mark.parametrize("mask", [[[1, 0, 1], [0, 0, 1]], [[0, 1, 1]]], ids=["of-each-model", "for-all"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_what_a_packed_mask_does_not_have_is_zero(mask, dtype):
    deltas = torch.tensor([[1.0, 2, 3], [-4, 5, 6]])
    assert torch.equal(only(deltas, pack(torch.tensor(mask, dtype=dtype))), deltas * torch.tensor(mask))


@pytest.mark.parametrize("count", [0, 1, 8, 13])
def test_a_packed_mask_has_an_eighth_of_its_elements_in_bytes(count):
    packed = pack(torch.ones(2, count, dtype=torch.bool))
    assert packed.nbytes == 2 * -(-count // 8)
    assert torch.equal(only(torch.ones(2, count), packed), torch.ones(2, count))
