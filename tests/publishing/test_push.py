import hashlib
import json
import pickle
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

from hf_merge import patience
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import PublishError
from hf_merge.patience import TRIES
from hf_merge.publishing.card import render
from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.push import ShardUpload, check_writable, push_collection
from hf_merge.publishing.resume import PushState

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


# Done again after a kill


@pytest.fixture
def state(tmp_path: Path) -> PushState:
    """The notes of one push."""
    return PushState(tmp_path / "pushes", "demo/merge", "a recipe")


@pytest.fixture
def killed(api: HfApi, state: PushState, tmp_path: Path) -> bytes:
    """A push ended after its first shard was uploaded, whose bytes these are."""
    upload, path = ShardUpload(api, "demo/merge", state=state), shard(tmp_path, "model.safetensors")
    content = path.read_bytes()
    upload.add_shard(path)
    return content


@pytest.mark.parametrize("xet", [False, True])
def test_a_shard_that_the_hub_holds_is_committed_without_its_bytes(
    xet: bool, killed: bytes, hub: LocalHub, api: HfApi, state: PushState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.clear_requests()
    upload = ShardUpload(api, "demo/merge", state=state)
    assert upload.has("model.safetensors", len(killed))
    upload.commit({"config.json": b"{}"}, "Merge")
    assert not any(request.method == "PUT" for request in hub.requests())
    assert Path(api.hf_hub_download("demo/merge", "model.safetensors", cache_dir=tmp_path / "c")).read_bytes() == killed
    assert paths(api, "demo/merge") == {"model.safetensors", "config.json"}


def test_a_commit_that_was_made_before_the_kill_is_not_made_twice(killed: bytes, api: HfApi, state: PushState) -> None:
    for _ in range(2):
        upload = ShardUpload(api, "demo/merge", state=state)
        assert upload.has("model.safetensors", len(killed))
        info = upload.commit({"config.json": b"{}"}, "Merge")
    assert sum(commit.title == "Merge" for commit in api.list_repo_commits("demo/merge")) == 1
    assert info.oid == api.model_info("demo/merge").sha


def lose(hub: LocalHub, content: bytes) -> None:
    hub.store.get("models", "demo/merge").objects.path(hashlib.sha256(content).hexdigest()).unlink()


def test_a_shard_that_the_hub_lost_is_made_again(
    killed: bytes, hub: LocalHub, api: HfApi, state: PushState, tmp_path: Path
) -> None:
    lose(hub, killed)
    upload = ShardUpload(api, "demo/merge", state=state)
    assert not upload.has("model.safetensors", len(killed))
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    upload.commit({}, "Merge")
    assert Path(api.hf_hub_download("demo/merge", "model.safetensors", cache_dir=tmp_path / "c")).read_bytes() == killed


def test_a_shard_that_the_hub_loses_before_the_commit_fails_it(
    killed: bytes, hub: LocalHub, api: HfApi, state: PushState
) -> None:
    upload = ShardUpload(api, "demo/merge", state=state)
    assert upload.has("model.safetensors", len(killed))
    lose(hub, killed)
    with pytest.raises(PublishError, match=r"commit to demo/merge failed: .*model\.safetensors"):
        upload.commit({}, "Merge")
    assert sum(request.method == "PUT" for request in hub.requests()) == 1
    assert paths(api, "demo/merge") == set()
    assert not ShardUpload(api, "demo/merge", state=state).has("model.safetensors", len(killed))


def test_a_repository_that_was_deleted_holds_nothing(killed: bytes, api: HfApi, state: PushState) -> None:
    api.delete_repo("demo/merge")
    assert not ShardUpload(api, "demo/merge", state=state).has("model.safetensors", len(killed))


@pytest.mark.parametrize(("name", "more"), [("model.safetensors", 1), ("model-00001-of-00002.safetensors", 0)])
def test_another_shard_is_not_there(name: str, more: int, killed: bytes, api: HfApi, state: PushState) -> None:
    assert not ShardUpload(api, "demo/merge", state=state).has(name, len(killed) + more)


def test_without_notes_nothing_is_there(killed: bytes, api: HfApi) -> None:
    assert not ShardUpload(api, "demo/merge").has("model.safetensors", len(killed))


def test_a_small_shard_is_not_noted_as_it_is_not_there(api: HfApi, state: PushState, tmp_path: Path) -> None:
    upload = ShardUpload(api, "demo/merge", state=state)
    (tmp_path / "weights.txt").write_text("small")
    upload.add_shard(tmp_path / "weights.txt")
    assert not ShardUpload(api, "demo/merge", state=state).has("weights.txt", 5)


# Several processes


def test_one_process_commits_the_shards_of_all(api: HfApi, tmp_path: Path) -> None:
    names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "small.txt"}
    uploads = [ShardUpload(api, "demo/merge") for _ in names]
    for upload, name in zip(uploads, names, strict=True):
        upload.add_shard(shard(tmp_path, name, size=64 if name == "small.txt" else 40_000))
    shards = [found for upload in uploads for found in pickle.loads(pickle.dumps(upload.finished()))]
    uploads[0].commit({"config.json": b"{}"}, "Merge", also=shards)
    assert paths(api, "demo/merge") == {*names, "config.json"}
    for name in names:
        got = Path(api.hf_hub_download("demo/merge", name, cache_dir=tmp_path / "c")).read_bytes()
        assert got == shard(tmp_path, name, size=len(got)).read_bytes()


# A Hub that misbehaves


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited, by us; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=found.append))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    return found


FAULTS: list[dict[str, Any]] = [
    {"kind": "status", "status": 503},
    {"kind": "status", "status": 429, "retry_after": 2},
    {"kind": "cut", "at": 0},
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "path", ["/_lfs/*/*[!y]", "/_lfs/*/verify", "*/objects/batch", "*/preupload/*", "*/commit/*", "*/repos/create"]
)
def test_a_hub_that_puts_off_gets_the_same_bytes_in_one_commit(
    path: str, fault: dict[str, Any], hub: LocalHub, api: HfApi, tmp_path: Path, waits: list[float]
) -> None:
    # The library asks again six times by itself, but for commits and new repositories.
    times = TRIES - 1 if path.endswith(("commit/*", "create")) else 8
    hub.fault(path=path, times=times, **fault)
    upload, made = ShardUpload(api, "demo/merge"), shard(tmp_path, "model.safetensors", size=400_000)
    content = made.read_bytes()
    upload.add_shard(made)
    upload.commit({"config.json": b"{}"}, "Merge")
    assert sum(request.fault is not None for request in hub.requests()) >= TRIES - 1
    assert Path(api.hf_hub_download("demo/merge", "model.safetensors", cache_dir=tmp_path / "c")).read_bytes() == content
    assert sum(commit.title == "Merge" for commit in api.list_repo_commits("demo/merge")) == 1


@pytest.mark.parametrize("at", [1, 100_000, 399_999])
def test_an_upload_that_is_cut_in_the_middle_arrives_whole(
    at: int, hub: LocalHub, api: HfApi, tmp_path: Path, waits: list[float]
) -> None:
    hub.fault("cut", "/_lfs/*", method="PUT", at=at)
    upload, made = ShardUpload(api, "demo/merge"), shard(tmp_path, "model.safetensors", size=400_000)
    content = made.read_bytes()
    upload.add_shard(made)
    upload.commit({}, "Merge")
    assert Path(api.hf_hub_download("demo/merge", "model.safetensors", cache_dir=tmp_path / "c")).read_bytes() == content


@pytest.mark.parametrize("path", ["/_lfs/*", "*/commit/*"])
def test_a_hub_that_puts_off_for_ever_is_given_up_and_shows_nothing(
    path: str, hub: LocalHub, upload: ShardUpload, api: HfApi, tmp_path: Path, waits: list[float]
) -> None:
    hub.fault("status", path, status=503, times=None)

    def push() -> None:
        upload.add_shard(shard(tmp_path, "model.safetensors"))
        upload.commit({}, "Merge")

    with pytest.raises(PublishError, match=r"could not be uploaded to demo/merge|commit to demo/merge failed: .*503"):
        push()
    assert len(waits) == TRIES - 1
    assert paths(api, "demo/merge") == set()


class Forgetful(HfApi):
    """A client whose first commit is made, though the answer is lost on the way."""

    commits = 0

    def create_commit(self, *given: Any, **more: Any) -> CommitInfo:
        self.commits += 1
        info = super().create_commit(*given, **more)
        if self.commits == 1:
            answer = _http.get_session().get(f"{self.endpoint}/nothing")
            answer.status_code = 504
            raise HfHubHTTPError("Gateway timeout", response=answer)
        return info


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(hub: LocalHub, tmp_path: Path, waits: list[float]) -> None:
    api = Forgetful(endpoint=hub.endpoint, token="hf_local")
    hub.seed("demo/merge", {"notes.txt": "x"}, message="Merge")
    upload = ShardUpload(api, "demo/merge")
    upload.add_shard(shard(tmp_path, "model.safetensors"))
    info = upload.commit({"config.json": b"{}"}, "Merge")
    assert api.commits == 1
    assert info.oid == api.model_info("demo/merge").sha
    assert str(info) == f"{hub.endpoint}/demo/merge/commit/{info.oid}"
    assert paths(api, "demo/merge") == {"notes.txt", "model.safetensors", "config.json"}


@pytest.mark.parametrize("path", ["*/whoami-v2", "*/auth-check*"])
def test_the_question_whether_we_may_write_is_asked_again(path: str, hub: LocalHub, api: HfApi, waits: list[float]) -> None:
    hub.seed("demo/mine", {"README.md": "x"})
    hub.fault("status", path, status=429, retry_after=3, times=2)
    assert check_writable("demo/mine", api) == "demo/mine"
    assert waits == [3, 3]


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
