"""Repositories over the real client: creating, committing, references, permissions, lists."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from safetensors.numpy import save

from hf_merge.demo.hub.server import LocalHub

BIG = bytes(range(256)) * 400


def read(api: HfApi, hub: LocalHub, tmp_path: Path, name: str, **arguments: str) -> bytes:
    repo_id = arguments.pop("repo_id", "demo/model")
    path = hf_hub_download(repo_id, name, endpoint=hub.endpoint, token=api.token, cache_dir=tmp_path / "cache", **arguments)
    return Path(path).read_bytes()


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_a_created_repository_starts_with_one_commit(api: HfApi) -> None:
    url = api.create_repo("demo/model")
    assert url.repo_id == "demo/model"
    assert api.list_repo_files("demo/model") == [".gitattributes"]
    assert [commit.title for commit in api.list_repo_commits("demo/model")] == ["initial commit"]


def test_creating_twice_is_a_conflict_unless_allowed(api: HfApi) -> None:
    url = api.create_repo("demo/model")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("demo/model")
    assert status_of(error) == 409
    assert api.create_repo("demo/model", exist_ok=True) == url


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_plain_and_lfs_files_come_back_as_they_were_sent(api: HfApi, hub: LocalHub, tmp_path: Path, repo_type: str) -> None:
    api.create_repo("demo/model", repo_type=repo_type, space_sdk="gradio" if repo_type == "space" else None)
    files = {"sub dir/ä#%.txt": b"text", "model.safetensors": BIG, "empty.bin": b"", "picture.dat": b"\0\1"}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    commit = api.create_commit("demo/model", operations, commit_message="Files", repo_type=repo_type)
    for path, content in files.items():
        assert read(api, hub, tmp_path, path, repo_type=repo_type, revision=commit.oid) == content
    infos = api.get_paths_info("demo/model", list(files), repo_type=repo_type)
    entries = {item.path: item for item in infos if isinstance(item, RepoFile)}
    assert [path for path in files if entries[path].lfs] == ["model.safetensors", "picture.dat"]
    assert [entries[path].size for path in files] == [len(content) for content in files.values()]


def test_a_folder_goes_up_and_a_snapshot_comes_down(api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "a.txt").write_text("a")
    (tmp_path / "folder" / "model.bin").write_bytes(BIG)
    api.create_repo("demo/model")
    api.upload_folder(folder_path=tmp_path / "folder", repo_id="demo/model")
    path = Path(api.snapshot_download("demo/model", cache_dir=tmp_path / "cache"))
    assert (path / "sub" / "a.txt").read_text() == "a"
    assert (path / "model.bin").read_bytes() == BIG


def test_unchanged_files_are_neither_sent_nor_committed_again(api: HfApi, hub: LocalHub) -> None:
    api.create_repo("demo/model")
    first = api.upload_file(path_or_fileobj=BIG, path_in_repo="model.safetensors", repo_id="demo/model")
    hub.clear_requests()
    second = api.upload_file(path_or_fileobj=BIG, path_in_repo="model.safetensors", repo_id="demo/model")
    assert second.oid == first.oid
    assert not [request for request in hub.requests() if request.method == "PUT"]


def test_a_commit_on_an_outdated_parent_is_refused(api: HfApi) -> None:
    api.create_repo("demo/model")
    old = api.repo_info("demo/model").sha
    add = [CommitOperationAdd("a.txt", b"a")]
    new = api.create_commit("demo/model", add, commit_message="a", parent_commit=old).oid
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit("demo/model", [CommitOperationAdd("b.txt", b"b")], commit_message="b", parent_commit=old)
    assert status_of(error) == 412
    assert api.repo_info("demo/model").sha == new


def test_deleting_files_and_folders(api: HfApi, hub: LocalHub) -> None:
    hub.seed("demo/model", {"a.txt": b"a", "b/c.txt": b"c", "b/d/e.txt": b"e", "f.txt": b"f"})
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("b/")]
    api.create_commit("demo/model", operations, commit_message="Clean")
    assert api.list_repo_files("demo/model") == ["f.txt"]


def test_deleting_an_absent_file_is_refused(api: HfApi) -> None:
    api.create_repo("demo/model")
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("absent.txt", "demo/model")


def test_copies_between_repositories_send_no_lfs_bytes(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    sha = hub.seed("other/source", {"model.safetensors": BIG, "tokenizer.json": b"{}"})
    api.create_repo("demo/model")
    copies = [
        CommitOperationCopy(name, name, src_repo_id="other/source", src_repo_type="model", src_revision=sha)
        for name in ("model.safetensors", "tokenizer.json")
    ]
    api.create_commit("demo/model", copies, commit_message="Copy")
    assert read(api, hub, tmp_path, "model.safetensors") == BIG
    assert hub.bytes_served("/other/source/resolve/*/model.safetensors") == 0
    assert not [request for request in hub.requests() if request.method == "PUT"]


def test_branches_with_slashes_are_revisions(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    hub.seed("demo/model", {"a.txt": b"main"})
    api.create_branch("demo/model", branch="trial/7")
    api.upload_file(path_or_fileobj=b"trial", path_in_repo="a.txt", repo_id="demo/model", revision="trial/7")
    assert read(api, hub, tmp_path, "a.txt", revision="trial/7") == b"trial"
    assert read(api, hub, tmp_path, "a.txt") == b"main"
    assert {branch.name for branch in api.list_repo_refs("demo/model").branches} == {"main", "trial/7"}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch("demo/model", branch="trial/7")
    assert status_of(error) == 409
    api.create_branch("demo/model", branch="trial/7", exist_ok=True)
    api.delete_branch("demo/model", branch="trial/7")
    assert not api.revision_exists("demo/model", "trial/7")


def test_tags_stay_while_the_branch_moves(api: HfApi, hub: LocalHub) -> None:
    sha = hub.seed("demo/model", {"a.txt": b"1"})
    api.create_tag("demo/model", tag="v1")
    hub.seed("demo/model", {"a.txt": b"2"})
    assert api.repo_info("demo/model", revision="v1").sha == sha
    api.delete_tag("demo/model", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("demo/model", revision="v1")


def test_anyone_may_open_a_pull_request(guest: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    sha = hub.seed("demo/model", {"a.txt": b"main"})
    add = [CommitOperationAdd("a.txt", b"better"), CommitOperationAdd("b.bin", BIG)]
    commit = guest.create_commit("demo/model", add, commit_message="Better", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert guest.repo_info("demo/model").sha == sha
    assert read(guest, hub, tmp_path, "a.txt", revision="refs/pr/1") == b"better"
    references = guest.list_repo_refs("demo/model", include_pull_requests=True)
    assert [pull.ref for pull in references.pull_requests or []] == ["refs/pr/1"]


def test_squashing_leaves_one_commit_with_the_same_files(api: HfApi, hub: LocalHub) -> None:
    for number in range(3):
        hub.seed("demo/model", {f"{number}.txt": b"x"})
    api.super_squash_history("demo/model", commit_message="All")
    assert [commit.title for commit in api.list_repo_commits("demo/model")] == ["All"]
    assert api.list_repo_files("demo/model") == ["0.txt", "1.txt", "2.txt"]


def test_repositories_can_be_moved_duplicated_hidden_and_deleted(api: HfApi, anonymous: HfApi, hub: LocalHub) -> None:
    hub.seed("demo/model", {"a.txt": b"x"})
    api.move_repo("demo/model", "demo/renamed")
    assert not api.repo_exists("demo/model")
    assert api.duplicate_repo("demo/renamed", to_id="demo/copy").repo_id == "demo/copy"
    api.update_repo_settings("demo/renamed", private=True)
    assert not anonymous.repo_exists("demo/renamed")
    api.delete_repo("demo/renamed")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("demo/renamed")
    assert api.list_repo_files("demo/copy") == ["a.txt"]


def test_the_tree_shows_folders_and_who_changed_what(api: HfApi, hub: LocalHub) -> None:
    first = hub.seed("demo/model", {"a.txt": b"a", "b/c/d.txt": b"d"})
    second = hub.seed("demo/model", {"a.txt": b"changed"})
    tree = {item.path: item for item in api.list_repo_tree("demo/model", expand=True)}
    assert set(tree) == {"a.txt", "b"}
    assert {path: item.last_commit.oid for path, item in tree.items() if item.last_commit} == {
        "a.txt": second,
        "b": first,
    }
    everything = [item.path for item in api.list_repo_tree("demo/model", recursive=True)]
    assert everything == ["b", "b/c", "a.txt", "b/c/d.txt"]
    assert [item.path for item in api.list_repo_tree("demo/model", "b/c")] == ["b/c/d.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("demo/model", "absent"))


def test_absent_things_raise_their_own_errors(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    hub.seed("demo/model", {"a.txt": b"a"})
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("demo/absent")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("demo/model", revision="absent")
    with pytest.raises(RemoteEntryNotFoundError):
        read(api, hub, tmp_path, "absent.txt")


def test_whoami_names_the_user_and_refuses_unknown_tokens(api: HfApi, hub: LocalHub) -> None:
    assert api.whoami()["name"] == "demo"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi(endpoint=hub.endpoint, token="hf_unknown").whoami()


def test_a_private_repository_does_not_exist_for_others(
    api: HfApi, guest: HfApi, anonymous: HfApi, hub: LocalHub, tmp_path: Path
) -> None:
    hub.seed("demo/model", {"a.txt": b"secret"}, private=True)
    assert read(api, hub, tmp_path, "a.txt") == b"secret"
    for other in (guest, anonymous):
        with pytest.raises(RepositoryNotFoundError):
            other.repo_info("demo/model")
        with pytest.raises(RepositoryNotFoundError):
            read(other, hub, tmp_path / "other", "a.txt")
        assert list(other.list_models()) == []


def test_the_files_of_a_gated_repository_need_access(guest: HfApi, api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    hub.seed("demo/model", {"a.txt": b"a"}, gated=True)
    assert guest.repo_info("demo/model").gated == "auto"
    with pytest.raises(GatedRepoError):
        read(guest, hub, tmp_path, "a.txt")
    with pytest.raises(GatedRepoError):
        guest.auth_check("demo/model")
    assert read(api, hub, tmp_path, "a.txt") == b"a"


def test_writing_needs_the_namespace_and_a_token_that_may(guest: HfApi, anonymous: HfApi, hub: LocalHub) -> None:
    hub.seed("demo/model", {"a.txt": b"a"})
    for stranger in (guest, anonymous):
        with pytest.raises(HfHubHTTPError) as error:
            stranger.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="demo/model")
        assert status_of(error) == 403
        with pytest.raises(HfHubHTTPError) as error:
            stranger.auth_check("demo/model", write=True)
        assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        guest.create_repo("demo/other")
    assert status_of(error) == 403


def test_members_write_in_their_organization(api: HfApi) -> None:
    api.create_repo("demo-org/model")
    api.auth_check("demo-org/model", write=True)


def test_a_read_only_token_cannot_write(tmp_path: Path) -> None:
    accounts = {"users": {"hf_w": "demo", "hf_r": "demo"}, "read_only": ["hf_r"]}
    with LocalHub(tmp_path / "h", **accounts) as hub:  # type: ignore[arg-type]
        HfApi(endpoint=hub.endpoint, token="hf_w").create_repo("demo/model", private=True)
        reader = HfApi(endpoint=hub.endpoint, token="hf_r")
        assert reader.repo_exists("demo/model")
        with pytest.raises(HfHubHTTPError) as error:
            reader.auth_check("demo/model", write=True)
        assert status_of(error) == 403


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: [org/a, org/b]
base_model_relation: merge
tags: [merge, hf_merge]
---
# A merge
"""


def test_model_info_tells_what_card_config_and_weights_say(api: HfApi, hub: LocalHub) -> None:
    weights = save({"a": np.zeros((3, 4), np.float16), "b": np.zeros(5, np.float32)})
    hub.seed("demo/model", {"README.md": CARD, "config.json": '{"model_type": "llama"}', "model.safetensors": weights})
    info = api.model_info("demo/model")
    assert info.card_data is not None
    assert info.card_data.base_model == ["org/a", "org/b"]
    assert info.config == {"model_type": "llama"}
    assert info.safetensors is not None
    assert info.safetensors.parameters == {"F16": 12, "F32": 5}
    assert {"merge", "base_model:merge:org/a", "license:apache-2.0"} <= set(info.tags or [])
    assert api.model_info("demo/model", expand=["sha"]).tags is None


def test_lists_follow_filters(api: HfApi, hub: LocalHub) -> None:
    hub.seed("demo/merge", {"README.md": CARD})
    hub.seed("demo/plain", {"a.txt": b"a"})
    hub.seed("org/a", {"a.txt": b"a"})

    def names(**arguments: object) -> list[str]:
        return [model.id for model in api.list_models(**arguments)]  # type: ignore[arg-type]

    assert names(filter=["merge", "base_model:merge:org/a"]) == ["demo/merge"]
    assert names(author="demo") == ["demo/merge", "demo/plain"]
    assert names(search="plain") == ["demo/plain"]
    assert names(author="demo", sort="created_at", limit=1) == ["demo/plain"]


def test_safetensors_headers_come_without_the_weights(api: HfApi, hub: LocalHub) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": save({f"w{n}": np.ones((200, 1000), np.float32)}) for n in (1, 2)}
    weight_map = {f"w{n}": name for n, name in enumerate(shards, 1)}
    index = json.dumps({"metadata": {"total_size": 1_600_000}, "weight_map": weight_map})
    hub.seed("demo/model", {**shards, "model.safetensors.index.json": index})
    by_range = api.get_safetensors_metadata("demo/model")
    assert by_range.weight_map == weight_map
    assert hub.bytes_served("*.safetensors") < 210_000
    at_once = api.get_sharded_safetensors_metadata("demo/model")
    assert at_once.files_metadata == by_range.files_metadata


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: 3", '"license" must be a string'),
        ("license: my-own", '"license" must be one of'),
        ("tags: [1]", '"tags" must be'),
        ("base_model: ./local/folder", '"base_model" with value'),
        ("license: mit\nlicense: mit", "duplicated mapping key"),
        ("a: [", "Invalid YAML"),
        ("model-index:\n- name: x\n  results:\n  - task: {type: t}", "dataset.name"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused(api: HfApi, front: str, message: str) -> None:
    api.create_repo("demo/model")
    card = f"---\n{front}\n---\ntext".encode()
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[")):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="demo/model")


def test_a_card_without_metadata_is_a_warning(api: HfApi) -> None:
    api.create_repo("demo/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"text", path_in_repo="README.md", repo_id="demo/model")


def test_bad_names_are_bad_requests(api: HfApi, hub: LocalHub) -> None:
    hub.seed("demo/model", {"a": b"file"})
    with pytest.raises(BadRequestError, match="a file and a folder"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a/b.txt", repo_id="demo/model")
    with pytest.raises(BadRequestError, match="Invalid reference name"):
        api.create_branch("demo/model", branch="a..b")
