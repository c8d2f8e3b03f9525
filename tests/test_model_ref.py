from pathlib import Path

import pytest

from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef


@pytest.mark.parametrize(
    ("text", "id_", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/model", "org/model", None),
        ("org/model@main", "org/model", "main"),
        ("org/Model-1.5_b@refs/pr/1", "org/Model-1.5_b", "refs/pr/1"),
        ("org/model@", "org/model", None),
    ],
)
def test_a_hub_id_may_carry_a_revision(text, id_, revision):
    assert ModelRef.parse(text) == ModelRef(id_, revision)
    assert not ModelRef.parse(text).is_local


@pytest.mark.parametrize("text", ["gpt2", "org/model", "org/model@v1"])
def test_a_hub_id_prints_as_it_is_written(text):
    assert str(ModelRef.parse(text)) == text


@pytest.mark.parametrize("text", ["", "a b", "a/b/c", "org/", "org/mo..del", "org/mo--del", "-org/model", "org/model\n"])
def test_what_is_neither_an_id_nor_a_folder_is_refused(text):
    with pytest.raises(RecipeError, match=r"neither a local folder nor a Hub id\. Expected 'namespace/name'"):
        ModelRef.parse(text)


def test_a_folder_is_local_as_text_and_as_path(tmp_path):
    assert ModelRef.parse(tmp_path) == ModelRef.parse(str(tmp_path)) == ModelRef(str(tmp_path))
    assert ModelRef.parse(tmp_path).is_local
    assert ModelRef.parse(tmp_path).path == tmp_path


def test_a_folder_of_this_name_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not ModelRef("org/model").is_local
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert ModelRef("org/model").is_local


def test_an_at_sign_in_a_folders_name_is_not_a_revision(tmp_path):
    folder = tmp_path / "model@v1"
    folder.mkdir()
    assert ModelRef.parse(folder) == ModelRef(str(folder), None)


@pytest.mark.parametrize("text", ["/no/such/folder", "./nothing", "../nothing", "~/nothing-here"])
def test_an_explicit_path_is_local_even_where_nothing_is(text):
    assert ModelRef.parse(text).is_local


def test_the_home_folder_is_expanded():
    assert ModelRef("~/model").path == Path.home() / "model"


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(RecipeError, match="is a local folder, and a folder has no revision 'main'"):
        ModelRef(str(tmp_path), "main")


def test_a_model_ref_is_parsed_to_itself():
    ref = ModelRef("org/model", "v1")
    assert ModelRef.parse(ref) is ref


@pytest.mark.parametrize(
    ("ref", "name", "long_name"),
    [
        (ModelRef("gpt2"), "gpt2", "gpt2"),
        (ModelRef("org/model"), "model", "org/model"),
        (ModelRef("org/model", "v1"), "model", "org/model@v1"),
        (ModelRef("/runs/one/model"), "model", "one/model"),
        (ModelRef("/runs/one/model/"), "model", "one/model"),
        (ModelRef("/runs/one/../two"), "two", "runs/two"),
    ],
)
def test_the_name_is_the_last_part_and_the_long_name_tells_more(ref, name, long_name):
    assert (ref.name, ref.long_name) == (name, long_name)


def test_the_current_folder_has_the_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelRef(".").name == tmp_path.name


def test_pinning_replaces_the_revision_of_a_hub_model_only(tmp_path):
    assert ModelRef("org/model", "main").pinned("abc") == ModelRef("org/model", "abc")
    assert ModelRef(str(tmp_path)).pinned("abc") == ModelRef(str(tmp_path))


def test_equal_refs_are_one_key():
    assert len({ModelRef("a/b"), ModelRef.parse("a/b"), ModelRef("a/b", "v1")}) == 2
