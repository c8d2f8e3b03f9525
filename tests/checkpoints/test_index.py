"""Headers: what is read from them, and everything that may be wrong with a checkpoint before a tensor is read."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge.checkpoints.index import read_index
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.errors import CheckpointError


def write(folder: Path, **files: bytes | dict | list) -> LocalFiles:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return LocalFiles(folder)


def shard(header: object, body: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def test_index_gives_shape_dtype_and_place_of_every_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "none": torch.zeros(0, 4), "n": torch.arange(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = LocalFiles(tmp_path)
    index = read_index(files)
    assert {n: (e.dtype, e.shape) for n, e in index.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    entry = index.tensors["a"]
    raw = files.read_bytes(entry.file, entry.start, entry.stop)
    assert torch.equal(torch.frombuffer(raw, dtype=torch.float32).reshape(3, 5), tensors["a"])


def test_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    save_file({f"a.very.long.name.of.a.tensor.{i}": torch.zeros(1) for i in range(3000)}, tmp_path / "model.safetensors")
    assert len(read_index(LocalFiles(tmp_path)).tensors) == 3000


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("../../x.safetensors", "not shards beside it"),
        ("/etc/x.safetensors", "not shards beside it"),
        ("sub/x.safetensors", "not shards beside it"),
        ("..\\x.safetensors", "not shards beside it"),
        ("model.bin", "not shards beside it"),
        ("model-00002-of-00002.safetensors", "missing"),
    ],
)
def test_index_that_names_a_hostile_or_missing_shard_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    files = write(tmp_path, model__safetensors__index__json={"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match=complaint):
        read_index(files)


def test_hostile_shard_is_refused_even_if_such_a_file_exists(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    files = write(tmp_path / "model", model__safetensors__index__json={"weight_map": {"a": "../x.safetensors"}})
    with pytest.raises(CheckpointError, match=r"\.\./x\.safetensors"):
        read_index(files)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "truncated"),
        (b"\x08\0\0\0", "truncated"),
        (struct.pack("<Q", 10**15) + b"{}", "truncated"),
        (shard(b"not json"), "does not parse"),
        (shard([1, 2]), "JSON object"),
        (shard({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 12), "truncated"),
        (shard({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, 20), "does not name"),
        (shard({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, 16), "cannot fill"),
        (shard({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, 16), "cannot fill"),
        (shard({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, 0), "cannot fill"),
        (shard({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2), "stored as F4"),
        (shard({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, 16), "broken"),
        (shard({"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}, 16), "broken"),
        (shard({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}, 16), "broken"),
        (shard({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4), "broken"),
        (shard({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]}}, 16), "broken"),
        (shard(b"[" * 99_999), "does not parse"),
        (shard({"a": {"dtype": "F32", "shape": [4]}}, 16), "broken"),
        (shard({}), "no tensors"),
    ],
)
def test_broken_shard_is_refused_from_its_header(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_index(write(tmp_path, model__safetensors=content))


@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        ([0, 8], [4, 12], "overlaps"),
        ([0, 8], [0, 8], "overlaps"),
        ([0, 8], [12, 20], "gap"),
        ([4, 12], [12, 20], "gap"),
    ],
)
def test_tensors_that_do_not_fill_the_file_once_are_refused(
    tmp_path: Path, first: list[int], second: list[int], complaint: str
) -> None:
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in (("a", first), ("b", second))}
    with pytest.raises(CheckpointError, match=complaint):
        read_index(write(tmp_path, model__safetensors=shard(header, max(*first, *second))))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bool]
)
def test_dtype_that_safetensors_writes_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    assert read_index(LocalFiles(tmp_path)).tensors["a"].dtype == dtype


def test_file_of_another_name_is_indexed_when_it_is_asked_for(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    index = read_index(LocalFiles(tmp_path), "adapter_model.safetensors", "adapter_model.safetensors.index.json")
    assert list(index.tensors) == ["a"]


def test_absence_of_a_file_of_another_name_is_told_by_that_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither x\.safetensors nor x\.json"):
        read_index(write(tmp_path, config__json={}), "x.safetensors", "x.json")


def test_twenty_thousand_tensors_are_indexed_in_well_under_a_second(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 300}.mlp.experts.{i % 300}.gate_proj.weight" for i in range(20_000)]
    header = {n: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    files = write(tmp_path, model__safetensors=shard(header, 8 * len(names)))
    start = time.process_time()
    assert len(read_index(files).tensors) == len(names)
    assert time.process_time() - start < 1


def test_index_that_promises_a_tensor_its_shards_lack_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    files = write(tmp_path, model__safetensors__index__json={"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}})
    with pytest.raises(CheckpointError, match="'b'"):
        read_index(files)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_alone_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickles.*save_pretrained.*pickles=True"):
        read_index(LocalFiles(tmp_path))


def test_gguf_alone_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF.*take the model it was made from"):
        read_index(LocalFiles(tmp_path))


def test_folder_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'config\.json'"):
        read_index(write(tmp_path, config__json={}))


def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        LocalFiles(tmp_path / "nowhere")
