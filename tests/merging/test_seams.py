"""Maps of the residual stream: they do what they promise to means and spreads, in closed form and on a path."""

from pathlib import Path

import pytest
import torch
from path_models import IDS, dare_ties, family, path_model, steps
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_merge.errors import MergeError, RecipeError
from hf_merge.merging.calibration import aligned
from hf_merge.merging.prefixes import Prefixes
from hf_merge.merging.seams import KINDS, Seam, fitted
from hf_merge.single import merge

PATH = steps(("model1", 0), ("model1", 1), ("model2", 1), ("model2", 2), ("model1", 3))
"""Its seams are before positions 2 (a layer twice, of two models) and 4."""
INPUTS = {"input_ids": torch.arange(96).reshape(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.int64)}


def cloud(seed: int, spread: float = 1.0) -> Tensor:
    """Correlated activations `(400, 6)`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return spread * torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mixing + seed


def test_a_scalar_has_the_targets_root_mean_square() -> None:
    source, target = cloud(1), cloud(2, 3.0)
    mapped = fitted("scalar", source, target)(source)
    assert mapped.square().mean() == pytest.approx(float(target.square().mean()))


def test_a_diagonal_map_has_the_targets_mean_and_deviation_in_each_channel() -> None:
    source, target = cloud(1), cloud(2, 3.0)
    mapped = fitted("diag", source, target)(source)
    torch.testing.assert_close(mapped.mean(0), target.mean(0))
    torch.testing.assert_close(mapped.std(0), target.std(0))


def test_coral_has_the_targets_mean_and_covariance() -> None:
    source, target = cloud(1), cloud(2, 3.0)
    mapped = fitted("coral", source, target, 0.0)(source)
    torch.testing.assert_close(mapped.mean(0), target.mean(0))
    torch.testing.assert_close(mapped.T.cov(), target.T.cov())


def test_coral_is_the_papers_closed_form() -> None:
    source, target = cloud(1), cloud(2, 3.0)

    def root(matrix: Tensor, power: float) -> Tensor:
        u, s, v = torch.linalg.svd(matrix)
        return u @ torch.diag(s**power) @ v

    # x' = A x with A = Σ_t^½ Σ_s^-½ for columns; rows take its transpose.
    wanted = (root(target.T.cov(), 0.5) @ root(source.T.cov(), -0.5)).T
    torch.testing.assert_close(fitted("coral", source, target, 0.0).weight, wanted)


def test_coral_shrunk_to_the_end_is_one_scale_for_all_channels() -> None:
    weight = fitted("coral", cloud(1), cloud(2, 3.0), 1.0).weight
    torch.testing.assert_close(weight, weight[0, 0] * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_activations_are_left_as_they_are(kind: str) -> None:
    source = cloud(1)
    torch.testing.assert_close(fitted(kind, source, source, 0.1)(source), source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "tokens", "message"),
    [("affine", 400, "Did you mean|Known"), ("scalar", 1, "too few"), ("coral", 6, "too few")],
)
def test_what_cannot_be_fitted_is_an_error(kind: str, tokens: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fitted(kind, cloud(1)[:tokens], cloud(2), 0.0)  # type: ignore[arg-type]


def test_shrinkage_is_a_share() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        fitted("coral", cloud(1), cloud(2), 1.5)


def test_the_same_map_has_the_same_digest_and_another_one_another() -> None:
    one, again, other = (fitted("diag", cloud(1), cloud(seed)) for seed in (2, 2, 3))
    assert one.digest == again.digest != other.digest


def test_scalars_become_the_scales_of_the_seams_alone(tmp_path: Path) -> None:
    path, seams = aligned(path_model(dare_ties(family(tmp_path, "llama"))), PATH, INPUTS)
    assert seams == {}
    assert [step.scale != 1.0 for step in path] == [False, False, True, False, True]


def met(root: Path, model: str, layer: int) -> Tensor:
    """What a layer of a model meets, by transformers' own account."""
    loaded = AutoModelForCausalLM.from_pretrained(root / model).eval()
    with torch.no_grad():
        return loaded(**INPUTS, output_hidden_states=True).hidden_states[layer].flatten(0, 1)


@pytest.mark.parametrize("kind", ["diag", "coral"])
def test_behind_a_seam_a_layer_meets_what_it_meets_in_its_own_model(kind: str, tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    path, seams = aligned(model, PATH, INPUTS, kind, shrinkage=0.0)  # type: ignore[arg-type]
    caught: list[Tensor] = []
    model.take(path, seams)
    model.layers[4].input_layernorm.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model.model(**INPUTS)
    torch.testing.assert_close(caught[0].mean(0), met(tmp_path, "model1", 3).mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(caught[0].std(0), met(tmp_path, "model1", 3).std(0), rtol=1e-2, atol=1e-3)


def test_padding_takes_no_part(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    wanted, _ = aligned(model, PATH, INPUTS)
    padded = {name: torch.cat([tensor, torch.zeros(8, 5, dtype=torch.int64)], 1) for name, tensor in INPUTS.items()}
    found, _ = aligned(model, PATH, padded)
    assert [step.scale for step in found] == pytest.approx([step.scale for step in wanted], rel=1e-5)


def test_a_model_runs_its_own_path_again_after_another_was_calibrated(tmp_path: Path) -> None:
    prefixes = Prefixes()
    model = path_model(dare_ties(family(tmp_path, "llama")), prefixes)
    with torch.no_grad():
        before = model.take(PATH[:2])(IDS).logits
        counts = prefixes.asked, prefixes.done
        aligned(model, PATH, INPUTS, "diag")
        assert (prefixes.asked, prefixes.done) == counts
        assert model.path == PATH[:2]
        assert torch.equal(model.model(IDS).logits, before)


def test_prefixes_tell_maps_apart(tmp_path: Path) -> None:
    recipe = dare_ties(family(tmp_path, "llama"))
    plain, shared = path_model(recipe), path_model(recipe, Prefixes())
    _, seams = aligned(plain, PATH, INPUTS, "diag")
    with torch.no_grad():
        for given in ({}, seams, {2: seams[2]}):
            assert torch.equal(plain.take(PATH, given)(IDS).logits, shared.take(PATH, given)(IDS).logits)


def test_a_path_with_scales_from_activations_is_stored(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama", rms_norm_eps=1e-12)))
    path, _ = aligned(model, PATH, INPUTS)
    merge(model.recipe_of(path), tmp_path / "out", progress=False)
    with torch.no_grad():
        wanted = model.take(path)(IDS).logits
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, wanted, rtol=0, atol=1e-5
        )


def test_other_maps_are_not_stored_and_the_reason_is_said(tmp_path: Path) -> None:
    model = path_model(dare_ties(family(tmp_path, "llama")))
    seam = Seam("diag", torch.ones(32), torch.zeros(32))
    with pytest.raises(MergeError, match=r"diag map before position 2 .* do not commute"):
        model.recipe_of(PATH, {2: seam})
