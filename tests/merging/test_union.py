"""Models that added tokens of their own, merged into one model with all of them, end to end."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_adapters import peft_merged, save_adapter
from tiny_models import Maker
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_merge.cli import main
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import MergeError
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import open_inputs
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.tokenizer import TokenizerRequest
from hf_merge.single import check, merge

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWNERS = {"<math>": 1, "<code>": 2, "<x>": 2}
UNION = TokenizerRequest(source="union")
METHODS = ["task_arithmetic", "ties", "linear", "slerp", "dare_ties"]


def grow(folder: Path, *tokens: str, rows: int | None = None) -> None:
    """Add tokens with random rows to a saved model; `rows` of the embeddings with padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[96:].normal_()
    model.save_pretrained(folder)


@pytest.fixture
def family(make: Maker) -> list[Path]:
    return grown(make("llama", 3))


def grown(folders: list[Path], rows: int | None = None) -> list[Path]:
    """The second and third model with tokens of their own."""
    torch.manual_seed(1)
    for i in (1, 2):
        grow(folders[i], *(token for token, owner in OWNERS.items() if owner == i), rows=rows)
    return folders


def recipe_of(method: str, folders: list, **more: object) -> Recipe:
    base, *models = map(str, folders)
    anchor = None if method == "slerp" else base
    return Recipe(method=method, base=anchor, models=tuple(models), **{"tokenizer": UNION} | more)  # type: ignore[arg-type]


def row(folder: Path, token: str, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)]


@pytest.mark.parametrize("method", METHODS)
def test_each_added_token_has_its_owners_rows_in_the_loaded_result(method: str, family: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe_of(method, family), out, progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings == 99
    for token, owner in OWNERS.items():
        (number,) = tokenizer(token, add_special_tokens=False).input_ids
        assert tokenizer.decode([number]) == token
        for name, module in ((EMBED, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
            found, expected = module.weight[number].detach(), row(family[owner], token, name)
            if method == "slerp":
                # It walks along the arc between whole tensors: what both have alike keeps its direction and not its length.
                found = found / found.norm() * expected.norm()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_rows_that_all_share_are_merged_as_without_the_added_ones(method: str, make: Maker, tmp_path: Path) -> None:
    plain, folders = make("llama", 3, parent="without"), grown(make("llama", 3))
    merge(recipe_of(method, folders), tmp_path / "out", progress=False)
    merge(recipe_of(method, plain, tokenizer=None), tmp_path / "plain", progress=False)
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    for name in expected:
        assert torch.equal(found[name][:96], expected[name])


@pytest.mark.parametrize("method", METHODS)
def test_streaming_from_the_hub_gives_the_bits_of_the_disk(
    method: str, family: list[Path], hub: LocalHub, tmp_path: Path
) -> None:
    ids = [f"union-{method.replace('_', '-')}/{folder.name}" for folder in family]
    for repo_id, folder in zip(ids, family, strict=True):
        hub.seed(repo_id, folder)
    merge(recipe_of(method, ids), tmp_path / "hub", progress=False)
    merge(recipe_of(method, family), tmp_path / "disk", progress=False)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes(), file


@pytest.mark.parametrize("rows", [104, 128])
def test_padded_embeddings_keep_their_size_and_give_their_rows_to_new_tokens(rows: int, make: Maker, tmp_path: Path) -> None:
    folders = make("llama", 3)
    torch.manual_seed(0)
    grow(folders[0], rows=rows)
    grown(folders, rows)
    merge(recipe_of("task_arithmetic", folders), tmp_path / "out", progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), model.config.vocab_size) == (99, rows)
    for token, owner in OWNERS.items():
        found = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)]
        assert found.tolist() == pytest.approx(row(folders[owner], token, EMBED).tolist(), abs=1e-6)


def test_the_result_is_padded_to_a_multiple_that_is_asked_for(family: list[Path], tmp_path: Path) -> None:
    request = TokenizerRequest(source="union", pad_to_multiple_of=64)
    merge(recipe_of("linear", family, tokenizer=request), tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 128
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 99


def test_tied_embeddings_take_the_rows_of_every_model(make: Maker, tmp_path: Path) -> None:
    folders = grown(make("tied-llama", 3))
    merge(recipe_of("task_arithmetic", folders), tmp_path / "out", progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for token, owner in OWNERS.items():
        found = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)]
        assert found.tolist() == pytest.approx(row(folders[owner], token, EMBED).tolist(), abs=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_a_live_model_takes_recipes_of_one_vocabulary(method: str, family: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(method, family)
    live = LiveModel(recipe_of(method, family, parameters={"weight": 0.1}), open_inputs(recipe))
    assert live.model.config.vocab_size == 99
    live.load(recipe)
    merge(recipe, tmp_path / "out", progress=False)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(live.model.state_dict()[name], tensor)


def test_a_recipe_in_yaml_asks_for_the_union(family: list[Path], tmp_path: Path) -> None:
    base, one, two = family
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {one}}}, {{model: {two}}}]\n"
        "parameters: {weight: 0.5}\ntokenizer: {source: union}\n"
    )
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    merge(recipe_of("task_arithmetic", family, parameters={"weight": 0.5}), tmp_path / "expected", progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    merge(tmp_path / "out/recipe.yaml", tmp_path / "again", progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_checking_says_which_tokens_are_added(family: list[Path]) -> None:
    shown = str(check(recipe_of("ties", family)))
    assert "Vocabulary: 99 tokens in 99 rows, 3 added: '<math>', '<code>', '<x>'" in shown


@pytest.mark.parametrize("rows", [None, 128])
def test_vocabularies_that_differ_without_a_request_are_refused_with_the_remedy(
    rows: int | None, make: Maker, tmp_path: Path
) -> None:
    folders = make("llama", 3)
    if rows:
        grow(folders[0], rows=rows)
    grown(folders, rows)
    with pytest.raises(MergeError, match=r"another vocabulary") as caught:
        merge(recipe_of("ties", folders, tokenizer=None), tmp_path / "out", progress=False)
    for said in ("model1", "model2", "'<math>'", "tokenizer: {source: union}"):
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", ["{adapter}", "{base}+{adapter}"])
@pytest.mark.parametrize("trained", [["q_proj"], ["embed_tokens", "q_proj"]])
def test_an_adapter_merges_into_another_vocabulary_as_its_full_model_does(
    trained: list[str], written: str, family: list[Path], tmp_path: Path
) -> None:
    base, one, _ = family
    adapter = save_adapter(base, tmp_path / "adapter", "llama", r=2, target_modules=trained)
    full = AutoModelForCausalLM.from_pretrained(base)
    full.load_state_dict(peft_merged(base, adapter, "llama"))
    full.save_pretrained(tmp_path / "full")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "full")
    results = []
    for model in (written.format(base=base, adapter=adapter), tmp_path / "full"):
        merge(recipe_of("task_arithmetic", [base, model, one]), tmp_path / str(len(results)), progress=False)
        results.append(load_file(tmp_path / str(len(results)) / "model.safetensors"))
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[0][name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(results[0][EMBED][96], row(one, "<math>", EMBED), rtol=0, atol=1e-6)


def test_an_adapter_s_embeddings_in_half_precision_stay_in_it(make: Maker, tmp_path: Path) -> None:
    base, one = make("llama", 2, dtype=torch.bfloat16)
    grow(one, "<math>")
    adapter = save_adapter(base, tmp_path / "adapter", "llama", r=2, target_modules=["embed_tokens"])
    models = (f"{base}+{adapter}", str(one))
    merge(Recipe(method="linear", models=models, tokenizer=UNION), tmp_path / "out", progress=False)  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_that_resized_its_vocabulary_is_refused_with_what_can_be_done(family: list[Path], tmp_path: Path) -> None:
    base, one, two = family
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(two),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"resized the vocabulary .* Merge it into its model first"):
        check(recipe_of("task_arithmetic", [base, one, tmp_path / "adapter"]))


def test_generation_settings_and_config_name_the_ids_of_the_result(family: list[Path], tmp_path: Path) -> None:
    merge(recipe_of("linear", family), tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (99, 2, 0)
