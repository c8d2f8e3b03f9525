"""Networks on disk."""

import numpy as np
import pytest
import torch

from hf_merge.errors import RecipeError
from hf_merge.search.layers.policy import PathNets
from hf_merge.search.layers.pool import Block, Pool
from hf_merge.search.layers.stored import load_nets, save_nets


@pytest.fixture
def nets():
    pool = Pool(blocks=(Block("a", 0, 4, 8), Block("a", 1, 8, 4)), statistics=np.array([[0.5, 1.0], [-0.25, 2.0]]))
    return PathNets(pool, 3, longest=4, kind="categorical", scales=True, heads=2, hidden=16)


def test_networks_come_back_bit_for_bit(nets, tmp_path):
    save_nets(tmp_path / "new", nets)
    again = load_nets(tmp_path / "new")
    assert again.shape == nets.shape
    assert again.pool.blocks == nets.pool.blocks
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {n: t.tolist() for n, t in nets.state_dict().items()}


def test_networks_that_came_back_say_the_same(nets, tmp_path):
    save_nets(tmp_path, nets)
    tokens, wanted = torch.tensor([[3, 0, 1]]), torch.full((1, 3, 3), 1 / 3)
    told = [n.opinions(n.critic(tokens, torch.zeros(1, 3)), wanted) for n in (nets, load_nets(tmp_path))]
    assert torch.equal(*told)


def test_a_folder_without_networks_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"path_nets\.json"):
        load_nets(tmp_path)


def test_no_unfinished_file_is_left(nets, tmp_path):
    save_nets(tmp_path, nets)
    assert {file.name for file in tmp_path.iterdir()} == {"path_nets.safetensors", "path_nets.json"}
