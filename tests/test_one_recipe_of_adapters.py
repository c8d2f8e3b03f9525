"""Adapters merged into one adapter by a recipe: the same logits as the sum of what each changes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import Maker
from transformers import AutoModelForCausalLM

from hf_merge.adapters import merge_adapters
from hf_merge.cli import main
from hf_merge.errors import MergeError, RecipeError
from hf_merge.recipes import yaml
from hf_merge.recipes.recipe import Recipe, RecipeModel

IDS = torch.arange(3, 15).reshape(1, -1)


@pytest.fixture
def adapters(make: Maker, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and three adapters of it of different ranks, one rslora."""
    (base,) = make("llama", 1)
    folders = []
    for number, (rank, more) in enumerate([(2, {}), (4, {"use_rslora": True}), (3, {})]):
        torch.manual_seed(number)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "up_proj"], **more)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"adapter{number}")
        folders.append(tmp_path / f"adapter{number}")
    return base, folders


def recipe_of(base: Path, folders: list[Path], **more: object) -> Recipe:
    models = tuple(
        RecipeModel(ref=m.ref, parameters={"weight": w})
        for m, w in zip(
            Recipe(method="task_arithmetic", base=str(base), models=tuple(map(str, folders))).models,  # type: ignore[arg-type]
            (0.5, 0.3, -0.2),
            strict=True,
        )
    )
    return Recipe(method="task_arithmetic", base=str(base), models=models, **more)  # type: ignore[arg-type]


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    with torch.no_grad():
        return model(IDS).logits


def summed(base: Path, folders: list[Path], scaling: float) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for folder, weight in zip(folders, (0.5, 0.3, -0.2), strict=True):
        own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload().state_dict()
        for name, value in model.state_dict().items():
            value += scaling * weight * (own[name] - start[name])
    with torch.no_grad():
        return model(IDS).logits


def test_one_adapter_by_concatenation_gives_the_logits_of_the_sum(adapters: tuple, tmp_path: Path) -> None:
    base, folders = adapters
    report = merge_adapters(recipe_of(base, folders, parameters={"scaling": 0.7}), tmp_path / "one")
    assert report.exact
    assert {module.rank for module in report.modules.values()} == {9}
    torch.testing.assert_close(logits(base, tmp_path / "one"), summed(base, folders, 0.7), rtol=0, atol=1e-6)


def test_a_rank_truncates_and_the_error_is_reported(adapters: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, folders = adapters
    (tmp_path / "recipe.yaml").write_text(yaml.dumps(recipe_of(base, folders)))
    assert main(["adapters", str(tmp_path / "recipe.yaml"), str(tmp_path / "one"), "--rank", "3"]) == 0
    assert "truncated: relative error" in capsys.readouterr().out


def test_what_is_no_weighted_sum_of_adapters_is_refused(adapters: tuple, tmp_path: Path) -> None:
    base, folders = adapters
    with pytest.raises(RecipeError, match="task_arithmetic or linear"):
        merge_adapters(Recipe(method="ties", base=str(base), models=tuple(map(str, folders))), tmp_path / "one")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no adapters, but full models"):
        merge_adapters(Recipe(method="linear", models=(str(base),)), tmp_path / "one")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="not empty"):
        merge_adapters(recipe_of(base, folders), folders[0])
