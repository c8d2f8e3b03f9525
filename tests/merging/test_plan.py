"""From a recipe to a plan: what is read and written is known, and right, before a tensor is touched."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Maker

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging import plan as plan_module
from hf_merge.merging.plan import MergePlan, open_inputs, plan
from hf_merge.methods import METHODS
from hf_merge.methods import method as method_module
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

UP = "model.layers.0.mlp.up_proj.weight"


def recipe_of(method: str, folders: list, **more: object) -> Recipe:
    base, *models = map(str, folders)
    return Recipe(method=method, base=ModelRef(base), models=tuple(models), **more)  # type: ignore[arg-type]


def planned(recipe: Recipe, **more: object) -> MergePlan:
    return plan(recipe, open_inputs(recipe), **more)  # type: ignore[arg-type]


def names_read(found: MergePlan, tensor: str) -> list[str]:
    return [source.checkpoint.ref.name for source in found.jobs[tensor].inputs]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_base_is_read_only_where_differences_from_it_are_merged(method: str, make: Maker) -> None:
    models = make("llama", 3)
    merged = models[1:][: METHODS[method].models[1]]
    if METHODS[method].ordered:
        recipe = Recipe(method=method, models=tuple(map(str, merged)))
    else:
        recipe = recipe_of(method, [models[0], *merged])
    expected = [m.name for m in merged]
    if METHODS[method].space == "delta" or (METHODS[method].space == "any" and recipe.base):
        expected = ["base", *expected]
    found = planned(recipe)
    assert names_read(found, UP) == expected
    size = sum(tensor.nbytes for tensor in load_file(models[0] / "model.safetensors").values())
    assert found.bytes_read == len(expected) * size


def test_the_base_lends_config_and_tensors_even_where_it_is_not_merged(make: Maker) -> None:
    found = planned(recipe_of("linear", make("llama", 3)))
    assert found.primary.ref.name == "base"
    assert [c.ref.name for c in found.inputs] == ["base", "model1", "model2"]


def test_the_first_model_lends_them_without_a_base(make: Maker) -> None:
    folders = make("llama", 3)
    assert planned(Recipe(method="linear", models=(str(folders[2]), str(folders[1])))).primary.ref.name == "model2"


def test_a_model_that_stands_twice_is_opened_once_and_counted_twice(make: Maker) -> None:
    base, model, _ = make("llama", 3)
    recipe = recipe_of("task_arithmetic", [base, model, model])
    found = planned(recipe)
    assert len(found.inputs) == 2
    assert names_read(found, UP) == ["base", "model1", "model1"]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_plan_s_figures_are_those_of_the_merge(dtype: str | None, make: Maker, tmp_path: Path) -> None:
    recipe = recipe_of("ties", make("llama", 3), dtype=dtype)
    found = check(recipe)
    merge(recipe, tmp_path / "out", progress=False)
    written = tmp_path / "out/model.safetensors"
    tensors = load_file(written)
    assert found.bytes_written == written.stat().st_size
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype or "float32")}
    assert {name: (job.spec.shape, job.spec.dtype) for name, job in found.jobs.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_pieces_cover_a_tensor_once_at_multiples_of_a_block(method: str, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_module, "BLOCK", 50)
    monkeypatch.setattr(plan_module, "BLOCKS", 10)
    found = planned(recipe_of(method, make("llama", 2)))
    for job in found.jobs.values():
        starts, stops = zip(*job.pieces(), strict=True)
        assert (starts[0], stops[-1]) == (0, torch.Size(job.spec.shape).numel() or 1)
        assert starts[1:] == stops[:-1]
        assert all(start % job.block == 0 for start in starts)
    assert max(len(list(job.pieces())) for job in found.jobs.values()) > 1
    assert all(job.measures == (METHODS[method].measure is not None) for job in found.jobs.values())


def test_a_plan_of_20_000_tensors_has_them_all_and_quickly(tmp_path: Path) -> None:
    for name in ("base", "one", "two", "three"):
        (tmp_path / name).mkdir()
        content = {f"model.layers.{i // 400}.experts.{i % 400}.weight": torch.zeros(1) for i in range(20_000)}
        save_file(content, tmp_path / name / "model.safetensors")
    started = time.perf_counter()
    found = planned(recipe_of("ties", [tmp_path / name for name in ("base", "one", "two", "three")]))
    assert len(found.jobs) == 20_000
    # Linear in the number of tensors: what is quadratic takes minutes.
    assert time.perf_counter() - started < 20


def test_every_tensor_lies_in_one_shard(make: Maker) -> None:
    found = planned(recipe_of("linear", make("llama", 3)), max_shard_size=20_000)
    assert len(found.shards) > 2
    assert sorted(name for shard in found.shards for name in shard.tensors) == sorted(found.jobs)


def test_a_plan_s_recipe_names_the_commits(make: Maker, hub: LocalHub) -> None:
    folders = make("llama", 3)
    commits = {f"plan/{folder.name}": hub.seed(f"plan/{folder.name}", folder) for folder in folders}
    found = planned(recipe_of("ties", list(commits)))
    assert {ref.id: ref.revision for ref in found.recipe.inputs} == commits
    assert found.to_dict()["models"] == [f"{name}@{sha}" for name, sha in commits.items()]


def test_a_plan_reads_headers_and_small_files_only(make: Maker, hub: LocalHub) -> None:
    folders = make("llama", 3, hidden_size=256, intermediate_size=512, vocab_size=2000)
    for folder in folders:
        hub.seed(f"plan-bytes/{folder.name}", folder)
    hub.clear_requests()
    found = check(recipe_of("ties", [f"plan-bytes/{folder.name}" for folder in folders]))
    assert found.bytes_read > 5_000_000
    assert hub.bytes_served("*.safetensors") <= 3 * 100_000


def test_a_plan_prints_for_people_and_for_machines(make: Maker) -> None:
    found = check(recipe_of("ties", make("llama", 3)))
    text, figures = str(found), found.to_dict()
    assert text.startswith("TIES of model1")
    assert all(f"  {checkpoint.label}: 21 tensors, 0.1 MB" in text for checkpoint in found.inputs)
    assert f"{figures['parameters']:,} parameters" in text
    assert json.loads(json.dumps(figures)) == figures


def test_all_mismatches_are_said_before_anything_is_written(make: Maker, tmp_path: Path) -> None:
    base, other = make("llama", 1)[0], make("gpt2", 1, parent="other")[0]
    with pytest.raises(MergeError, match="another architecture"):
        merge(recipe_of("ties", [base, other]), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_opened_is_an_error(make: Maker, tmp_path: Path) -> None:
    base = make("llama", 1)[0]
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        check(recipe_of("ties", [base, tmp_path / "nowhere"]))


def test_alignment_is_asked_for_the_models_that_are_read(make: Maker) -> None:
    recipe = recipe_of("linear", make("llama", 3))
    seen: list[tuple[Checkpoint, ...]] = []

    def aligned(inputs: tuple[Checkpoint, ...], *how: object) -> plan_module.Alignment:
        seen.append(inputs)
        return plan_module.align(inputs, *how)  # type: ignore[arg-type]

    found = planned(recipe, align=aligned)
    assert seen == [found.inputs]
