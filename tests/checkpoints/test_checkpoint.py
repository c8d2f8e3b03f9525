"""A checkpoint is the same to its reader wherever its files lie: on the Hub, in a folder, in memory."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save, save_file

from hf_merge.checkpoints.checkpoint import Checkpoint, hub_api
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef
from hf_merge.version import __version__

TENSORS = {
    "a": torch.arange(30_000, dtype=torch.float32).reshape(100, 300),
    "half": torch.randn(7, 3).to(torch.float16),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "ids": torch.arange(5),
    "flags": torch.tensor([True, False]),
}
NUMBERS = count()
Opener = Callable[[], Checkpoint]


@pytest.fixture
def on_hub(hub: LocalHub) -> Checkpoint:
    """The tensors on the Hub, headers read, the log clean."""
    repo_id = f"checkpoint/{next(NUMBERS)}"
    hub.seed(repo_id, {"model.safetensors": bytes(save(TENSORS)), "config.json": b'{"model_type": "x"}'})
    opened = Checkpoint(ModelRef(repo_id))
    assert opened.index.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    hub.clear_requests()
    return opened


@pytest.fixture
def in_folder(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    return Checkpoint(ModelRef(str(tmp_path)))


@pytest.fixture(params=["hub", "held", "stored", "cached", "folder", "folder, held"])
def anywhere(request: pytest.FixtureRequest) -> Checkpoint:
    """The same checkpoint in every place that it can be in."""
    place: str = request.param
    opened: Checkpoint = request.getfixturevalue("in_folder" if place.startswith("folder") else "on_hub")
    if place == "cached":
        snapshot_download(opened.ref.id, revision=opened.commit)
        opened = Checkpoint(opened.ref)
    if place.endswith("held"):
        opened.hold()
    if place == "stored":
        opened.store()
    return opened


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_flat_in_its_own_dtype(name: str, anywhere: Checkpoint) -> None:
    got = anywhere.read(name)
    assert got.dtype == TENSORS[name].dtype
    assert torch.equal(got, TENSORS[name].reshape(-1))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 30_000), (17, 4096), (29_999, 30_000), (5, 5)])
def test_part_of_a_tensor_is_read(start: int, stop: int, anywhere: Checkpoint) -> None:
    assert torch.equal(anywhere.read("a", start, stop), TENSORS["a"].reshape(-1)[start:stop])


def test_held_tensors_are_fetched_once(on_hub: Checkpoint, hub: LocalHub) -> None:
    on_hub.hold()
    assert hub.bytes_served("*.safetensors") == on_hub.index.nbytes
    on_hub.hold()
    assert all(torch.equal(on_hub.read(name), tensor.reshape(-1)) for name, tensor in TENSORS.items())
    assert hub.bytes_served("*.safetensors") == on_hub.index.nbytes


def test_stored_shards_are_fetched_once_and_nothing_else_is(on_hub: Checkpoint, hub: LocalHub) -> None:
    on_hub.store()
    size = hub.bytes_served("*.safetensors")
    on_hub.store()
    on_hub.read("a")
    assert hub.bytes_served("*.safetensors") == size
    assert hub.bytes_served("*config.json") == 0


def test_shards_that_cannot_be_stored_are_an_error_that_names_the_model(on_hub: Checkpoint, hub: LocalHub) -> None:
    hub.fault("status", "*.safetensors", status=404, times=None)
    with pytest.raises(CheckpointError, match=rf"^{on_hub.ref}"):
        on_hub.store()


def test_a_checkpoint_on_the_hub_is_pinned_and_says_so(on_hub: Checkpoint) -> None:
    assert on_hub.commit is not None
    assert len(on_hub.commit) == 40
    assert on_hub.ref == ModelRef(on_hub.ref.id, on_hub.commit)
    assert repr(on_hub) == f"Checkpoint({on_hub.ref.id}@{on_hub.commit[:8]})"


def test_a_folder_has_no_commit(in_folder: Checkpoint, tmp_path: Path) -> None:
    assert in_folder.commit is None
    assert in_folder.ref == ModelRef(str(tmp_path))
    assert repr(in_folder) == f"Checkpoint({tmp_path})"


def test_small_files_are_read_whole_and_missing_ones_are_none(anywhere: Checkpoint) -> None:
    assert anywhere.bytes("config.json") == b'{"model_type": "x"}'
    assert anywhere.config == {"model_type": "x"}
    assert anywhere.bytes("tokenizer.json") is None
    assert anywhere.json("tokenizer.json") is None


def test_a_model_without_config_has_an_empty_one(tmp_path: Path) -> None:
    assert Checkpoint(ModelRef(str(tmp_path))).config == {}


@pytest.mark.parametrize(
    ("text", "said"), [(b"{", "does not parse"), (b"\xff\xfe{", "does not parse"), (b"[1]", "expected a JSON object")]
)
def test_a_config_that_is_none_is_an_error_that_names_it(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: config\.json.*{said}"):
        _ = Checkpoint(ModelRef(str(tmp_path))).config


def test_a_folder_that_shrinks_after_its_header_was_read_is_an_error(in_folder: Checkpoint, tmp_path: Path) -> None:
    assert in_folder.index
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        in_folder.read("a")


def test_every_request_names_this_library(hub: LocalHub) -> None:
    hub.seed("checkpoint/agent", {"model.safetensors": bytes(save(TENSORS)), "config.json": json.dumps({})})
    hub.clear_requests()
    opened = Checkpoint(ModelRef("checkpoint/agent"), hub_api())
    opened.hold()
    assert opened.config == {}
    agents = {request.user_agent for request in hub.requests()}
    assert agents
    assert all(agent and agent.startswith(f"hf_merge/{__version__};") for agent in agents)
