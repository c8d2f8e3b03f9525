"""Misbehavior and the record of requests, in this process and over HTTP."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from hf_merge.demo.hub.faults import Fault
from hf_merge.demo.hub.server import LocalHub

CONTENT = bytes(range(256)) * 8000
URL = "/org/model/resolve/main/model.safetensors"


@pytest.fixture(scope="module", params=["thread", "process"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub")
    with LocalHub(root) if request.param == "thread" else LocalHub.spawn(root) as hub:
        hub.seed("org/model", {"model.safetensors": CONTENT, "config.json": b"{}"})
        yield hub


@pytest.fixture
def hub(shared: LocalHub) -> LocalHub:
    shared.clear_faults()
    shared.clear_requests()
    return shared


def test_a_cut_transfer_ends_at_the_byte_that_was_named(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("cut", "*.safetensors", at=1000)
    received = bytearray()
    with http.stream("GET", URL) as answer:
        assert answer.headers["content-length"] == str(len(CONTENT))
        with pytest.raises(httpx2.RemoteProtocolError):
            deque(map(received.extend, answer.iter_raw()))
    assert bytes(received) == CONTENT[:1000]
    assert hub.bytes_served(URL) == 1000
    assert http.get(URL).content == CONTENT


def test_a_download_survives_a_cut(hub: LocalHub, tmp_path: Path) -> None:
    hub.fault("cut", "*.safetensors", at=1_500_000)
    path = hf_hub_download("org/model", "model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == CONTENT
    gets = [request for request in hub.requests() if request.method == "GET"]
    assert [(request.fault, request.bytes_served) for request in gets] == [("cut", 1_500_000), (None, len(CONTENT))]


def test_an_upload_can_be_cut(hub: LocalHub, http: httpx2.Client) -> None:
    api = HfApi(endpoint=hub.endpoint, token="hf_local")
    api.create_repo("demo/upload", exist_ok=True)
    content = CONTENT + b"upload"
    sha256 = hashlib.sha256(content).hexdigest()
    answer = http.post(
        "/demo/upload.git/info/lfs/objects/batch",
        json={"operation": "upload", "objects": [{"oid": sha256, "size": len(content)}], "ref": {"name": "main"}},
        headers={"authorization": "Bearer hf_local"},
    )
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    hub.fault("cut", "/_lfs/*", method="PUT", at=100_000)
    with pytest.raises(httpx2.TransportError):
        http.put(href, content=content)
    (put,) = [request for request in hub.requests() if request.method == "PUT"]
    assert 100_000 < put.bytes_received < len(content)
    assert put.status == 0
    assert http.put(href, content=content).status_code == 200


@pytest.mark.parametrize(("status", "retry_after"), [(429, 7), (503, None), (500, None), (403, None)])
def test_any_status_can_be_asked_for(hub: LocalHub, http: httpx2.Client, status: int, retry_after: float | None) -> None:
    hub.fault("status", "*.safetensors", status=status, retry_after=retry_after, times=2)
    for _ in range(2):
        answer = http.get(URL)
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == (None if retry_after is None else str(retry_after))
    assert http.get(URL).status_code == 200


def test_a_refused_upload_gets_its_answer(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("status", "/_lfs/*", status=503)
    assert http.put("/_lfs/models/org/model/x", content=CONTENT).status_code == 503
    assert [request.bytes_received for request in hub.requests()] == [len(CONTENT)]


def test_a_slow_transfer_takes_its_time(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("slow", "*.safetensors", bytes_per_second=4_000_000)
    start = time.monotonic()
    assert http.get(URL).content == CONTENT
    assert time.monotonic() - start > 0.4
    hub.fault("slow", "*.json", delay=0.2)
    start = time.monotonic()
    http.get("/org/model/resolve/main/config.json")
    assert time.monotonic() - start > 0.2


def test_a_wrong_content_range_and_an_ignored_range(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("wrong_range", "*.safetensors")
    hub.fault("ignore_range", "*.safetensors")
    assert http.get(URL).status_code == 200
    wrong = http.get(URL, headers={"range": "bytes=10-19"})
    assert (wrong.status_code, wrong.headers["content-range"]) == (206, f"bytes 11-20/{len(CONTENT)}")
    assert wrong.content == CONTENT[10:20]
    ignored = http.get(URL, headers={"range": "bytes=10-19"})
    assert (ignored.status_code, ignored.content) == (200, CONTENT)
    assert http.get(URL, headers={"range": "bytes=10-19"}).headers["content-range"].startswith("bytes 10-19/")


def test_one_byte_is_corrupted_wherever_it_lies(hub: LocalHub, http: httpx2.Client) -> None:
    position = (1 << 20) + 5
    hub.fault("corrupt", "*.safetensors", at=position)
    wrong = http.get(URL).content
    assert [index for index, pair in enumerate(zip(wrong, CONTENT, strict=True)) if pair[0] != pair[1]] == [position]


def test_a_fault_waits_for_a_request_it_can_touch(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("cut", "*.safetensors", at=1000)
    http.head(URL)
    assert len(http.get(URL, headers={"range": "bytes=0-7"}).content) == 8
    with pytest.raises(httpx2.RemoteProtocolError):
        http.get(URL)


def test_skip_and_method_and_regular_expressions_choose_the_request(hub: LocalHub, http: httpx2.Client) -> None:
    hub.fault("status", r"resolve/[^/]+/model\.", regex=True, method="GET", skip=1, times=None)
    statuses = [http.head(URL).status_code, *(http.get(URL).status_code for _ in range(3))]
    assert statuses == [200, 200, 503, 503]
    assert http.get("/org/model/resolve/main/config.json").status_code == 200
    hub.clear_faults()
    assert http.get(URL).status_code == 200


def test_records_tell_everything_but_the_token(hub: LocalHub, http: httpx2.Client) -> None:
    agent = {"user-agent": "hf_merge/0.1", "range": "bytes=0-99", "authorization": "Bearer hf_local"}
    http.get(URL + "?download=true", headers=agent)
    (record,) = hub.requests()
    assert (record.method, record.path, record.query, record.status) == ("GET", URL, "download=true", 206)
    assert (record.range, record.user_agent, record.authorized) == ("bytes=0-99", "hf_merge/0.1", True)
    assert record.bytes_served == hub.bytes_served("*.safetensors") == 100
    assert "hf_local" not in repr(record)
    hub.clear_requests()
    assert hub.requests() == []


def test_the_admin_routes_speak_json(hub: LocalHub, http: httpx2.Client) -> None:
    assert http.post("/_local/faults", json={"kind": "status", "path": "*.json", "status": 418}).status_code == 200
    assert http.get("/org/model/resolve/main/config.json").status_code == 418
    assert http.post("/_local/faults", json={"kind": "explode"}).status_code == 400
    assert http.post("/_local/faults", json={"kind": "cut", "bytes": 3}).status_code == 400
    assert [entry["status"] for entry in http.get("/_local/log").json()] == [418]
    assert {repo["id"] for repo in http.get("/_local/repos").json()} >= {"org/model"}


def test_the_client_retries_what_it_should(hub: LocalHub) -> None:
    hub.fault("status", "*/tree/*", status=503)
    api = HfApi(endpoint=hub.endpoint, token=False)
    assert api.list_repo_files("org/model") == ["config.json", "model.safetensors"]
    hub.fault("status", "/api/models/*", status=404)
    with pytest.raises(HfHubHTTPError):
        api.repo_info("org/model")


@pytest.mark.parametrize("arguments", [{"kind": "explode"}])
def test_an_unknown_fault_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Unknown fault"):
        Fault(**arguments)
