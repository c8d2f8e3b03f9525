import pytest
import torch

from hf_merge.tensors.rng import STEPS, Draws

USUAL = {"seed": 0, "models": ("ada", "bob"), "tensor": "layers.0.weight", "block": 0}


def test_the_draws_of_a_key_are_golden():
    assert Draws(**USUAL).uniform(0, 6).tolist() == [28152, 25946, 33213, 19830, 21932, 22645]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_fewer_draws_are_the_beginning_of_more(count):
    assert torch.equal(Draws(**USUAL).uniform(1, count), Draws(**USUAL).uniform(1, 4000)[:count])


def test_drawing_again_gives_the_same():
    draws = Draws(**USUAL)
    assert torch.equal(draws.uniform(0, 100), draws.uniform(0, 100))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"seed": -1}, {"models": ("eve", "bob")}, {"tensor": "layers.1.weight"}, {"block": 1}], ids=str
)
def test_each_part_of_the_key_matters(other):
    assert not torch.equal(Draws(**USUAL | other).uniform(0, 100), Draws(**USUAL).uniform(0, 100))


def test_models_have_streams_of_their_own_whatever_their_place():
    draws = Draws(**USUAL)
    assert not torch.equal(draws.uniform(0, 100), draws.uniform(1, 100))
    assert torch.equal(Draws(**USUAL | {"models": ("bob",)}).uniform(0, 100), draws.uniform(1, 100))


def test_the_parts_of_a_key_do_not_run_together():
    one = Draws(seed=1, models=("1",), tensor="a", block=0)
    other = Draws(seed=11, models=("",), tensor="a", block=0)
    assert not torch.equal(one.uniform(0, 100), other.uniform(0, 100))


def test_draws_are_uniform_over_their_range():
    draws = Draws(**USUAL).uniform(0, 1 << 18)
    assert (draws.dtype, int(draws.min()) >= 0, int(draws.max()) < STEPS) == (torch.int32, True, True)
    counts = torch.bincount(draws // (STEPS // 64), minlength=64).double()
    chi_squared = float(((counts - (1 << 12)) ** 2 / (1 << 12)).sum())
    assert chi_squared < 63 + 4 * (2 * 63) ** 0.5
