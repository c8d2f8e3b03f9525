"""Rows of several tensors as one tensor: what is read is what NumPy's indexing gives, and little more is read than that."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_merge.checkpoints import rows as module
from hf_merge.checkpoints.rows import MeanRow, RowMap, Rows


@dataclass
class Memory:
    """A source in memory that writes down what is read of it."""

    values: Tensor
    near: bool = True
    delta: bool = False
    label: str = "a: tensor 'x'"
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.values.numel()
        self.reads.append((start, stop))
        return self.values.flatten()[start:stop]


def table(
    rows: int, width: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, near: bool = True, delta: bool = False
) -> Memory:
    shape = (rows, width) if width else (rows,)
    return Memory(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), near, delta)


def mapped(*entries: list[tuple[int, int]]) -> RowMap:
    """The map whose row r is the mean of the rows (source, row) in `entries[r]`."""
    start = torch.tensor([0, *(len(entry) for entry in entries)]).cumsum(0)
    flat = torch.tensor([pair for entry in entries for pair in entry], dtype=torch.int64).reshape(-1, 2)
    return RowMap(start, flat[:, 0], flat[:, 1])


def expected(sources: list[Memory], entries: list[list[tuple[int, int]]]) -> np.ndarray:
    zero = np.zeros(sources[0].shape[1:], np.float64)
    return np.stack([np.mean([sources[k].values[r].numpy() for k, r in e], 0, np.float64) if e else zero for e in entries])


SIZES = (5, 1, 40)
ENTRY = st.lists(
    st.integers(0, 2).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, SIZES[k] - 1))), max_size=3, unique=True
)


@given(entries=st.lists(ENTRY, min_size=1, max_size=30), width=st.sampled_from([0, 1, 3]), data=st.data())
def test_any_range_is_what_indexing_gives(entries: list[list[tuple[int, int]]], width: int, data: st.DataObject) -> None:
    sources = [table(size, width, seed) for seed, size in enumerate(SIZES)]
    whole = expected(sources, entries)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    rows = Rows(tuple(sources), mapped(*entries))
    assert rows.shape == whole.shape
    np.testing.assert_allclose(rows.read(start, stop).numpy(), whole.flatten()[start:stop], rtol=1e-6, atol=1e-6)


@given(start=st.integers(0, 39), length=st.integers(1, 40), width=st.sampled_from([1, 3]))
def test_a_run_of_one_source_is_read_at_once_and_untouched(start: int, length: int, width: int) -> None:
    source = table(87, width, dtype=torch.bfloat16)
    rows = Rows((source,), mapped(*([(0, r + 7)] for r in range(80))))
    found = rows.read(start * width, (start + length) * width)
    assert torch.equal(found, source.values[start + 7 : start + length + 7].flatten())
    assert len(source.reads) == 1


def test_parts_of_a_read_are_the_bits_of_the_whole() -> None:
    sources = [table(9, 5, seed) for seed in range(3)]
    rows = Rows(tuple(sources), mapped([(0, 1), (1, 1), (2, 8)], [(2, 0)], [(1, 3), (0, 0)], [], [(0, 8)]))
    whole = rows.read(0, 25)
    assert torch.equal(torch.cat([rows.read(i, i + 1) for i in range(25)]), whole)


def test_of_a_single_row_only_the_columns_are_read_that_are_asked_for() -> None:
    source = table(10, 8)
    Rows((source,), mapped([(0, 9)], [(0, 4)])).read(10, 13)
    assert source.reads == [(34, 37)]


def test_close_rows_are_read_together_and_distant_ones_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GAP", 4 * 8 * 2)
    source = table(100, 8)
    rows = Rows((source,), mapped([(0, 20)], [(0, 3)], [(0, 0)], [(0, 90)]))
    assert torch.equal(rows.read(0, 32).view(4, 8), source.values[[20, 3, 0, 90]])
    assert source.reads == [(0, 32), (160, 168), (720, 728)]


def test_more_is_read_along_on_a_network_than_on_a_disk() -> None:
    wide = module.GAP // 4  # a row is as long as the largest gap on a disk
    local, far = (table(8, wide, near=near) for near in (True, False))
    for source in (local, far):
        Rows((source,), mapped([(0, 0)], [(0, 5)])).read(0, 2 * wide)
    assert (len(local.reads), len(far.reads)) == (2, 1)


def test_rows_with_gaps_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 80)
    source = table(100, 8)
    rows = Rows((source,), mapped(*([(0, r)] for r in range(0, 100, 2))))
    assert torch.equal(rows.read(0, 400).view(50, 8), source.values[::2])
    assert max(stop - start for start, stop in source.reads) <= 80


def test_only_the_part_that_is_asked_for_is_read() -> None:
    source = table(1000, 4)
    rows = Rows((source,), mapped(*([(0, r)] for r in reversed(range(1000)))))
    rows.read(400, 800)
    assert min(source.reads)[0] >= 3200
    assert max(source.reads)[1] <= 3600


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [
        ([[(0, 0)], []], torch.bfloat16),
        ([[(0, 0)], [(0, 1), (1, 1)]], torch.float32),
        ([[(0, 0)], [(2, 0)]], torch.float32),
        ([[(0, 0)], [(3, 0)]], torch.float64),
        ([[], []], torch.bfloat16),
    ],
    ids=["one source's own", "averages", "bfloat16 with float16", "float64", "zeros"],
)
def test_the_dtype_loses_nothing(entries: list[list[tuple[int, int]]], dtype: torch.dtype) -> None:
    kinds = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)
    rows = Rows(tuple(table(2, dtype=kind) for kind in kinds), mapped(*entries))
    assert rows.dtype == dtype
    assert rows.read(0, 6).dtype == rows.read(1, 2).dtype == dtype


def test_the_facts_are_those_of_what_is_used() -> None:
    own, far = table(4, delta=True), table(10, seed=1, near=False)
    own.label = "b: tensor 'y'"
    assert Rows((own, far), mapped([(0, 0)], [(0, 1)])).near
    rows = Rows((far, own), mapped([(0, 9)], [(1, 1)], [(0, 9)]), own=1)
    assert not rows.near
    assert rows.delta
    assert rows.label == "b: tensor 'y'"
    assert rows.nbytes == 2 * 3 * 4


def test_a_map_knows_whether_it_changes_anything() -> None:
    plain = mapped([(1, 0)], [(1, 1)])
    assert plain.is_identity(1, 2)
    assert not plain.is_identity(0, 2)
    assert not plain.is_identity(1, 3)
    assert not mapped([(1, 1)], [(1, 0)]).is_identity(1, 2)
    assert not mapped([(1, 0), (1, 1)], []).is_identity(1, 2)


def test_a_map_counts_its_runs() -> None:
    assert mapped([(0, 4)], [(0, 5)], [(1, 6)], [(0, 7)]).runs == 3
    assert mapped([], []).runs == 0


def test_a_map_can_be_cut_down_to_one_source() -> None:
    sources = [table(4, seed=seed) for seed in range(2)]
    rows = Rows(tuple(sources), mapped([(0, 3)], [(0, 1), (1, 1)], [(1, 2)], []).of(1))
    wanted = expected(sources, [[], [(1, 1)], [(1, 2)], []])
    np.testing.assert_array_equal(rows.read(0, 12).view(4, 3).numpy(), wanted)


def test_the_mean_row_is_the_mean_of_all_rows_and_reads_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 20)
    source = table(11, 5, dtype=torch.float16)
    mean = MeanRow(source)
    assert (mean.shape, mean.dtype) == ((1, 5), torch.float32)
    torch.testing.assert_close(mean.read(1, 4), source.values.float().mean(0)[1:4])
    mean.read(0, 5)
    assert source.reads == [(0, 20), (20, 40), (40, 55)]
