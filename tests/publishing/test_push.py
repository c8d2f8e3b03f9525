import hashlib
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import PublishError
from hf_merge.publishing.card import render
from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.push import ShardUpload, check_writable, push_collection

SECRET = "hf_secretsecretsecret"


def shard(folder: Path, name: str, size: int = 40_000) -> Path:
    path = folder / name
    path.write_bytes(hashlib.sha256(name.encode()).digest() * (size // 32))
    return path


def paths(api: HfApi, repo_id: str, revision: str | None = None) -> set[str]:
    return set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes"}


# May we


@pytest.mark.parametrize("repo_id", ["demo/new", "demo-org/new"])
def test_a_repository_that_may_be_created_is_not_created_by_asking(api: HfApi, repo_id: str) -> None:
    assert check_writable(repo_id, api) == repo_id
    assert not api.repo_exists(repo_id)


def test_an_id_without_a_namespace_gets_the_users(api: HfApi) -> None:
    assert check_writable("new", api) == "demo/new"


def test_ones_own_repository_may_be_written(hub: LocalHub, api: HfApi) -> None:
    hub.seed("demo/mine", {"README.md": "x"})
    assert check_writable("demo/mine", api) == "demo/mine"


def test_the_repository_of_others_may_not_be_written(hub: LocalHub, guest: HfApi) -> None:
    hub.seed("demo/mine", {"README.md": "x"})
    with pytest.raises(PublishError, match="'guest' may not write to demo/mine, which exists"):
        check_writable("demo/mine", guest)


def test_the_repository_of_others_is_good_enough_for_a_pull_request(hub: LocalHub, guest: HfApi) -> None:
    hub.seed("demo/mine", {"README.md": "x"})
    assert check_writable("demo/mine", guest, create_pr=True) == "demo/mine"


def test_a_pull_request_needs_a_repository(api: HfApi) -> None:
    with pytest.raises(PublishError, match="needs a repository to open it in"):
        check_writable("demo/absent", api, create_pr=True)


def test_a_foreign_namespace_is_refused_with_the_users_own(api: HfApi) -> None:
    with pytest.raises(PublishError, match="'demo' may write in these namespaces: demo, demo-org"):
        check_writable("somebody/new", api)


def test_a_read_only_token_is_refused(tmp_path: Path) -> None:
    with LocalHub(tmp_path, users={"hf_reader": "demo"}, read_only=("hf_reader",)) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_reader")
        with pytest.raises(PublishError, match="may only read"):
            check_writable("demo/new", api)


def test_no_token_is_told_with_how_to_log_in(hub: LocalHub, anonymous: HfApi) -> None:
    with pytest.raises(PublishError, match=r"there is none\. Log in with `hf auth login`"):
        check_writable("demo/new", anonymous)


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}\n"])
def test_no_error_shows_the_token(hub: LocalHub, token: str) -> None:
    with pytest.raises(PublishError) as caught:
        check_writable("demo/new", HfApi(endpoint=hub.endpoint, token=token))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("repo_id", ["a b", "a/b/c", "", "a--b", "demo/x.git"])
def test_a_bad_id_is_refused_without_asking(hub: LocalHub, api: HfApi, repo_id: str) -> None:
    with pytest.raises(PublishError, match="not the id of a repository"):
        check_writable(repo_id, api)
    assert hub.requests() == []


def test_a_public_repository_is_no_place_for_a_private_merge(hub: LocalHub, api: HfApi) -> None:
    hub.seed("demo/mine", {"README.md": "x"})
    with pytest.raises(PublishError, match="exists and is public"):
        check_writable("demo/mine", api, private=True)


def test_a_hub_that_cannot_be_reached_is_told() -> None:
    with pytest.raises(PublishError, match="did not say whose token"):
        check_writable("demo/new", HfApi(endpoint="http://127.0.0.1:9", token="hf_local"))


# Shard by shard


@pytest.fixture
def upload(api: HfApi) -> ShardUpload:
    return ShardUpload(api, "demo/merge")


def test_a_shard_is_deleted_here_once_it_is_there(upload: ShardUpload, tmp_path: Path) -> None:
    path = shard(tmp_path, "model-00001-of-00002.safetensors")
    upload.add_shard(path)
    assert not path.exists()


def test_nothing_is_to_be_seen_before_the_commit(upload: ShardUpload, api: HfApi, tmp_path: Path) -> None:
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    assert paths(api, "demo/merge") == set()


def test_shards_and_files_arrive_in_one_commit(upload: ShardUpload, api: HfApi, tmp_path: Path) -> None:
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    digests = {name: hashlib.sha256(shard(tmp_path, name).read_bytes()).hexdigest() for name in names}
    for name in names:
        upload.add_shard(tmp_path / name)
    before = len(api.list_repo_commits("demo/merge"))
    info = upload.commit({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, "Merge")
    assert paths(api, "demo/merge") == {*names, "config.json", "model.safetensors.index.json"}
    assert {
        f.rfilename: f.lfs.sha256 for f in api.model_info("demo/merge", files_metadata=True).siblings or () if f.lfs
    } == digests
    assert len(api.list_repo_commits("demo/merge")) == before + 1
    assert info.oid == api.model_info("demo/merge").sha
    assert str(info).endswith(f"/demo/merge/commit/{info.oid}")


def test_shards_may_come_from_several_threads(upload: ShardUpload, api: HfApi, tmp_path: Path) -> None:
    made = [shard(tmp_path, f"model-{k:05d}-of-00004.safetensors") for k in range(1, 5)]
    names = {path.name for path in made}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload.add_shard, made))
    upload.commit({}, "Merge")
    assert paths(api, "demo/merge") == names


def test_a_shard_too_small_for_lfs_arrives_too(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    upload = ShardUpload(api, "demo/merge")
    path = tmp_path / "weights.txt"
    path.write_text("small")
    upload.add_shard(path)
    upload.commit({}, "Merge")
    assert hub.store.get("models", "demo/merge") is not None
    assert Path(api.hf_hub_download("demo/merge", "weights.txt", cache_dir=tmp_path / "cache")).read_text() == "small"


def test_what_an_earlier_merge_left_is_removed(hub: LocalHub, upload: ShardUpload, api: HfApi, tmp_path: Path) -> None:
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "front.json", "notes.txt", "onnx/model.onnx"]
    hub.seed("demo/merge", dict.fromkeys(old, "old"))
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    upload.commit({"config.json": b"{}"}, "Merge")
    assert paths(api, "demo/merge") == {"model.safetensors", "config.json", "notes.txt", "onnx/model.onnx"}


def test_a_push_done_again_sends_no_shard_twice(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    ShardUpload(api, "demo/merge").add_shard(shard(tmp_path, "model.safetensors"))
    hub.clear_requests()
    again = ShardUpload(api, "demo/merge")
    again.add_shard(shard(tmp_path, "model.safetensors"))
    again.commit({}, "Merge")
    assert not any(request.method == "PUT" for request in hub.requests())
    assert paths(api, "demo/merge") == {"model.safetensors"}


def test_a_branch_is_made_for_a_revision(api: HfApi, tmp_path: Path) -> None:
    upload = ShardUpload(api, "demo/merge", revision="trial/7")
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    upload.commit({}, "Merge")
    assert paths(api, "demo/merge", "trial/7") == {"model.safetensors"}
    assert paths(api, "demo/merge") == set()


def test_a_guest_can_open_a_pull_request(hub: LocalHub, guest: HfApi, tmp_path: Path) -> None:
    hub.seed("demo/merge", {"README.md": "x"})
    upload = ShardUpload(guest, "demo/merge", create_pr=True)
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    info = upload.commit({}, "Merge")
    assert info.pr_revision == "refs/pr/1"
    assert paths(guest, "demo/merge") == {"README.md"}


def test_a_private_repository_is_private(api: HfApi, tmp_path: Path) -> None:
    upload = ShardUpload(api, "demo/merge", private=True)
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    assert api.model_info("demo/merge").private


def test_a_bare_name_is_completed_when_the_repository_is_made(api: HfApi, tmp_path: Path) -> None:
    upload = ShardUpload(api, "merge")
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    upload.commit({}, "Merge")
    assert upload.repo_id == "demo/merge"


def test_what_the_hub_refuses_is_a_publish_error_and_the_shard_stays(guest: HfApi, tmp_path: Path) -> None:
    path = shard(tmp_path, "model.safetensors")
    with pytest.raises(PublishError, match="demo/merge could not be created"):
        ShardUpload(guest, "demo/merge").add_shard(path)
    assert path.exists()


def test_bad_front_matter_is_refused_before_the_commit(upload: ShardUpload, api: HfApi) -> None:
    with pytest.raises(PublishError, match="commit to demo/merge failed"):
        upload.commit({"README.md": b"---\nlicense: [\n---\n"}, "Merge")
    assert paths(api, "demo/merge") == set()


def test_requests_carry_our_name(hub: LocalHub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token="hf_local", library_name="hf_merge", library_version="0.1.0")
    upload = ShardUpload(api, "demo/merge")
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    upload.commit({}, "Merge")
    commits = [r for r in hub.requests() if "/commit/" in r.path]
    assert len(commits) == 1
    assert commits[0].user_agent.startswith("hf_merge/0.1.0")


# A folder, a collection


def test_a_published_card_is_understood_by_the_hub(api: HfApi, tmp_path: Path, facts: CardFacts) -> None:
    upload = ShardUpload(api, "demo/tiny-merge")
    upload.commit({"README.md": str(render(facts)).encode()}, "Merge")
    data = api.model_info("demo/tiny-merge").card_data
    assert data is not None
    assert data.license == "apache-2.0"
    path = api.hf_hub_download("demo/tiny-merge", "README.md", cache_dir=tmp_path)
    assert ModelCard.load(path).content == render(facts).content


def test_a_collection_holds_the_points_in_order_with_notes(hub: LocalHub, api: HfApi) -> None:
    for name in ("a", "b"):
        hub.seed(f"demo/{name}", {"README.md": "x"})
    slug = push_collection("Front", [("demo/b", "knee"), ("demo/a", "x" * 900)], api, description="d" * 400)
    found = api.get_collection(slug)
    assert [(item.item_id, (item.note or "")[:4]) for item in found.items] == [("demo/b", "knee"), ("demo/a", "xxxx")]


def test_a_collection_of_the_same_title_is_added_to(hub: LocalHub, api: HfApi) -> None:
    for name in ("a", "b"):
        hub.seed(f"demo/{name}", {"README.md": "x"})
    first = push_collection("Front", [("demo/a", "")], api)
    assert push_collection("Front", [("demo/a", ""), ("demo/b", "")], api) == first
    assert json.dumps([item.item_id for item in api.get_collection(first).items]) == '["demo/a", "demo/b"]'
