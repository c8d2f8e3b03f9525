"""A merge is the same, bit for bit: streamed from the Hub, from folders, in any shard layout, in place in a live model."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import ARCHITECTURES, Maker
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import MergeError
from hf_merge.merging import execute, plan
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import open_inputs
from hf_merge.methods import METHODS
from hf_merge.methods import method as method_module
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import merge


def recipe_of(method: str, base: object, models: list, **more: object) -> Recipe:
    parameters = {
        name: value for name, value in {"density": 0.4, "scaling": 0.9, "t": 0.3}.items() if name in METHODS[method].parameters
    }
    return Recipe(
        method=method,
        base=ModelRef.parse(base) if METHODS[method].space != "weight" else None,  # type: ignore[arg-type]
        models=tuple(models[: METHODS[method].models[1]]),
        parameters=parameters,
        seed=7,
        **more,
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sorted(folder.glob("*.safetensors")))).hexdigest()


def seed_on_hub(hub: LocalHub, folders: list[Path], namespace: str) -> list[str]:
    for folder in folders:
        hub.seed(f"{namespace}/{folder.name}", folder)
    return [f"{namespace}/{folder.name}" for folder in folders]


@pytest.mark.parametrize("method", METHODS)
def test_streamed_local_resharded_and_live_merges_are_equal_bit_for_bit(
    method: str, make: Maker, hub: LocalHub, tmp_path: Path
) -> None:
    base, *models = make("tied-llama", 4)
    small_base, *small_models = make("tied-llama", 4, shard=20_000, parent="small")
    on_hub = seed_on_hub(hub, [small_base, *small_models], f"equal-{method.replace('_', '-')}")
    local = merge(recipe_of(method, base, models), tmp_path / "local", progress=False)
    merge(recipe_of(method, on_hub[0], on_hub[1:]), tmp_path / "hub", max_shard_size=30_000, progress=False)
    expected, streamed = tensors(tmp_path / "local"), tensors(tmp_path / "hub")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    assert expected.keys() == streamed.keys()
    assert all(torch.equal(expected[name], streamed[name]) for name in expected)
    live = LiveModel(
        Recipe(method="linear", models=(str(base),)),
        {c.ref: c for c in local.plan.inputs} | open_inputs(Recipe(method="linear", models=(str(base),))),
    )
    live.load(recipe_of(method, base, models))
    state = live.model.state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_every_architecture_loads_with_plain_transformers_and_equals_the_live_merge(
    family: str, method: str, make: Maker, tmp_path: Path
) -> None:
    base, *models = make(family)
    recipe = recipe_of(method, base, models)
    merge(recipe, tmp_path / "out", max_shard_size=20_000, progress=False)
    loaded = ARCHITECTURES[family][0].from_pretrained(tmp_path / "out").state_dict()
    live = LiveModel(Recipe(method="linear", models=(str(base),)), open_inputs(recipe))
    live.load(recipe)
    state = live.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    live.load(Recipe(method="linear", models=(str(models[0]),)))
    parent = ARCHITECTURES[family][0].from_pretrained(models[0]).state_dict()
    assert all(torch.equal(parent[name], value) for name, value in live.model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_a_large_tensor_change_no_bit(
    method: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = make("llama")
    recipe = recipe_of(method, base, models)
    monkeypatch.setattr(method_module, "BLOCK", 256)
    monkeypatch.setattr(plan, "BLOCKS", 10**6)
    merge(recipe, tmp_path / "whole", progress=False)
    monkeypatch.setattr(plan, "BLOCKS", 2)
    pieces = merge(recipe, tmp_path / "pieces", progress=False).plan
    assert max(len(list(job.pieces())) for job in pieces.jobs.values()) > 1 or METHODS[method].block == "tensor"
    assert digest(tmp_path / "whole") == digest(tmp_path / "pieces")


@pytest.mark.parametrize("method", ["linear", "ties", "della", "sce", "tsv"])
@pytest.mark.parametrize("max_memory", [1, "20kB"])
def test_less_memory_than_the_largest_tensor_changes_no_bit(
    method: str, max_memory: int | str, make: Maker, hub: LocalHub, tmp_path: Path
) -> None:
    base, *models = seed_on_hub(hub, make("llama"), f"memory-{method}-{max_memory}".lower())
    recipe = recipe_of(method, base, models)
    merge(recipe, tmp_path / "free", progress=False)
    merge(recipe, tmp_path / "bound", max_memory=max_memory, progress=False)
    assert digest(tmp_path / "free") == digest(tmp_path / "bound")


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_no_bit(
    threads: int, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = make("llama")
    recipe = recipe_of("dare_ties", base, models)
    merge(recipe, tmp_path / "usual", max_shard_size=20_000, progress=False)
    monkeypatch.setattr(execute, "THREADS", threads)
    merge(recipe, tmp_path / "other", max_shard_size=20_000, progress=False)
    assert digest(tmp_path / "usual") == digest(tmp_path / "other")


def test_a_trim_over_the_whole_model_keeps_its_largest_changes_wherever_they_are(make: Maker, tmp_path: Path) -> None:
    base, model, _ = make("gpt2")
    parameters = {"density": 0.1, "whole_model": True}
    recipe = Recipe(method="ties", base=ModelRef(str(base)), models=(str(model),), parameters=parameters)  # type: ignore[arg-type]
    merge(recipe, tmp_path / "out", progress=False)
    got, anchor, own = tensors(tmp_path / "out"), tensors(base), tensors(model)
    deltas = {name: own[name] - anchor[name] for name in own}
    together = torch.cat([delta.abs().flatten() for delta in deltas.values()])
    cut = together.sort(descending=True).values[round(0.1 * len(together)) - 1]
    for name, delta in deltas.items():
        assert torch.equal(got[name], anchor[name] + delta * (delta.abs() >= cut)), name
    assert len({int((got[name] != anchor[name]).sum() * 100 / delta.numel()) for name, delta in deltas.items()}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_equals_the_method_applied_to_whole_tensors_in_memory(method: str, make: Maker, tmp_path: Path) -> None:
    base, *models = make("gpt2")
    recipe = recipe_of(method, base, models)
    merge(recipe, tmp_path / "out", progress=False)
    got, anchor = tensors(tmp_path / "out"), tensors(base)
    parents = [tensors(Path(model.ref.id)) for model in recipe.models]
    arguments = recipe.arguments()
    scaling = arguments.pop("scaling", 1.0)
    for name in got:
        stack = torch.stack([parent[name] for parent in parents])
        offset = anchor[name] if recipe.deltas else torch.zeros_like(anchor[name])
        names = tuple(m.name for m in recipe.models)
        whole = METHODS[method](stack - offset, seed=7, models=names, tensor=name, **arguments)
        assert torch.equal(got[name], offset + scaling * whole if recipe.deltas else whole), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [None, "float32", "bfloat16", "float16"])
def test_dtypes_mix_and_the_config_says_the_result_s(dtype: torch.dtype, out: str | None, make: Maker, tmp_path: Path) -> None:
    models = make("llama", 3, dtype=dtype, parent="other")[1:]
    merge(recipe_of("linear", None, models, dtype=out), tmp_path / "out", progress=False)
    expected = dtype if out is None else getattr(torch, out)
    got, parents = tensors(tmp_path / "out"), [tensors(model) for model in models]
    assert {tensor.dtype for tensor in got.values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected
    for name, tensor in got.items():
        mean = sum(parent[name].float() for parent in parents) / 2
        assert torch.equal(tensor, mean.to(expected))


def test_result_carries_tokenizer_config_recipe_and_card_and_no_marker(make: Maker, tmp_path: Path) -> None:
    base, *models = make("llama")
    merge(recipe_of("ties", base, models), tmp_path / "out", progress=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.yaml",
        "README.md",
    } <= names
    assert not any(name.startswith(".") for name in names)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 96
    again = merge(tmp_path / "out" / "recipe.yaml", tmp_path / "again", progress=False)
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "out").keys()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert again.plan.recipe.digest == json.loads(json.dumps(again.plan.recipe.digest))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_while_merging_and_the_tensor_and_model_named(
    method: str, bad: float, make: Maker, tmp_path: Path
) -> None:
    base, *models = make("llama")
    models = models[: METHODS[method].models[1]]
    model = AutoModelForCausalLM.from_pretrained(models[-1])
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    model.save_pretrained(models[-1])
    with pytest.raises(MergeError, match=rf"{models[-1].name}: tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        merge(recipe_of(method, base, models), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


def test_float16_overflow_is_an_error_that_names_the_remedy(make: Maker, tmp_path: Path) -> None:
    base, *models = make("llama")
    recipe = Recipe(
        method="task_arithmetic", base=str(base), models=(str(models[0]),), parameters={"scaling": 1e7}, dtype="float16"
    )
    with pytest.raises(MergeError, match="bfloat16"):
        merge(recipe, tmp_path / "out", progress=False)


def test_streaming_serves_only_the_bytes_that_are_needed_and_stores_nothing(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    folders = make("llama", hidden_size=256, intermediate_size=512, vocab_size=2000)
    base, *models = seed_on_hub(hub, folders, "bytes")
    hub.clear_requests()
    done = merge(recipe_of("ties", base, models), tmp_path / "out", progress=False)
    assert done.plan.bytes_read > 5_000_000
    headers = 3 * 100_000
    assert done.plan.bytes_read <= hub.bytes_served("*.safetensors") <= done.plan.bytes_read + headers
    asked = [request for request in hub.requests() if request.path.endswith(".safetensors") and request.method == "GET"]
    assert all(request.range for request in asked)
    commits = {Checkpoint(ModelRef(repo)).commit for repo in (base, *models)}
    assert all(any(str(commit) in request.path for commit in commits) for request in asked)


def test_a_push_while_merging_is_not_mixed_in(make: Maker, hub: LocalHub, tmp_path: Path) -> None:
    folders = make("llama")
    ids = seed_on_hub(hub, folders, "pinned")
    opened = open_inputs(recipe_of("linear", None, ids[1:]))
    hub.seed(ids[1], make("llama", 2, parent="new", initializer_range=0.5)[1])
    live = LiveModel(recipe_of("linear", None, ids[1:]), opened)
    merge(recipe_of("linear", None, folders[1:]), tmp_path / "out", progress=False)
    state = live.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors(tmp_path / "out").items())
