"""Paths with maps that cannot be folded, saved with their module: loaded by transformers alone, they run the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from path_models import IDS, SCALED, dare_ties, family, path_model, steps
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_merge.aligned import MODULE, save_aligned
from hf_merge.errors import MergeError
from hf_merge.merging.calibration import aligned
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.seams import Seam

PATH = steps(("model1", 0), ("model1", 1), ("model2", 1), ("model2", 2), ("merged", 3))
INPUTS = {"input_ids": torch.arange(96).reshape(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.int64)}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of models is copied there, and not into the home of whoever runs the tests."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def loaded(folder: Path, kind: type = AutoModelForCausalLM) -> PreTrainedModel:
    found: PreTrainedModel = kind.from_pretrained(folder, trust_remote_code=True).eval()  # type: ignore[attr-defined]
    return found


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", ["diag", "coral"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "mixtral"])
def test_a_path_with_maps_is_loaded_as_it_ran(name: str, kind: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name)))
    wanted = logits(model.take(*aligned(model, PATH, INPUTS, kind)))  # type: ignore[arg-type]
    found = loaded(save_aligned(model, tmp_path / "out"))
    # Mixtral's experts lie otherwise in memory, and are multiplied in another order.
    torch.testing.assert_close(logits(found), wanted, rtol=0, atol=1e-6 if name == "mixtral" else 0)
    assert not torch.allclose(logits(model.take(PATH)), wanted, atol=1e-3)


def test_a_model_with_maps_generates_with_a_cache(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    model.take(*aligned(model, PATH, INPUTS, "coral"))
    found = loaded(save_aligned(model, tmp_path / "out"))
    usual = {"max_new_tokens": 6, "do_sample": False}
    cached, plain = (found.generate(IDS, use_cache=cache, **usual) for cache in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 14)


@pytest.mark.parametrize("name", ["olmo2", "bert", "llama"])
def test_scales_that_no_weight_can_take_are_maps(name: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, name)))
    wanted = logits(model.take(SCALED))
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    assert torch.equal(logits(loaded(save_aligned(model, tmp_path / "out"), kind)), wanted)


def test_a_scale_and_a_map_in_one_place_are_one_map(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    path = steps(("model1", 0), ("model2", 1, 1.5), ("model2", 2), ("model2", 3, 0.5))
    generator = torch.Generator().manual_seed(0)
    seams = {1: Seam("coral", torch.randn(32, 32, generator=generator), torch.randn(32, generator=generator))}
    wanted = logits(model.take(path, seams))
    found = loaded(save_aligned(model, tmp_path / "out"))
    torch.testing.assert_close(logits(found), wanted, rtol=0, atol=1e-5)


def saved(tmp_path: Path) -> tuple[PathModel, Path]:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    model.take(*aligned(model, PATH, INPUTS, "diag"))
    return model, save_aligned(model, tmp_path / "out")


def test_without_its_module_the_folder_is_refused_and_not_loaded_as_another_model(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_the_module_needs_nothing_of_ours(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    torch.save(logits(model.model), tmp_path / "wanted.pt")
    code = (
        "import sys, torch; sys.modules['hf_merge'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "with torch.no_grad(): found = model(torch.arange(3, 19).reshape(2, 8)).logits\n"
        f"print(torch.equal(found, torch.load({str(tmp_path / 'wanted.pt')!r})))"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "True"


def test_saved_again_by_transformers_it_is_the_same_model(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    loaded(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODULE).is_file()
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model.model))


def test_the_card_says_where_the_maps_are_and_how_to_load_them(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    card = " ".join((folder / "README.md").read_text().split())
    assert "mapped before position 2 and 4, by the Python code" in card
    assert 'from_pretrained(repo_id, dtype="auto", trust_remote_code=True)' in card
    assert "without these maps" in card


def test_many_shards_are_one_model(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "tied-llama")))
    wanted = logits(model.take(*aligned(model, PATH, INPUTS, "coral")))
    folder = save_aligned(model, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in folder.glob("*.safetensors")}
    assert len(set(index.values())) > 3
    assert torch.equal(logits(loaded(folder)), wanted)


def test_its_tokenizer_comes_along(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer, folders = PreTrainedTokenizerFast(tokenizer_object=words), family(tmp_path, "llama")
    for folder in folders:
        tokenizer.save_pretrained(folder)
    model = path_model(dare_ties(folders))
    model.take(SCALED)
    found = AutoTokenizer.from_pretrained(save_aligned(model, tmp_path / "out"))
    assert found("w7 w2").input_ids == [7, 2]


def test_what_needs_no_module_gets_none(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    model.take(PATH)
    with pytest.raises(MergeError, match="recipe_of"):
        save_aligned(model, tmp_path / "out")


def test_a_folder_that_holds_something_is_kept(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(MergeError, match="not empty"):
        save_aligned(model, folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    model.take(SCALED)
    monkeypatch.setattr("hf_merge.aligned.index_json", lambda shards: {}[""])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyError):
        save_aligned(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
