from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import PublishError
from hf_merge.model_ref import ModelRef
from hf_merge.publishing.license import Declared, licenses_of, resolve


def test_equal_licenses_are_inherited() -> None:
    found = resolve({"a": "apache-2.0", "b": "Apache-2.0", "c": ["apache-2.0"]})
    assert (found.identifier, found.name) == ("apache-2.0", None)


def test_mixed_licenses_are_other_with_their_list() -> None:
    found = resolve({"a": "mit", "b": "apache-2.0"})
    assert (found.identifier, found.name) == ("other", "apache-2.0 and mit")
    assert found.members == {"a": ("mit",), "b": ("apache-2.0",)}


@pytest.mark.parametrize("declared", [None, "", "unknown", [], ["mit", "unknown"]])
def test_one_unknown_license_leaves_it_out(declared: Declared) -> None:
    found = resolve({"a": "mit", "b": declared})
    assert found.identifier is None
    assert "none is declared" in found.note


def test_no_parents_at_all_leave_it_out() -> None:
    assert resolve({}).identifier is None


def test_terms_of_ones_own_keep_their_name() -> None:
    found = resolve({"a": "other: acme-1.0", "b": "other: acme-1.0"})
    assert (found.identifier, found.name) == ("other", "acme-1.0")


@pytest.mark.parametrize(
    "license",
    ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "other: acme-non-commercial", "intel-research"],
)
def test_a_restricted_parent_is_refused(license: str) -> None:
    with pytest.raises(PublishError, match=r"'demo/b' \(.*consent"):
        resolve({"demo/a": "mit", "demo/b": license})


def test_a_restricted_parent_passes_with_consent() -> None:
    assert resolve({"a": "cc-by-nc-4.0", "b": "cc-by-nc-4.0"}, consent=True).identifier == "cc-by-nc-4.0"


@pytest.mark.parametrize("license", ["apache-2.0", "cc-by-sa-4.0", "ncsa", "openrail", "gpl-3.0", "bsd-3-clause-clear"])
def test_an_open_license_is_not_taken_for_a_restricted_one(license: str) -> None:
    assert resolve({"a": license}).identifier == license


@pytest.mark.parametrize("license", ["llama3.1", "gemma", "other: llama-community"])
def test_duties_of_a_license_are_told(license: str) -> None:
    assert len(resolve({"a": license, "b": "mit"}).duties) == 1


CARDS: Mapping[str, str] = {
    "demo/plain": "---\nlicense: mit\n---\n# x",
    "demo/own": "---\nlicense: other\nlicense_name: acme\n---\n# x",
    "demo/silent": "# no front matter",
    "demo/listed": "---\nlicense:\n- mit\n- apache-2.0\n---\n",
}


def test_licenses_are_read_from_cards_on_the_hub(hub: LocalHub, api: HfApi) -> None:
    refs = [ModelRef(repo_id, hub.seed(repo_id, {"README.md": card})) for repo_id, card in CARDS.items()]
    assert licenses_of(refs, api) == {
        "demo/plain": "mit",
        "demo/own": "other: acme",
        "demo/silent": None,
        "demo/listed": ["mit", "apache-2.0"],
    }


def test_a_license_is_the_one_of_the_pinned_commit(hub: LocalHub, api: HfApi) -> None:
    first = hub.seed("demo/moved", {"README.md": "---\nlicense: mit\n---\n"})
    hub.seed("demo/moved", {"README.md": "---\nlicense: gpl-3.0\n---\n"})
    assert licenses_of([ModelRef("demo/moved", first)], api) == {"demo/moved": "mit"}


@pytest.mark.parametrize(
    ("readme", "expected"),
    [("---\nlicense: mit\n---\n", "mit"), ("no front matter", None), ("---\n: : [\n---\n", None), (None, None)],
)
def test_a_local_folder_is_asked_by_its_readme(tmp_path: Path, api: HfApi, readme: str | None, expected: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licenses_of([ModelRef(str(tmp_path))], api) == {str(tmp_path): expected}


def test_a_missing_model_is_named_with_its_page(hub: LocalHub, api: HfApi) -> None:
    with pytest.raises(PublishError, match=rf"demo/absent is not at {hub.endpoint}/demo/absent"):
        licenses_of([ModelRef("demo/absent")], api)


def test_a_missing_revision_is_named(hub: LocalHub, api: HfApi) -> None:
    hub.seed("demo/there", {"README.md": "x"})
    with pytest.raises(PublishError, match="no revision 'nope'"):
        licenses_of([ModelRef("demo/there", "nope")], api)


def test_a_hub_that_cannot_be_reached_leaves_the_license_unknown() -> None:
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_local")
    assert licenses_of([ModelRef("demo/a")], api) == {"demo/a": None}
