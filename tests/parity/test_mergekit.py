"""The same recipe gives the same model as in mergekit 0.1.5, whose results are stored in `golden`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_merge.merging.plan import TensorJob, open_inputs, plan
from hf_merge.methods import METHODS
from hf_merge.recipes import yaml
from hf_merge.single import merge
from hf_merge.tensors.rng import STEPS, Draws

GOLDEN = Path(__file__).parent / "golden"
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
NAMES = sorted(path.stem for path in GOLDEN.glob("*.yaml") if not path.stem.startswith("masked-"))


@dataclass(frozen=True)
class Masks(Draws):
    """In place of random numbers the masks `(models, n)` of a tensor of one block."""

    masks: Tensor

    def uniform(self, model: int, count: int) -> Tensor:
        return torch.where(self.masks[model].bool(), 0, STEPS).int()


def recipe_file(name: str, folder: Path) -> Path:
    """The recipe with the inputs' true folder."""
    file = folder / f"{name}.yaml"
    file.write_text((GOLDEN / f"{name}.yaml").read_text().replace("INPUTS", str(GOLDEN / "inputs")))
    return file


def merged(name: str, folder: Path) -> dict[str, Tensor]:
    """Our result."""
    merge(recipe_file(name, folder), folder / "out", progress=False)
    return load_file(folder / "out" / "model.safetensors")


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """By element, relative to its magnitude or, if that is larger, to the tensor's root mean square."""
    ours, theirs = ours.double(), theirs.double()
    return (ours - theirs).abs() / torch.maximum(theirs.abs(), theirs.square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_gives_the_values_that_mergekit_gives(name: str, tmp_path: Path) -> None:
    ours, theirs = merged(name, tmp_path), load_file(GOLDEN / f"{name}.safetensors")
    assert ours.keys() == theirs.keys()
    worst = max(theirs, key=lambda tensor: float(difference(ours[tensor], theirs[tensor]).max()))
    assert float(difference(ours[worst], theirs[worst]).max()) <= 1e-6, worst


@pytest.mark.parametrize("method", RANDOM)
def test_a_random_method_gives_the_values_that_mergekit_gives_with_the_same_masks(method: str, tmp_path: Path) -> None:
    recipe = yaml.load(recipe_file(f"masked-{method}", tmp_path))
    jobs, recorded = plan(recipe, open_inputs(recipe)).jobs, load_file(GOLDEN / f"masked-{method}.safetensors")
    worst = max(float(difference(with_masks(job, recorded), recorded[f"{name}|merged"]).max()) for name, job in jobs.items())
    assert worst <= 1e-6


def with_masks(job: TensorJob, recorded: dict[str, Tensor]) -> Tensor:
    """A job's tensor, merged with the recorded masks in place of random numbers."""
    assert job.base is not None
    assert job.method is not None
    base = job.base.read(0, job.elements)
    # Only float32 on the CPU has its draws made where they are needed; float64 asks for them.
    deltas = (torch.stack([source.read(0, job.elements) for source in job.sources]) - base).double()
    masks = torch.stack([recorded[f"{job.name}|mask|{k}"].flatten() for k in range(len(deltas))])
    draws = Masks(0, job.models, job.name, 0, masks)
    arguments: dict[str, Any] = {name: value for name, value in job.arguments.items() if name != "scaling"}
    state = job.method.measured(lambda: [deltas], job.elements, arguments, shape=job.spec.shape, draws=lambda _: draws)
    delta = job.method.merge_block(deltas, arguments, rng=draws, measured=state, start=0, shape=job.spec.shape)
    return (base + delta).reshape(job.spec.shape)


def test_every_method_of_mergekit_is_compared() -> None:
    theirs = {
        "linear",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "task_arithmetic",
        "ties",
        "breadcrumbs",
        "breadcrumbs_ties",
    }
    theirs |= {"sce", "ram", "ramplus_tl", "model_stock", "nearswap", "arcee_fusion", "passthrough", *RANDOM}
    assert theirs <= METHODS.keys()
    assert theirs <= {name.split("-")[0] for name in NAMES} | {path.stem[7:] for path in GOLDEN.glob("masked-*.yaml")}
