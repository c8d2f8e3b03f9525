"""Do models fit each other? Everything that does not is said at once, from headers and small files alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, Maker
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.demo.hub.server import LocalHub
from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging.align import Alignment, align
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Recipe
from hf_merge.single import check, merge

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def aligned(*folders: Path) -> Alignment:
    return align([Checkpoint(ModelRef(str(folder))) for folder in folders])


def mismatches(*folders: Path) -> str:
    with pytest.raises(MergeError) as caught:
        aligned(*folders)
    return str(caught.value)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Change tensors of a saved model; None removes one."""
    kept = {name: tensor for name, tensor in (tensors(folder) | changes).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def bare(folder: Path, config: dict | None = None, **content: Tensor) -> Path:
    """A model of no architecture that transformers knows."""
    folder.mkdir()
    save_file(content, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_of_one_architecture_align_name_by_name(make: Maker) -> None:
    folders = make("llama", 3)
    assert aligned(*folders).tensors == {name: (name,) * 3 for name in sorted(tensors(folders[0]))}


def test_every_mismatch_of_every_model_stands_in_one_message(make: Maker) -> None:
    base, one, two = make("llama", 3)
    store(one, {UP: None, "extra.weight": torch.zeros(2), "model.norm.weight": torch.zeros(32, dtype=torch.int32)})
    store(two, {UP: torch.zeros(3, 3)})
    configure(two, num_attention_heads=8)
    said = mismatches(base, one, two)
    assert f"do not fit {base}, 5 mismatches:" in said
    for line in (
        f"{one}: tensor {UP!r} is missing.",
        f"{one}: tensor 'extra.weight' does not exist in {base}.",
        f"{one}: 'model.norm.weight' is torch.int32, in {base} torch.float32.",
        f"{two}: {UP!r} has shape [3, 3], {base} has [48, 32].",
        f"{two}: num_attention_heads is 8 in config.json, {base} has 4.",
    ):
        assert f"\n  - {line}" in said
    assert said.count("\n") == 5


def test_tensor_that_is_floating_point_only_in_the_model_is_a_mismatch(make: Maker) -> None:
    base, model = make("llama", 2)
    store(base, {"model.norm.weight": torch.zeros(32, dtype=torch.int64)})
    assert f"'model.norm.weight' is torch.float32, in {base} torch.int64" in mismatches(base, model)


def test_floating_point_dtypes_may_differ(make: Maker) -> None:
    base, model = make("llama", 2)
    store(model, {UP: tensors(model)[UP].bfloat16()})
    assert aligned(base, model).tensors[UP] == (UP, UP)


def test_another_architecture_is_said_first(make: Maker) -> None:
    base, model = make("llama", 1)[0], make("gpt2", 1, parent="gpt2")[0]
    first, second = mismatches(base, model).splitlines()[1:3]
    assert "another architecture: model_type is 'gpt2'" in first
    assert "architectures is ['GPT2LMHeadModel']" in second


@pytest.mark.parametrize("missing", [1, 2, 30])
def test_every_mismatch_is_listed_and_all_are_counted(missing: int, tmp_path: Path) -> None:
    base = bare(tmp_path / "base", **{f"t{i:02}": torch.zeros(1) for i in range(31)})
    model = bare(tmp_path / "model", **{f"t{i:02}": torch.zeros(1) for i in range(missing, 31)})
    said = mismatches(base, model)
    assert said.count("is missing") == missing
    assert f", {missing} mismatch{'es' if missing > 1 else ''}:" in said


def test_same_size_of_vocabulary_with_other_tokens_is_refused(make: Maker) -> None:
    base = make("llama", 1)[0]
    model = make("llama", 1, parent="other", words=[*WORDS[:-2], "new", WORDS[-1]])[0]
    said = mismatches(base, model)
    assert "1 mismatch:" in said
    assert f"another vocabulary: 2 tokens differ from {base}'s 96 ('new', 'w91')" in said


def test_same_tokens_in_another_order_are_refused(make: Maker) -> None:
    base = make("llama", 1)[0]
    model = make("llama", 1, parent="other", words=[*WORDS[:3], *reversed(WORDS[3:])])[0]
    assert "92 tokens differ" in mismatches(base, model)


def test_vocabulary_of_another_size_is_refused_with_the_likely_reason(make: Maker) -> None:
    base = make("llama", 1)[0]
    model = make("llama", 1, parent="other", words=[*WORDS, "more"], vocab_size=97)[0]
    said = mismatches(base, model)
    assert f"{EMBED!r} has shape [97, 32], {base} has [96, 32] (another vocabulary?)" in said
    assert f"another vocabulary: 1 tokens differ from {base}'s 96 ('more')" in said


def test_tokenizers_that_differ_in_more_than_tokens_fit(make: Maker) -> None:
    base, model = make("llama", 2)
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content | {"truncation": None, "padding": None}, indent=1))
    assert (model / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    assert aligned(base, model).tensors


@pytest.mark.parametrize(
    ("file", "one", "other", "differing"),
    [
        ("vocab.txt", "a\nb\nc\n", "a\nc\nb\n", 2),
        ("vocab.json", '{"a": 0, "b": 1}', '{"a": 0, "b": 2}', 1),
        ("tokenizer.json", '{"model": {"vocab": [["a", -1.5], ["b", -2]]}}', '{"model": {"vocab": [["a", 0], ["c", 0]]}}', 2),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<x>"}]}',
            '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<y>"}]}',
            2,
        ),
    ],
)
def test_every_form_of_vocabulary_is_compared(file: str, one: str, other: str, differing: int, tmp_path: Path) -> None:
    folders = [bare(tmp_path / name, w=torch.zeros(1)) for name in ("base", "model")]
    for folder, text in zip(folders, (one, other), strict=True):
        (folder / file).write_text(text)
    assert f"{differing} tokens differ" in mismatches(*folders)


@pytest.mark.parametrize("text", ["{broken", "[1]", '{"added_tokens": [{"id": 1}]}', '{"model": {"vocab": 3}}'])
def test_tokenizer_that_is_none_is_an_error_that_names_it(text: str, make: Maker) -> None:
    base, model = make("llama", 2)
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"{model}: tokenizer\.json"):
        aligned(base, model)


def test_class_labels_that_differ_are_refused(make: Maker) -> None:
    base, model = make("bert", 2)
    configure(base, id2label={str(i): word for i, word in enumerate("abcde")})
    configure(model, id2label={str(i): word for i, word in enumerate("abced")})
    said = mismatches(base, model)
    assert "1 mismatch:" in said
    assert "its classes are ['a', 'b', 'c', 'e', 'd']" in said
    assert "the heads mean different things" in said


def test_class_labels_are_compared_in_the_order_of_their_numbers(make: Maker) -> None:
    base, model = make("bert", 2, num_labels=12)
    named = {str(i): f"class {i}" for i in range(12)}
    configure(base, id2label=named)
    configure(model, id2label=dict(sorted(named.items(), key=lambda pair: pair[1])))
    assert aligned(base, model).tensors


def test_unnamed_class_labels_fit_any(make: Maker) -> None:
    base, model = make("bert", 2)
    configure(model, id2label={str(i): word for i, word in enumerate("abcde")})
    assert aligned(base, model).tensors


@pytest.mark.parametrize("position", [0, 1])
def test_quantized_weights_are_refused(position: int, make: Maker) -> None:
    folders = make("llama", 2)
    configure(folders[position], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=rf"{folders[position]}: its weights are quantized \(gptq\)"):
        aligned(*folders)


# Tied weights


def test_models_that_are_both_tied_have_one_tensor(make: Maker) -> None:
    folders = make("tied-llama", 2)
    assert HEAD not in tensors(folders[0])
    found = aligned(*folders).tensors
    assert found[EMBED] == (EMBED, EMBED)
    assert HEAD not in found


@pytest.mark.parametrize("holders", [(0,), (1,), (0, 1)])
def test_redundant_copy_of_a_tied_tensor_changes_nothing(holders: tuple[int, ...], make: Maker, tmp_path: Path) -> None:
    folders = make("tied-llama", 2)
    recipe = Recipe(method="task_arithmetic", base=str(folders[0]), models=(str(folders[1]),), parameters={"scaling": 0.5})
    merge(recipe, tmp_path / "plain", progress=False)
    for i in holders:
        store(folders[i], {HEAD: tensors(folders[i])[EMBED].clone()})
    assert HEAD not in aligned(*folders).tensors
    merge(recipe, tmp_path / "copies", progress=False)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "copies/model.safetensors").read_bytes()


def test_tied_model_that_stores_only_the_copy_is_read_from_there(make: Maker) -> None:
    base, model = make("tied-llama", 2)
    store(model, {HEAD: tensors(model)[EMBED], EMBED: None})
    assert aligned(base, model).tensors[EMBED] == (EMBED, HEAD)


def test_tied_base_that_stores_only_the_copy_keeps_it(make: Maker) -> None:
    base, model = make("tied-llama", 2)
    store(base, {HEAD: tensors(base)[EMBED], EMBED: None})
    found = aligned(base, model).tensors
    assert found[HEAD] == (HEAD, EMBED)
    assert EMBED not in found


def test_tied_model_gives_its_embedding_to_both_tensors_of_an_untied_base(make: Maker, tmp_path: Path) -> None:
    base, model = make("llama", 1)[0], make("tied-llama", 2, parent="tied")[1]
    found = aligned(base, model).tensors
    assert found[EMBED] == (EMBED, EMBED)
    assert found[HEAD] == (HEAD, EMBED)
    merge(Recipe(method="task_arithmetic", base=str(base), models=(str(model),)), tmp_path / "out", progress=False)
    result, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tensors(model)[EMBED]
    assert not result.config.tie_word_embeddings
    torch.testing.assert_close(result.lm_head.weight.data, wanted)
    torch.testing.assert_close(result.model.embed_tokens.weight.data, wanted)


def test_untied_model_does_not_fit_a_tied_base(make: Maker) -> None:
    base, model = make("tied-llama", 1)[0], make("llama", 2, parent="untied")[1]
    said = mismatches(base, model)
    assert "1 mismatch:" in said
    assert f"tensor {HEAD!r} does not exist in {base}, where it is tied to {EMBED!r}." in said


def test_untied_model_does_not_fit_a_tied_base_that_stores_the_copy(make: Maker) -> None:
    base, model = make("tied-llama", 1)[0], make("llama", 2, parent="untied")[1]
    store(base, {HEAD: tensors(base)[EMBED].clone()})
    assert f"tensor {HEAD!r} does not exist in {base}, where it is tied" in mismatches(base, model)


# Integer buffers


def test_integer_buffer_only_in_the_base_is_carried_over(make: Maker, tmp_path: Path) -> None:
    base, model = make("bert", 2)
    name, ids = "bert.embeddings.position_ids", torch.arange(512)[None]
    store(base, {name: ids})
    assert aligned(base, model).tensors[name] == (name, "")
    recipe = Recipe(method="linear", models=(str(base), str(model)), dtype="bfloat16")
    merge(recipe, tmp_path / "out", progress=False)
    assert torch.equal(tensors(tmp_path / "out")[name], ids)


def test_integer_buffer_only_in_a_model_is_left_out(make: Maker) -> None:
    base, model = make("bert", 2)
    store(model, {"bert.embeddings.position_ids": torch.arange(512)[None]})
    assert "bert.embeddings.position_ids" not in aligned(base, model).tensors


def test_integer_buffers_of_different_lengths_are_a_mismatch(tmp_path: Path) -> None:
    folders = [bare(tmp_path / f"{n}", w=torch.zeros(1), ids=torch.arange(n)) for n in (3, 4)]
    assert "'ids' has shape [4]" in mismatches(*folders)


# Architectures that transformers does not know, and configs that make no sense


@pytest.mark.parametrize("config", [None, {}, {"model_type": "of_next_year", "architectures": ["OfNextYear"]}])
def test_unknown_architecture_is_merged_by_names(config: dict | None, tmp_path: Path) -> None:
    folders = [bare(tmp_path / name, config, a=torch.full((2,), v), b=torch.zeros(1)) for name, v in (("x", 1.0), ("y", 2.0))]
    assert aligned(*folders).tensors == {"a": ("a", "a"), "b": ("b", "b")}
    merge(Recipe(method="linear", models=tuple(map(str, folders))), tmp_path / "out", progress=False)
    assert tensors(tmp_path / "out")["a"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "Trainer", "modeling_utils", "PreTrainedConfig"])
def test_only_a_model_s_class_is_taken_for_an_architecture(name: str, make: Maker) -> None:
    folders = make("llama", 2)
    for folder in folders:
        configure(folder, architectures=[name])
    assert aligned(*folders).tensors.keys() == tensors(folders[0]).keys()


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "many"}, {"num_attention_heads": 3}, {"rope_parameters": {"rope_type": "odd"}}, {"id2label": {"a": "b"}}],
)
def test_config_of_which_transformers_makes_no_model_is_an_error_that_names_it(change: dict, make: Maker) -> None:
    base, model = make("llama", 2)
    for folder in (base, model):
        configure(folder, **change)
    with pytest.raises(CheckpointError, match=rf"^{base}: transformers cannot make a LlamaForCausalLM of config\.json"):
        check(Recipe(method="linear", models=(str(base), str(model))))


def test_class_labels_that_are_not_numbered_do_not_stop_an_unknown_architecture(tmp_path: Path) -> None:
    folders = [bare(tmp_path / name, {"id2label": {"a": "b"}}, w=torch.zeros(1)) for name in ("x", "y")]
    assert aligned(*folders).tensors


# What is read


def test_nothing_but_headers_and_small_files_is_read(make: Maker, hub: LocalHub) -> None:
    folders = make("llama", 3, hidden_size=256, intermediate_size=512, vocab_size=2000, shard=4_000_000)
    for folder in folders:
        hub.seed(f"headers/{folder.name}", folder)
    shards = sum(len(list(folder.glob("*.safetensors"))) for folder in folders)
    assert shards > 3
    hub.clear_requests()
    found = align([Checkpoint(ModelRef(f"headers/{folder.name}")) for folder in folders])
    assert len(found.tensors) == 21
    assert 0 < hub.bytes_served("*.safetensors") <= 100_000 * shards
    small = {"model.safetensors.index.json", "config.json", "tokenizer.json"}
    others = {request.path.rpartition("/")[2] for request in hub.requests() if "/resolve/" in request.path}
    assert {name for name in others if not name.endswith(".safetensors")} == small
