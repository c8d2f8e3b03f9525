"""Reading from a Hub that misbehaves: the right bytes or an error that says what to do, and never a token in it."""

import gzip
import json
import logging
import mmap
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from httpx2 import Timeout
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import save, save_file
from torch import Tensor

from hf_merge import patience
from hf_merge.checkpoints import hub as hub_module
from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.checkpoints.hub import LARGE, HubFiles
from hf_merge.demo.hub.faults import RequestRecord
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.patience import LONGEST_WAIT, TRIES

TENSORS = {"a": torch.arange(150_000, dtype=torch.float32).reshape(300, 500), "b": torch.arange(7).to(torch.bfloat16)}
SAVED = bytes(save(TENSORS))
CONFIG = b'{"model_type": "of_next_year"}'
NUMBERS = count()
SHARD = "*.safetensors"
LOOKUP = r"^/api/models/[^/]+/[^/]+(/revision/.*)?$"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def model(hub: LocalHub) -> Checkpoint:
    """A model on the Hub whose headers are read; what follows are reads of tensors."""
    repo_id = f"reading/{next(NUMBERS)}"
    hub.seed(repo_id, {"model.safetensors": SAVED, "config.json": CONFIG})
    opened = Checkpoint(ModelRef(repo_id))
    assert opened.index.tensors.keys() == TENSORS.keys()
    hub.clear_requests()
    return opened


def reads(hub: LocalHub) -> list[RequestRecord]:
    return [request for request in hub.requests() if request.path.endswith(".safetensors")]


def flat(name: str) -> Tensor:
    return TENSORS[name].reshape(-1)


# Transfers that go wrong


def test_a_tensor_is_read_by_one_request_for_its_bytes(model: Checkpoint, hub: LocalHub) -> None:
    assert torch.equal(model.read("a", 1000, 3000), flat("a")[1000:3000])
    start = model.index.tensors["a"].start + 4000
    assert [(request.range, request.bytes_served) for request in reads(hub)] == [(f"bytes={start}-{start + 7999}", 8000)]


@pytest.mark.parametrize("at", [0, 1, 1001, 300_000, 599_999])
def test_a_transfer_that_is_cut_goes_on_where_it_broke(at: int, model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("cut", SHARD, at=at)
    assert torch.equal(model.read("a"), flat("a"))
    entry = model.index.tensors["a"]
    assert [request.range for request in reads(hub)] == [
        f"bytes={entry.start}-{entry.stop - 1}",
        f"bytes={entry.start + at}-{entry.stop - 1}",
    ]
    assert hub.bytes_served(SHARD) == entry.nbytes
    assert len(waits) == 1


def test_cuts_are_counted_only_while_nothing_arrives(model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("cut", SHARD, at=50_000, times=TRIES + 4)
    assert torch.equal(model.read("a"), flat("a"))
    assert len(reads(hub)) == TRIES + 5
    assert max(waits) < 1


def test_a_transfer_that_never_starts_is_given_up(model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("cut", SHARD, at=0, times=None)
    with pytest.raises(CheckpointError, match=rf"after {TRIES} tries"):
        model.read("a")
    assert len(reads(hub)) == TRIES


def test_a_transfer_that_stalls_is_asked_for_again(
    model: Checkpoint, hub: LocalHub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "TIMEOUT", Timeout(0.2))
    hub.fault("slow", SHARD, delay=1)
    assert torch.equal(model.read("a"), flat("a"))
    assert len(reads(hub)) == 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(status: int, model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("status", SHARD, status=status, times=2)
    assert torch.equal(model.read("b"), flat("b"))
    assert len(reads(hub)) == 3
    first, second = waits
    assert 0.2 < first <= 0.5 <= second <= 1


@pytest.mark.parametrize(("asked", "waited"), [(0, 0), (3, 3), (29.5, 29.5), (3600, LONGEST_WAIT)])
def test_the_wait_that_the_server_asks_for_is_kept_but_not_without_end(
    asked: float, waited: float, model: Checkpoint, hub: LocalHub, waits: list[float]
) -> None:
    hub.fault("status", SHARD, status=429, retry_after=asked)
    assert torch.equal(model.read("b"), flat("b"))
    assert waits == [waited]


def test_a_server_that_stays_busy_is_given_up_with_the_file_and_the_repository_named(
    model: Checkpoint, hub: LocalHub, waits: list[float]
) -> None:
    hub.fault("status", SHARD, status=503, times=None)
    with pytest.raises(CheckpointError, match=rf"^{model.label}: bytes \d+-\d+ of model.safetensors .* answered 503"):
        model.read("a")
    assert len(reads(hub)) == TRIES
    assert len(waits) == TRIES - 1
    assert waits == sorted(waits)


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_not_asked_again(status: int, model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("status", SHARD, status=status, times=None)
    with pytest.raises(CheckpointError, match=rf"{model.label}: model.safetensors cannot be read: (.|\n)*{status}"):
        model.read("a")
    assert (len(reads(hub)), waits) == (1, [])


@pytest.mark.parametrize("kind", ["wrong_range", "ignore_range"])
def test_other_bytes_than_asked_for_are_never_taken(kind: str, model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault(kind, SHARD, times=2)  # type: ignore[arg-type]
    assert torch.equal(model.read("a", 10, 20), flat("a")[10:20])
    hub.fault(kind, SHARD, times=None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"asked for bytes \d+-\d+ of \d+, the server sent"):
        model.read("a", 10, 20)


def test_a_whole_file_may_come_without_a_range(model: Checkpoint, hub: LocalHub, waits: list[float]) -> None:
    hub.fault("ignore_range", "*config.json", times=None)
    assert model.config == json.loads(CONFIG)
    assert waits == []


@pytest.mark.parametrize("fault", ["cut", "status"])
def test_headers_and_small_files_are_as_patient_as_tensors(fault: str, hub: LocalHub, waits: list[float]) -> None:
    hub.seed("reading/small", {"model.safetensors": SAVED, "config.json": CONFIG})
    hub.fault(fault, "*/resolve/*", times=2, at=5)  # type: ignore[arg-type]
    opened = Checkpoint(ModelRef("reading/small"))
    assert opened.config == json.loads(CONFIG)
    assert opened.index.tensors["a"].shape == (300, 500)
    assert len(waits) == 2


@pytest.mark.parametrize("size", [LARGE - 1, LARGE])
def test_only_large_reads_take_pages_of_their_own(size: int, hub: LocalHub) -> None:
    content = bytes(range(256)) * (LARGE // 256)
    hub.seed("reading/large", {"data": content})
    data = HubFiles(ModelRef("reading/large"), hub_api()).read_bytes("data", 0, size)
    assert isinstance(data, mmap.mmap) == (size >= LARGE)
    assert bytes(data) == content[:size]


# Looking a model up


@pytest.mark.parametrize(("status", "retry_after", "waited"), [(429, 4, [4, 4]), (503, None, None), (500, None, None)])
def test_a_lookup_that_the_hub_puts_off_is_asked_again(
    status: int, retry_after: float | None, waited: list[float] | None, hub: LocalHub, waits: list[float]
) -> None:
    repo_id = f"reading/busy{status}"
    sha = hub.seed(repo_id, {"model.safetensors": SAVED})
    hub.fault("status", LOOKUP, regex=True, status=status, times=2, retry_after=retry_after)
    assert Checkpoint(ModelRef(repo_id)).commit == sha
    assert len(waits) == 2
    assert waited in (None, waits)


@pytest.mark.parametrize("status", [429, 503])
def test_a_lookup_that_is_put_off_for_ever_is_given_up(status: int, hub: LocalHub, waits: list[float]) -> None:
    repo_id = f"reading/never{status}"
    hub.seed(repo_id, {"model.safetensors": SAVED})
    hub.fault("status", LOOKUP, regex=True, status=status, times=None)
    with pytest.raises(CheckpointError, match=rf"(?s){repo_id}.*{status}"):
        Checkpoint(ModelRef(repo_id))
    assert len(hub.requests()) == TRIES


def test_a_model_is_read_at_the_commit_that_it_had_when_it_was_opened(model: Checkpoint, hub: LocalHub) -> None:
    hub.seed(model.ref.id, {"model.safetensors": save({"a": -TENSORS["a"], "b": TENSORS["b"]}), "config.json": b"{}"})
    assert torch.equal(model.read("a"), flat("a"))
    assert model.config == json.loads(CONFIG)
    assert model.ref.revision == model.commit
    assert torch.equal(Checkpoint(ModelRef(model.ref.id)).read("a"), -flat("a"))


def test_a_branch_is_a_revision(hub: LocalHub) -> None:
    hub.seed("reading/branches", {"model.safetensors": SAVED})
    sha = hub.seed("reading/branches", {"model.safetensors": save({"c": torch.ones(1)})}, revision="v2")
    opened = Checkpoint(ModelRef.parse("reading/branches@v2"))
    assert opened.commit == sha
    assert opened.index.tensors.keys() == {"c"}


# Refusals say what to do


@pytest.fixture
def closed(hub: LocalHub) -> LocalHub:
    """Repositories of a user, of whom the tests' token is, and of somebody else."""
    files = {"model.safetensors": SAVED, "config.json": CONFIG}
    for owner in ("demo", "somebody"):
        hub.seed(f"{owner}/private", files, private=True)
        hub.seed(f"{owner}/gated", files, gated=True)
    hub.clear_requests()
    return hub


REFUSED = [
    ("somebody/private", r"somebody/private is not on http\S+, or is private: check the name, or log in"),
    ("somebody/nothing", r"somebody/nothing is not on http\S+, or is private: check the name, or log in"),
    ("somebody/gated", r"somebody/gated is gated: accept its terms at http\S+/somebody/gated and log in"),
    ("demo/gated@v9", r"demo/gated has no revision 'v9'"),
    ("demo/gated@" + "a" * 40, r"demo/gated has no revision 'a{40}'"),
    ("demo/nothing@" + "a" * 40, r"demo/nothing is not on http\S+, or is private"),
]


@pytest.mark.parametrize(("name", "said"), REFUSED)
def test_a_model_that_may_not_be_read_is_refused_with_what_to_do(name: str, said: str, closed: LocalHub) -> None:
    with pytest.raises(CheckpointError, match=said):
        _ = Checkpoint(ModelRef.parse(name)).index


@pytest.mark.parametrize("name", ["demo/private", "demo/gated"])
def test_without_a_token_only_what_is_public_is_read(name: str, closed: LocalHub) -> None:
    assert torch.equal(Checkpoint(ModelRef(name)).read("b"), flat("b"))
    assert torch.equal(Checkpoint(ModelRef(name), hub_api(closed.token)).read("b"), flat("b"))
    with pytest.raises(CheckpointError, match="log in"):
        _ = Checkpoint(ModelRef(name), hub_api(False)).index


def test_a_token_that_nobody_has_is_told_from_a_model_that_is_not_there(closed: LocalHub) -> None:
    with pytest.raises(CheckpointError, match="Invalid credentials"):
        Checkpoint(ModelRef("demo/gated"), hub_api("hf_mistyped"))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, {}) for name, _ in REFUSED),
        ("demo/gated", {"kind": "status", "status": 503}),
        ("demo/gated", {"kind": "status", "status": 404}),
        ("demo/gated", {"kind": "cut"}),
        ("demo/private", {"kind": "wrong_range"}),
    ],
)
def test_a_token_is_never_said_logged_or_shown(
    name: str, fault: dict[str, Any], closed: LocalHub, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    token = closed.token
    caplog.set_level(logging.DEBUG)
    if fault:
        closed.fault(path="*/resolve/*", times=None, **fault)
    with pytest.raises(CheckpointError) as caught:
        _ = Checkpoint(ModelRef.parse(name), hub_api(token)).index
    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    opened = Checkpoint(ModelRef("demo/gated"), hub_api(token))
    assert token not in said + repr(opened) + repr(opened.files) + str(vars(opened))
    assert any(request.authorized for request in closed.requests())
    assert caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize("around", ["{}\n", " {} ", "{}\r\n"])
def test_spaces_around_a_token_are_no_part_of_it(around: str, closed: LocalHub) -> None:
    assert Checkpoint(ModelRef("demo/private"), hub_api(around.format(closed.token))).config == json.loads(CONFIG)


@pytest.mark.parametrize("token", ["hf_one\nhf_two", "hf_\x00secret", "hf_grün"])
def test_a_token_that_no_header_can_carry_is_refused_without_repeating_it(token: str) -> None:
    with pytest.raises(RecipeError, match="token") as caught:
        hub_api(token)
    assert not any(part in str(caught.value) for part in (token, "hf_one", "hf_two", "secret", "grün"))


@pytest.fixture
def forwarding() -> Iterator[tuple[str, dict[str, str | None]]]:
    """A server that forwards to another name of itself, as the Hub does to its storage; and the tokens that each name got."""
    data, seen = SAVED, {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host, _, port = self.headers["Host"].partition(":")
            seen[host] = self.headers["Authorization"]
            first, last = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(302 if host == "127.0.0.1" else 206)
            if host == "127.0.0.1":
                self.send_header("Location", f"http://localhost:{port}/storage")
            body = b"" if host == "127.0.0.1" else data[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_token_stays_with_the_hub_when_it_forwards_to_its_storage(
    forwarding: tuple[str, dict[str, str | None]],
) -> None:
    endpoint, seen = forwarding
    files = HubFiles(ModelRef("org/model", "a" * 40), HfApi(endpoint=endpoint, token="hf_secret"))
    files.sizes = {"model.safetensors": len(SAVED)}
    assert bytes(files.read_bytes("model.safetensors", 8, 100)) == SAVED[8:100]
    assert seen == {"127.0.0.1": "Bearer hf_secret", "localhost": None}


Given = tuple[int, dict[str, str], bytes]
"""Status, headers and body of an answer."""
Answer = Callable[[int, int], Given]
"""What a storage answers when it is asked for the bytes [start, stop)."""
Storage = tuple[HubFiles, list[Answer]]


def right(start: int, stop: int) -> Given:
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(SAVED)}"}, SAVED[start:stop]


def of_another_size(start: int, stop: int) -> Given:
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(SAVED) + 1}"}, bytes(stop - start)


def fewer(start: int, stop: int) -> Given:
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(SAVED)}"}, SAVED[start : stop - 30]


def fewer_and_saying_so(start: int, stop: int) -> Given:
    return right(start, stop - 30)


def a_page_for_people(start: int, stop: int) -> Given:
    return 200, {"Content-Type": "text/html"}, b"<html>Please log in to this network</html>"


def forbidden(start: int, stop: int) -> Given:
    return 403, {}, b"<Error><Code>AccessDenied</Code></Error>"


def gone(start: int, stop: int) -> Given:
    return 404, {}, b""


def busy(start: int, stop: int) -> Given:
    return 503, {"Retry-After": "2"}, b""


def garbled(start: int, stop: int) -> Given:
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(SAVED)}", "Content-Encoding": "gzip"}, SAVED[start:stop]


def in_circles(start: int, stop: int) -> Given:
    return 302, {"Location": "/storage"}, b""


def nowhere(start: int, stop: int) -> Given:
    return 302, {"Location": "http://localhost:1/storage"}, b""


def to_another_world(start: int, stop: int) -> Given:
    return 302, {"Location": "ftp://localhost/storage"}, b""


def more(start: int, stop: int) -> Given:
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(SAVED)}"}, SAVED[start : stop + 5]


def packed(start: int, stop: int) -> Given:
    status, headers, body = right(start, stop)
    return status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body)


def packed_and_more(start: int, stop: int) -> Given:
    status, headers, body = more(start, stop)
    return status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body)


@pytest.fixture
def storage() -> Iterator[Storage]:
    """A file on a Hub that forwards to a storage, and the storage's next answers; without any it answers right."""
    answers: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host, _, port = self.headers["Host"].partition(":")
            first, last = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
            if host == "127.0.0.1":
                status, headers, body = 302, {"Location": f"http://localhost:{port}/storage"}, b""
            else:
                status, headers, body = (answers.pop(0) if answers else right)(first, last + 1)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        files = HubFiles(ModelRef("org/model", "a" * 40), HfApi(endpoint=f"http://127.0.0.1:{server.server_port}"))
        files.sizes = {"model.safetensors": len(SAVED)}
        yield files, answers
        server.shutdown()


PASSING = [
    of_another_size,
    fewer,
    fewer_and_saying_so,
    a_page_for_people,
    forbidden,
    gone,
    busy,
    garbled,
    in_circles,
    nowhere,
    to_another_world,
]


@pytest.mark.parametrize("odd", PASSING)
def test_a_storage_that_fails_is_asked_again_by_way_of_the_hub(odd: Answer, storage: Storage, waits: list[float]) -> None:
    files, answers = storage
    answers += [odd, odd]
    assert bytes(files.read_bytes("model.safetensors", 100, 1100)) == SAVED[100:1100]
    assert len(waits) == (0 if odd is in_circles else 2)


@pytest.mark.parametrize("odd", [odd for odd in PASSING if odd is not fewer])
def test_a_storage_that_fails_for_ever_is_an_error_that_names_the_file(
    odd: Answer, storage: Storage, waits: list[float]
) -> None:
    files, answers = storage
    answers += [odd] * 200
    with pytest.raises(CheckpointError, match=rf"org/model@aaaaaaaa: bytes 100-1100 of model.safetensors .* {TRIES} tries"):
        files.read_bytes("model.safetensors", 100, 1100)
    assert len(waits) == TRIES - 1


@pytest.mark.parametrize("odd", [more, packed_and_more])
def test_more_bytes_than_were_asked_for_are_an_error(odd: Answer, storage: Storage) -> None:
    files, answers = storage
    answers += [odd]
    with pytest.raises(CheckpointError, match=r"more bytes of model\.safetensors than were asked for"):
        files.read_bytes("model.safetensors", 100, 1100)


def test_an_answer_that_is_packed_is_unpacked(storage: Storage) -> None:
    files, answers = storage
    answers += [packed]
    assert bytes(files.read_bytes("model.safetensors", 100, 1100)) == SAVED[100:1100]


def test_a_model_that_is_deleted_in_between_is_an_error_that_names_it(hub: LocalHub) -> None:
    hub.seed("demo/deleted", {"model.safetensors": SAVED})
    opened = Checkpoint(ModelRef("demo/deleted"))
    assert opened.index.tensors.keys() == TENSORS.keys()
    HfApi().delete_repo("demo/deleted")
    with pytest.raises(CheckpointError, match="demo/deleted is not on http"):
        opened.read("a")


# The local cache


def test_a_file_that_is_in_the_cache_is_read_from_there(model: Checkpoint, hub: LocalHub) -> None:
    hf_hub_download(model.ref.id, "model.safetensors", revision=model.commit)
    hub.clear_requests()
    again = Checkpoint(ModelRef(model.ref.id))
    assert torch.equal(again.read("a", 5, 105), flat("a")[5:105])
    assert reads(hub) == []


def test_a_file_that_is_in_the_cache_at_another_commit_is_not_taken(model: Checkpoint, hub: LocalHub) -> None:
    before = Checkpoint(ModelRef(model.ref.id))
    hub.seed(model.ref.id, {"model.safetensors": save({"a": -TENSORS["a"]})})
    hf_hub_download(model.ref.id, "model.safetensors")
    assert torch.equal(Checkpoint(ModelRef(model.ref.id)).read("a"), -flat("a"))
    assert torch.equal(before.read("a"), flat("a"))


@pytest.mark.parametrize("keep", [0, 100, 200_000])
def test_a_file_that_is_broken_in_the_cache_is_an_error_that_names_it(keep: int, model: Checkpoint) -> None:
    path = Path(hf_hub_download(model.ref.id, "model.safetensors", revision=model.commit)).resolve()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{model.label}: model\.safetensors"):
        Checkpoint(ModelRef(model.ref.id)).read("b")


OFFLINE = """
import json, sys, torch
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef

found = {}
for name in sys.argv[1:]:
    try:
        checkpoint = Checkpoint(ModelRef.parse(name))
        found[name] = [checkpoint.commit, float(checkpoint.read("a").sum())]
    except CheckpointError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_offline_only_the_cache_is_read(model: Checkpoint) -> None:
    hf_hub_download(model.ref.id, "model.safetensors", revision="main")
    name, unknown = model.ref.id, "a" * 40
    asked = [name, f"{name}@{model.commit}", f"{name}@{unknown}", f"{name}@v2", "reading/never-seen"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", OFFLINE, *asked], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found[name] == found[asked[1]] == [model.commit, float(TENSORS["a"].sum())]
    for missing in asked[2:]:
        assert missing in found[missing]
        assert "is not in the local cache, and the Hub cannot be reached" in found[missing]


# Repositories that are not what they should be


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"model.safetensors": SAVED[:-8]}, r"model\.safetensors is truncated"),
        ({"model.safetensors": SAVED[:100]}, "truncated"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "not a safetensors file"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'}, "not shards beside it"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, r"missing: 'gone\.safetensors'"),
        ({"model.safetensors.index.json": b"<html>"}, "does not parse as JSON"),
        ({"pytorch_model.bin": b"\x80\x04."}, r"only as pickles \('pytorch_model\.bin'\)"),
        ({"adapter_model.safetensors": SAVED}, "has neither"),
        ({"sub/model.safetensors": SAVED}, "has neither"),
        ({}, "has neither"),
    ],
)
def test_a_repository_without_usable_weights_is_refused_from_its_headers(
    files: dict[str, bytes], complaint: str, hub: LocalHub
) -> None:
    repo_id = f"reading/{next(NUMBERS)}"
    hub.seed(repo_id, {"README.md": "", **files})
    with pytest.raises(CheckpointError, match=complaint) as caught:
        _ = Checkpoint(ModelRef(repo_id)).index
    assert str(caught.value).startswith(f"{repo_id}@")
    assert hub.bytes_served(SHARD) <= 100_000


def test_shards_are_read_from_the_files_that_hold_them(hub: LocalHub, tmp_path: Path) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    hub.seed("reading/shards", tmp_path)
    hub.seed("reading/shards", {"model.safetensors.index.json": json.dumps(index)})
    opened = Checkpoint(ModelRef("reading/shards"))
    assert all(torch.equal(opened.read(name), flat(name)) for name in TENSORS)
