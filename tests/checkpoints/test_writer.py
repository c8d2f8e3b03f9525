"""Shards: planned from shapes alone, filled in any order, readable by safetensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_merge.checkpoints.writer import ShardFile, TensorSpec, index_json, plan_shards


def specs(**sizes: int) -> dict[str, TensorSpec]:
    return {name: TensorSpec((size,), torch.float32) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ({"a": 10, "b": 10}, 1000, [["a", "b"]]),
        ({"a": 10, "b": 10}, 40, [["a"], ["b"]]),
        ({"a": 10, "b": 10, "c": 10}, 80, [["a", "b"], ["c"]]),
        ({"a": 10, "big": 100, "c": 10}, 80, [["a", "c"], ["big"]]),
    ],
)
def test_shards_keep_their_size_and_large_tensors_stand_alone(sizes: dict[str, int], limit: int, shards: list) -> None:
    planned = plan_shards(specs(**sizes), limit)
    assert sorted(sorted(s.tensors) for s in planned) == sorted(sorted(names) for names in shards)
    names = {s.name for s in planned}
    assert names == (
        {"model.safetensors"}
        if len(shards) == 1
        else {f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))}
    )


def test_index_names_every_tensor_and_the_total(tmp_path: Path) -> None:
    planned = plan_shards(specs(a=10, b=10), 40)
    content = json.loads(index_json(planned) or b"")
    assert content["metadata"] == {"total_parameters": 20, "total_size": 80}
    assert set(content["weight_map"]) == {"a", "b"}
    assert index_json(plan_shards(specs(a=10), 40)) is None


def test_pieces_written_in_any_order_read_back_as_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 5), "b": torch.randn(3).bfloat16(), "c": torch.randn(()), "none": torch.zeros(0, 2)}
    (planned,) = plan_shards({n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()})
    file = ShardFile(planned, tmp_path)
    file.write("c", 0, tensors["c"].reshape(-1))
    file.write("a", 17, tensors["a"].reshape(-1)[17:])
    file.write("b", 0, tensors["b"])
    file.write("a", 0, tensors["a"].reshape(-1)[:17])
    file.write("none", 0, tensors["none"].reshape(-1))
    path = file.finish()
    with safe_open(path, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
        assert all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert path.stat().st_size == planned.nbytes


def test_shard_has_no_name_until_it_is_whole_and_leaves_nothing_when_abandoned(tmp_path: Path) -> None:
    file = ShardFile(plan_shards(specs(a=10))[0], tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    file.abandon()
    assert list(tmp_path.iterdir()) == []
