"""Serving files byte by byte, and what hostile requests meet."""

import hashlib
import json
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi

from hf_merge.demo.hub.objects import blob_id
from hf_merge.demo.hub.server import LocalHub

CONTENT = bytes(range(256)) * 8
URL = "/org/model/resolve/main/model.safetensors"


@pytest.fixture
def sha(hub: LocalHub) -> str:
    return hub.seed("org/model", {"model.safetensors": CONTENT, "config.json": b"{}", "empty.bin": b""})


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=100-", 100, 2047),
        ("bytes=-5", 2043, 2047),
        ("bytes=-999999", 0, 2047),
        ("bytes=0-100000", 0, 2047),
        ("bytes=2047-2047", 2047, 2047),
    ],
)
def test_a_range_is_answered_with_exactly_its_bytes(http: httpx2.Client, sha: str, header: str, first: int, last: int) -> None:
    answer = http.get(URL, headers={"range": header})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {first}-{last}/2048"
    assert answer.content == CONTENT[first : last + 1]


@pytest.mark.parametrize("header", ["bytes=2048-", "bytes=9999-10000", "bytes=-0"])
def test_a_range_outside_the_file_is_416(http: httpx2.Client, sha: str, header: str) -> None:
    answer = http.get(URL, headers={"range": header})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */2048"


@pytest.mark.parametrize("header", ["bytes=5-2", "lines=0-1", "bytes=0-1,4-5", "bytes=-"])
def test_a_range_that_makes_no_sense_is_ignored(http: httpx2.Client, sha: str, header: str) -> None:
    answer = http.get(URL, headers={"range": header})
    assert answer.status_code == 200
    assert answer.content == CONTENT


@pytest.mark.parametrize(
    ("name", "content", "etag"),
    [
        ("model.safetensors", CONTENT, hashlib.sha256(CONTENT).hexdigest()),
        ("config.json", b"{}", blob_id(b"{}")),
        ("empty.bin", b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
    ],
)
def test_head_and_get_agree(http: httpx2.Client, sha: str, name: str, content: bytes, etag: str) -> None:
    url = f"/org/model/resolve/main/{name}"
    head, get = http.head(url), http.get(url)
    assert get.content == content
    assert head.headers["etag"] == get.headers["etag"] == f'"{etag}"'
    assert head.headers["content-length"] == get.headers["content-length"] == str(len(content))
    assert head.headers["x-repo-commit"] == sha


@pytest.mark.parametrize(
    "path",
    [
        "/org/model/resolve/main/..%2F..%2F..%2Frepo.json",
        "/org/model/resolve/main/%2e%2e/%2e%2e/repo.json",
        "/org/model/resolve/..%2F..%2Fx/config.json",
        "/..%2F..%2Fetc/passwd/resolve/main/config.json",
        "/api/models/%2e%2e/%2e%2e",
        "/api/models/org/..%2Fmodel",
        "/api/models/org/model/tree/main/..%2F..",
        "/api/models/org/model/revision/%00",
        "/api/models/org/" + "a" * 5000,
    ],
)
def test_paths_that_climb_find_nothing(hub: LocalHub, http: httpx2.Client, sha: str, path: str) -> None:
    request = http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert http.send(request).status_code == 404


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a//b", "a\\b", ".git/config", "nul\0", ""])
def test_file_names_that_climb_are_refused(http: httpx2.Client, sha: str, name: str) -> None:
    header = {"key": "header", "value": {"summary": "s"}}
    file = {"key": "file", "value": {"path": name, "content": "", "encoding": "base64"}}
    answer = http.post(
        "/api/models/org/model/commit/main",
        content="\n".join(map(json.dumps, (header, file))),
        headers={"authorization": "Bearer hf_org"},
    )
    assert answer.status_code == 401
    own = {"authorization": "Bearer hf_local"}
    http.post("/api/repos/create", json={"name": "model", "organization": "demo"}, headers=own)
    answer = http.post("/api/models/demo/model/commit/main", content="\n".join(map(json.dumps, (header, file))), headers=own)
    assert answer.status_code == 400
    assert "Invalid file path" in answer.json()["error"]


@pytest.mark.parametrize("name", ["..", "a/b", "a..b", "-a", "a.git", "a--b", "", "a\nb", "x" * 97])
def test_repository_names_that_are_not_names_are_refused(http: httpx2.Client, name: str) -> None:
    own = {"authorization": "Bearer hf_local"}
    answer = http.post("/api/repos/create", json={"name": name, "organization": "demo"}, headers=own)
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/", "/api/nothing", "/api/models/org/model/nothing", "/nothing/at/all"])
def test_unknown_routes_are_named(http: httpx2.Client, sha: str, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert f"no route GET {path}" in answer.json()["error"]


def test_an_upload_with_other_bytes_than_announced_is_refused(hub: LocalHub, api: HfApi, http: httpx2.Client) -> None:
    api.create_repo("demo/model")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    answer = http.post(
        "/demo/model.git/info/lfs/objects/batch",
        json={"operation": "upload", "objects": [{"oid": sha256, "size": 2048}], "ref": {"name": "main"}},
        headers={"authorization": "Bearer hf_local"},
    )
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    assert http.put(href, content=b"other").status_code == 400
    assert http.put(href.split("?")[0], content=CONTENT).status_code == 403
    assert not list((hub.root / "tmp").iterdir())
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": sha256, "size": 2048}}
    body = "\n".join(map(json.dumps, ({"key": "header", "value": {"summary": "s"}}, line)))
    own = {"authorization": "Bearer hf_local"}
    answer = http.post("/api/models/demo/model/commit/main", content=body, headers=own)
    assert answer.status_code == 400
    assert "never uploaded" in answer.json()["error"]
    assert http.put(href, content=CONTENT).status_code == 200
    assert http.post("/api/models/demo/model/commit/main", content=body, headers=own).status_code == 200


def test_small_answers_do_not_wait_for_acknowledgements(http: httpx2.Client, sha: str) -> None:
    start = time.monotonic()
    for first in range(25):
        http.get(URL, headers={"range": f"bytes={first}-{first}"})
    assert time.monotonic() - start < 25 * 0.035


def test_the_hub_listens_on_the_loopback_alone(hub: LocalHub) -> None:
    assert hub._server is not None
    assert {socket.getsockname()[0] for server in hub._server.servers for socket in server.sockets} == {"127.0.0.1"}


def test_a_folder_can_be_seeded_and_its_files_moved(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "model.safetensors").write_bytes(CONTENT)
    hub.seed("org/copied", folder)
    assert api.list_repo_files("org/copied") == ["model.safetensors", "sub/a.txt"]
    hub.seed("org/moved", folder, move=True, revision="trial")
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert api.list_repo_files("org/moved", revision="trial") == ["model.safetensors", "sub/a.txt"]
