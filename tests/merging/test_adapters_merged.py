"""Merges of LoRA adapters into full models, end to end: as PEFT merges them, and without reading more than they need."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny_adapters import peft_merged, save_adapter
from tiny_models import make_models
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_merge.cli import main
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import open_inputs
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe, RecipeModel
from hf_merge.single import check, merge

PROJECTIONS = ["q_proj", "v_proj", "up_proj"]
ADAPTERS = {
    "lora": {"r": 2},
    "rslora": {"r": 4, "use_rslora": True},
    "saved": {"r": 3, "modules_to_save": ["lm_head"]},
    "dora": {"r": 2, "use_dora": True},
}
HEADER = 100_000


@dataclass(frozen=True)
class Family:
    """A base, another model of its shapes, and adapters of the base; what PEFT makes of each of them."""

    base: Path
    other: Path
    adapters: dict[str, Path]

    def delta(self, name: str, body: Path | None = None) -> dict[str, Tensor]:
        full, start = peft_merged(body or self.base, self.adapters[name], "llama"), stored(body or self.base)
        return {key: full[key] - start[key] for key in start}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("adapters")
    base, other = make_models(root, "llama", 2)
    made = {
        name: save_adapter(base, root / name, "llama", seed, lora_alpha=8, target_modules=PROJECTIONS, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    return Family(base, other, made)


@pytest.fixture(scope="module")
def deltas(family: Family) -> dict[str, dict[str, Tensor]]:
    return {name: family.delta(name) for name in ADAPTERS}


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def merged(recipe: Recipe, out: Path, **more: object) -> dict[str, Tensor]:
    merge(recipe, out, progress=False, **more)  # type: ignore[arg-type]
    return stored(out)


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def models_of(family: Family, written: str) -> tuple[str, ...]:
    return tuple(written.format(base=family.base, adapter=folder) for folder in family.adapters.values())


# What comes out


@pytest.mark.parametrize("written", ["{adapter}", "{base}+{adapter}"])
def test_task_arithmetic_of_adapters_adds_what_peft_merges(
    written: str, family: Family, deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    weights = (0.5, 0.3, 0.7, 0.4)
    models = tuple(
        RecipeModel(ref=model, parameters={"weight": weight})  # type: ignore[arg-type]
        for model, weight in zip(map(ModelRef.parse, models_of(family, written)), weights, strict=True)
    )
    found = merged(Recipe(method="task_arithmetic", base=family.base, models=models), tmp_path / "out")  # type: ignore[arg-type]
    expected = {
        name: start + sum(w * delta[name] for w, delta in zip(weights, deltas.values(), strict=True))
        for name, start in stored(family.base).items()
    }
    assert farthest(found, expected) < 1e-6
    assert farthest(found, stored(family.base)) > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter_of_weight_one_is_what_peft_merges(name: str, family: Family, tmp_path: Path) -> None:
    found = merged(Recipe(method="linear", models=(f"{family.base}+{family.adapters[name]}",)), tmp_path / "out")
    assert farthest(found, peft_merged(family.base, family.adapters[name], "llama")) < 1e-6


def test_a_result_of_adapters_loads_with_transformers_as_it_was_written(family: Family, tmp_path: Path) -> None:
    recipe = Recipe(method="ties", base=family.base, models=models_of(family, "{adapter}"))  # type: ignore[arg-type]
    found = merged(recipe, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert farthest(dict(loaded.state_dict()), found) == 0


def test_linear_without_a_base_averages_the_full_models(
    family: Family, deltas: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    found = merged(Recipe(method="linear", models=models_of(family, "{base}+{adapter}")), tmp_path / "out")
    start = stored(family.base)
    expected = {name: start[name] + sum(delta[name] for delta in deltas.values()) / 4 for name in start}
    assert farthest(found, expected) < 1e-6


@pytest.mark.parametrize("method", ["ties", "slerp", "nuslerp", "karcher", "dare_ties", "breadcrumbs", "model_stock"])
def test_every_kind_of_method_merges_adapters_as_it_merges_the_full_models(method: str, family: Family, tmp_path: Path) -> None:
    chosen, full = ["lora", "dora"], []
    for name in chosen:
        model = AutoModelForCausalLM.from_pretrained(family.base)
        model.load_state_dict(peft_merged(family.base, family.adapters[name], "llama"))
        model.save_pretrained(tmp_path / "full" / name)
        full.append(RecipeModel(ref=ModelRef.parse(tmp_path / "full" / name), name=name))
    space, base = METHODS[method].space, None if method == "slerp" else ModelRef.parse(family.base)
    written = "{adapter}" if space == "delta" else "{base}+{adapter}"
    adapted = tuple(
        RecipeModel(ref=ModelRef.parse(written.format(base=family.base, adapter=family.adapters[name])), name=name)
        for name in chosen
    )
    found = merged(Recipe(method=method, base=base, models=adapted), tmp_path / "out")
    expected = merged(Recipe(method=method, base=base, models=tuple(full)), tmp_path / "expected")
    assert farthest(found, expected) < 1e-5


def test_an_adapter_on_another_body_than_the_base_differs_from_the_base_by_both(family: Family, tmp_path: Path) -> None:
    recipe = Recipe(
        method="task_arithmetic",
        base=family.base,  # type: ignore[arg-type]
        models=(f"{family.other}+{family.adapters['lora']}", str(family.adapters["rslora"])),  # type: ignore[arg-type]
        parameters={"weight": 0.5},
    )
    found = merged(recipe, tmp_path / "out")
    start, body, other = (
        stored(family.base),
        peft_merged(family.other, family.adapters["lora"], "llama"),
        family.delta("rslora"),
    )
    expected = {name: start[name] + 0.5 * (body[name] - start[name]) + 0.5 * other[name] for name in start}
    assert farthest(found, expected) < 1e-6


def test_an_adapter_and_a_full_model_merge_with_each_other(family: Family, tmp_path: Path) -> None:
    models = (str(family.adapters["lora"]), str(family.other))
    recipe = Recipe(method="task_arithmetic", base=family.base, models=models, parameters={"weight": 0.5})  # type: ignore[arg-type]
    found, start, other, delta = (
        merged(recipe, tmp_path / "out"),
        stored(family.base),
        stored(family.other),
        family.delta("lora"),
    )
    expected = {name: start[name] + 0.5 * (delta[name] + other[name] - start[name]) for name in start}
    assert farthest(found, expected) < 1e-6


def test_a_live_model_of_adapters_is_the_merge_on_disk(family: Family, tmp_path: Path) -> None:
    recipe = Recipe(method="ties", base=family.base, models=models_of(family, "{adapter}"))  # type: ignore[arg-type]
    live = LiveModel(recipe, open_inputs(recipe))
    assert farthest(dict(live.model.state_dict()), merged(recipe, tmp_path / "out")) == 0


# From the Hub


@dataclass(frozen=True)
class Large:
    """A family on the Hub, large enough that headers do not weigh."""

    folders: dict[str, Path]
    ids: dict[str, str]

    def size(self, name: str) -> int:
        return next(self.folders[name].glob("*model.safetensors")).stat().st_size


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    root = tmp_path_factory.mktemp("large")
    (base,) = make_models(root, "llama", 1, hidden_size=256, intermediate_size=768)
    folders = {"base": base}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        config = config | {"r": 72, "lora_alpha": 8, "target_modules": PROJECTIONS}
        folders[name] = save_adapter(base, root / name, "llama", seed, **config)
    return Large(folders, {name: f"adapters/{name}" for name in folders})


def seeded(large: Large, hub: LocalHub) -> Large:
    for name, folder in large.folders.items():
        if not HfApi().repo_exists(large.ids[name]):
            hub.seed(large.ids[name], folder)
    hub.clear_requests()
    return large


def test_base_and_adapters_are_read_once(large: Large, hub: LocalHub, tmp_path: Path) -> None:
    ids, chosen = seeded(large, hub).ids, ["lora", "rslora", "saved"]
    recipe = Recipe(method="task_arithmetic", base=ids["base"], models=tuple(ids[name] for name in chosen))  # type: ignore[arg-type]
    merge(recipe, tmp_path / "out", progress=False)
    for name in ["base", *chosen]:
        assert large.size(name) > 10 * HEADER
        assert hub.bytes_served(f"*{ids[name]}/*.safetensors") <= 1.1 * large.size(name), name


def test_a_dora_adapter_reads_only_what_it_changes_of_the_base_once_more(large: Large, hub: LocalHub, tmp_path: Path) -> None:
    ids = seeded(large, hub).ids
    recipe = Recipe(method="task_arithmetic", base=ids["base"], models=(ids["lora"], ids["dora"]))  # type: ignore[arg-type]
    merge(recipe, tmp_path / "out", progress=False)
    changed = sum(tensor.nbytes for name, tensor in stored(large.folders["base"]).items() if name.split(".")[-2] in PROJECTIONS)
    assert hub.bytes_served(f"*{ids['base']}/*.safetensors") <= 1.1 * large.size("base") + changed
    assert hub.bytes_served(f"*{ids['dora']}/*.safetensors") <= 1.1 * large.size("dora")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
@pytest.mark.parametrize("written", ["{adapter}", "{base}+{adapter}"])
def test_streaming_adapters_from_the_hub_gives_the_bits_of_the_disk(
    method: str, written: str, large: Large, hub: LocalHub, tmp_path: Path
) -> None:
    results = []
    for places in (large.folders, seeded(large, hub).ids):
        models = tuple(written.format(base=places["base"], adapter=places[name]) for name in ADAPTERS)
        merge(Recipe(method=method, base=places["base"], models=models), tmp_path / str(len(results)), progress=False)  # type: ignore[arg-type]
        results.append((tmp_path / str(len(results)) / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_checking_adapters_on_the_hub_reads_headers_alone(large: Large, hub: LocalHub) -> None:
    ids = seeded(large, hub).ids
    plan = check(Recipe(method="ties", base=ids["base"], models=tuple(ids[name] for name in ADAPTERS)))  # type: ignore[arg-type]
    assert hub.bytes_served("*.safetensors") <= len(large.ids) * HEADER
    assert [checkpoint.ref.id for checkpoint in plan.adapters] == [ids[name] for name in ADAPTERS]
    assert all(ids[name] in str(plan) for name in ids)


# As mergekit writes it


def test_a_recipe_of_mergekit_names_adapters_with_a_plus(family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    listed = "".join(
        f"\n  - {{model: '{model}', parameters: {{weight: 0.5}}}}" for model in models_of(family, "{base}+{adapter}")
    )
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {family.base}\nmodels:{listed}\n")
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    models = models_of(family, "{adapter}")
    expected = Recipe(method="task_arithmetic", base=family.base, models=models, parameters={"weight": 0.5})  # type: ignore[arg-type]
    assert farthest(stored(tmp_path / "out"), merged(expected, tmp_path / "expected")) == 0


def test_the_written_recipe_of_adapters_makes_the_same_bits_again(family: Family, tmp_path: Path) -> None:
    recipe = Recipe(method="dare_ties", base=family.base, models=models_of(family, "{adapter}"), parameters={"density": 0.5})  # type: ignore[arg-type]
    first = merged(recipe, tmp_path / "out")
    merge(tmp_path / "out/recipe.yaml", tmp_path / "again", progress=False)
    assert farthest(first, stored(tmp_path / "again")) == 0


# What is refused


def test_an_adapter_without_a_base_is_refused_with_both_ways_out(family: Family) -> None:
    with pytest.raises(
        MergeError, match=r"lora is an adapter: give the model that it belongs to as `base`, or write model\+adapter"
    ):
        check(Recipe(method="linear", models=(str(family.adapters["lora"]), str(family.other))))


@pytest.mark.parametrize("as_base", [True, False])
def test_an_adapter_where_a_full_model_is_needed_is_refused_with_its_base(as_base: bool, family: Family) -> None:
    one, two = str(family.adapters["lora"]), str(family.adapters["rslora"])
    base, model = (one, str(family.other)) if as_base else (str(family.base), f"{one}+{two}")
    with pytest.raises(MergeError, match=r"lora is an adapter, and a full model is needed there: take its base") as caught:
        check(Recipe(method="task_arithmetic", base=base, models=(model,)))  # type: ignore[arg-type]
    assert str(caught.value).endswith(f"which is {family.base}.")


def test_an_adapter_of_another_architecture_is_refused_by_the_names_of_its_tensors(family: Family, tmp_path: Path) -> None:
    (base,) = make_models(tmp_path, "gpt2", 1)
    with pytest.raises(
        CheckpointError, match=r"no such tensors as the adapter changes: 'model\.layers\.0\.mlp\.up_proj\.weight'"
    ) as caught:
        check(Recipe(method="task_arithmetic", base=base, models=(str(family.adapters["lora"]),)))  # type: ignore[arg-type]
    assert f"It was trained on {family.base}" in str(caught.value)


def test_an_adapter_of_other_shapes_is_refused_by_tensor_and_shapes(family: Family, tmp_path: Path) -> None:
    (base,) = make_models(tmp_path, "llama", 1, hidden_size=64)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has shape \[48, 32\], the base has \[48, 64\]"):
        check(Recipe(method="task_arithmetic", base=base, models=(str(family.adapters["lora"]),)))  # type: ignore[arg-type]


def test_a_full_model_in_place_of_an_adapter_is_refused(family: Family) -> None:
    with pytest.raises(CheckpointError, match="it is not an adapter"):
        check(Recipe(method="linear", models=(f"{family.base}+{family.other}",)))


def test_an_adapter_that_stands_twice_merges_twice(family: Family, tmp_path: Path) -> None:
    one = str(family.adapters["lora"])
    twice = merged(Recipe(method="task_arithmetic", base=family.base, models=(one, one)), tmp_path / "out")  # type: ignore[arg-type]
    start, delta = stored(family.base), family.delta("lora")
    assert farthest(twice, {name: start[name] + 2 * delta[name] for name in start}) < 1e-6
