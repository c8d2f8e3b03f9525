import pytest
import torch

from hf_merge.tensors.masks import only, pack


@pytest.mark.parametrize("mask", [[[1, 0, 1], [0, 0, 1]], [[0, 1, 1]]], ids=["of-each-model", "for-all"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_what_a_packed_mask_does_not_have_is_zero(mask, dtype):
    deltas = torch.tensor([[1.0, 2, 3], [-4, 5, 6]])
    assert torch.equal(only(deltas, pack(torch.tensor(mask, dtype=dtype))), deltas * torch.tensor(mask))


@pytest.mark.parametrize("count", [0, 1, 8, 13, 2048, 2049, 5000])
def test_a_packed_mask_has_an_eighth_of_its_elements_in_bytes(count):
    mask = torch.rand(2, count, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(mask)
    assert sum(row.nbytes for row in packed) <= 2 * (count / 8 + 256)
    assert torch.equal(only(torch.ones(2, count), packed, [1.0, 3.0]), mask * torch.tensor([[1.0], [3.0]]))
