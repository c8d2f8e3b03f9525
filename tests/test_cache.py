from pathlib import Path

import pytest

from hf_merge.cache import cache_folder


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MERGE_CACHE", str(tmp_path / "mine"))
    assert cache_folder("pushes") == tmp_path / "mine/pushes"
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("given", [None, ""])
def test_or_else_with_the_user(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("HF_MERGE_CACHE", raising=False)
    else:
        monkeypatch.setenv("HF_MERGE_CACHE", given)
    assert cache_folder("demo") == tmp_path / ".cache/hf_merge/demo"
