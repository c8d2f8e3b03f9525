import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge.checkpoints.index import DTYPES, read_index
from hf_merge.checkpoints.local import LocalFiles
from hf_merge.errors import CheckpointError

COUNT = 300_000


@pytest.fixture
def numbers(tmp_path: Path) -> LocalFiles:
    save_file({"front": torch.zeros(3, dtype=torch.int8), "ids": torch.arange(COUNT)}, tmp_path / "model.safetensors")
    return LocalFiles(tmp_path)


def read(files: LocalFiles, name: str, start: int, stop: int) -> torch.Tensor:
    return files.read(name, read_index(files).tensors[name], start, stop)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("start", "stop"), [(0, COUNT), (0, 1), (17, 65_553), (COUNT - 1, COUNT), (5, 5), (COUNT, COUNT)])
def test_a_range_is_exactly_those_elements(numbers, start, stop):
    assert torch.equal(read(numbers, "ids", start, stop), torch.arange(start, stop))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (5, 7)], ids=str)
def test_every_dtype_and_shape_comes_back_flat(tmp_path, dtype, shape):
    stored = (torch.rand(shape) * 100 - 20).to(dtype)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    values = read(LocalFiles(tmp_path), "w", 0, stored.numel())
    assert values.dtype == dtype
    assert torch.equal(values, stored.reshape(-1))


def test_what_was_read_stays_when_more_is_read_and_is_the_readers_to_change(numbers):
    first = read(numbers, "ids", 0, 1000)
    first += 1
    assert torch.equal(read(numbers, "ids", 0, 1000), torch.arange(1000))
    assert torch.equal(first, torch.arange(1000) + 1)


def test_several_threads_read_at_once(numbers):
    entry = read_index(numbers).tensors["ids"]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: numbers.read("ids", entry, start, start + 1000), range(0, COUNT, 1000)))
    assert torch.equal(torch.cat(parts), torch.arange(COUNT))


def test_a_file_that_was_cut_off_while_it_was_read_is_refused(numbers):
    entry = read_index(numbers).tensors["ids"]
    assert len(numbers.read("ids", entry, 0, COUNT)) == COUNT
    os.truncate(numbers.folder / "model.safetensors", entry.start + 800)
    assert torch.equal(numbers.read("ids", entry, 0, 100), torch.arange(100))
    with pytest.raises(CheckpointError, match=f"ends at byte {entry.start + 800}, expected {entry.start + 808}"):
        numbers.read("ids", entry, 50, 101)


@pytest.mark.parametrize("change", [-8, 8])
def test_a_file_of_another_size_than_when_its_header_was_read_is_refused(numbers, change):
    entry = read_index(numbers).tensors["ids"]
    before = open_files()
    os.truncate(numbers.folder / "model.safetensors", entry.stop + 3 + change)
    with pytest.raises(CheckpointError, match=f"it has {entry.stop + 3 + change} bytes, and had {entry.stop + 3} when"):
        numbers.read("ids", entry, 0, 1)
    assert open_files() == before


def test_a_file_that_is_gone_since_is_refused(numbers):
    entry = read_index(numbers).tensors["ids"]
    (numbers.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*No such file"):
        numbers.read("ids", entry, 0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_a_shard_is_opened_once_and_closed_with_the_object(tmp_path):
    save_file({"ids": torch.arange(10)}, tmp_path / "model.safetensors")
    files = LocalFiles(tmp_path)
    before = open_files()
    for _ in range(5):
        read(files, "ids", 0, 10)
    assert open_files() == before + 1
    del files
    gc.collect()
    assert open_files() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_shard_is_mapped_into_memory(numbers):
    values = read(numbers, "ids", 0, COUNT)
    assert str(numbers.folder) not in Path("/proc/self/maps").read_text()
    assert int(values[-1]) == COUNT - 1
