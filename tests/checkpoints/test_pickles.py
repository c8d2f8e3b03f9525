"""Pickles: read only where that is allowed, without running what is in them, each tensor as it was saved."""

import collections
import importlib.util
import json
import os
from fractions import Fraction
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError
from hf_merge.model_ref import ModelRef

NUMBERS = count()
WHOLE = torch.arange(60, dtype=torch.float32)
TENSORS = {
    "matrix": WHOLE.reshape(6, 10),
    "transposed": WHOLE.reshape(6, 10).t(),
    "columns": WHOLE.reshape(6, 10)[:, 2:5],
    "every second": WHOLE[1::2],
    "permuted": WHOLE.reshape(3, 4, 5).permute(2, 0, 1),
    "repeated": torch.tensor([[1.0], [2.0]]).expand(2, 4),
    "parameter": torch.nn.Parameter(torch.randn(3, 2).bfloat16()),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "ids": torch.arange(5),
}


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def opened(folder: Path, *, pickles: bool = True) -> Checkpoint:
    return Checkpoint(ModelRef(str(folder)), pickles=pickles)


@pytest.fixture(params=["zip", "legacy", "sharded", "hub"])
def pickled(request: pytest.FixtureRequest, tmp_path: Path, hub: LocalHub) -> Checkpoint:
    """The tensors in every kind of pickle."""
    if request.param == "sharded":
        names = sorted(TENSORS)
        shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        for shard, held in shards.items():
            torch.save({name: TENSORS[name] for name in held}, tmp_path / shard)
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return opened(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(collections.OrderedDict(TENSORS), path, _use_new_zipfile_serialization=request.param != "legacy")
    if request.param != "hub":
        return opened(tmp_path)
    repo_id = f"pickles/{next(NUMBERS)}"
    hub.seed(repo_id, {"pytorch_model.bin": path.read_bytes(), "config.json": b"{}"})
    return Checkpoint(ModelRef(repo_id), pickles=True)


def test_index_gives_shape_dtype_and_size_of_every_tensor(pickled: Checkpoint) -> None:
    found = {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in pickled.index.tensors.items()}
    assert found == {name: (t.dtype, tuple(t.shape), t.numel() * t.itemsize) for name, t in TENSORS.items()}


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_tensor_reads_as_it_was_saved(pickled: Checkpoint, name: str) -> None:
    read = pickled.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert not read.requires_grad
    assert torch.equal(read, TENSORS[name].detach().reshape(-1))


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_every_range_is_that_of_the_whole(pickled: Checkpoint, name: str) -> None:
    whole = TENSORS[name].detach().reshape(-1)
    ranges = [(start, stop) for start in range(len(whole) + 1) for stop in range(start, len(whole) + 1)]
    assert all(torch.equal(pickled.read(name, *at), whole[slice(*at)]) for at in ranges)


def test_pickle_is_near_once_it_is_indexed(pickled: Checkpoint) -> None:
    assert pickled.index.tensors
    assert pickled.is_near("matrix")


def test_held_pickle_reads_the_same(pickled: Checkpoint) -> None:
    pickled.hold()
    assert torch.equal(pickled.read("transposed", 7, 33), TENSORS["transposed"].reshape(-1)[7:33])


def test_pickle_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pickles.*pickles=True"):
        _ = opened(tmp_path, pickles=False).index


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert list(checkpoint.index.tensors) == ["b"]
    assert checkpoint.read("b").tolist() == [1, 1]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.zeros(1), "b": Hostile(tmp_path / "made")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"does not load as weights alone.*mkdir"):
        _ = opened(tmp_path).index
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("content", "name"), [(Hostile(Path("made")), "mkdir"), (Fraction(1, 2), "fractions.Fraction")])
def test_refusal_names_what_it_refuses_and_does_not_advise_to_allow_it(tmp_path: Path, content: object, name: str) -> None:
    torch.save({"a": content}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=name) as refused:
        _ = opened(tmp_path).index
    assert "set to `False`" not in str(refused.value)
    assert "allowlist" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"a": {"b": torch.zeros(1)}}, "'a' is a dict"),
        ({1: torch.zeros(1)}, "expected tensors by name"),
        ({"a": torch.zeros(3).to_sparse()}, "cannot be merged"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(1).expand(100_000)}, "larger than the file"),
        ({}, "no tensors"),
    ],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=complaint):
        _ = opened(tmp_path).index


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"\x80\x02.", b"not a pickle"])
def test_broken_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not load as weights alone"):
        _ = opened(tmp_path).index


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_pickle_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="does not load as weights alone"):
        _ = opened(tmp_path).index


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"a": "../x.bin"}, "not shards beside it"),
        ({"a": "x.safetensors"}, "not shards beside it"),
        ({"a": "y.bin"}, "missing"),
        ({"a": "x.bin", "b": "x.bin"}, "'b'"),
    ],
)
def test_index_that_its_shards_do_not_keep_is_refused(tmp_path: Path, weight_map: dict[str, str], complaint: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=complaint):
        _ = opened(tmp_path).index


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("x.bin", "y.bin"):
        torch.save({"a": torch.zeros(1), shard: torch.zeros(1)}, tmp_path / shard)
    weight_map = {"a": "x.bin", "x.bin": "x.bin", "y.bin": "y.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"in both x\.bin and y\.bin"):
        _ = opened(tmp_path).index


@pytest.fixture
def rxnfp() -> Path:
    """The models that the package rxnfp carries: a BERT of chemical reactions and two fine-tunes, pickled before torch 1.6."""
    found = importlib.util.find_spec("rxnfp")
    if found is None or found.origin is None:
        pytest.skip("the package rxnfp is not installed (pip install --no-deps rxnfp==0.1.0)")
    return Path(found.origin).parent / "models" / "transformers"


@pytest.mark.parametrize(
    ("model", "tensors", "embeddings"),
    [
        ("bert_pretrained", 207, "bert.embeddings.word_embeddings.weight"),
        ("bert_ft", 199, "embeddings.word_embeddings.weight"),
        ("bert_ft_10k_25s", 201, "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_real_pickled_family_is_indexed_and_read(rxnfp: Path, model: str, tensors: int, embeddings: str) -> None:
    checkpoint = opened(rxnfp / model)
    expected: Tensor = torch.load(rxnfp / model / "pytorch_model.bin", "cpu", weights_only=True)[embeddings]
    assert len(checkpoint.index.tensors) == tensors
    assert checkpoint.index.tensors[embeddings].shape == (591, 256)
    assert torch.equal(checkpoint.read(embeddings, 1000, 2000), expected.reshape(-1)[1000:2000])
