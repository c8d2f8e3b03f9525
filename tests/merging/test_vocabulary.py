"""Models with different vocabularies: what each token's row becomes, and whether the result's tokenizer and configs agree."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Maker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.companions import companion_files
from hf_merge.checkpoints.source import Source, Stored
from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging.chat_templates import BUILTIN
from hf_merge.merging.embeddings import vocabulary_tensors
from hf_merge.merging.vocabulary import VocabularyPlan, align_vocabularies
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.tokenizer import TokenizerRequest, TokenRow

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def grow(folder: Path, *tokens: str | AddedToken, rows: int | None = None, special: bool = False) -> None:
    """Add tokens to a saved model as a fine-tune does, with random rows; `rows` of the embeddings with padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)


def opened(*folders: Path) -> list[Checkpoint]:
    return [Checkpoint(ModelRef(str(folder))) for folder in folders]


def vocabulary(
    *folders: Path, base: bool = True, source: str | Path = "union", **request: object
) -> tuple[VocabularyPlan, list[Checkpoint]]:
    inputs = opened(*folders)
    wanted = ModelRef(str(source)) if isinstance(source, Path) else source
    asked = TokenizerRequest(source=wanted, **request)  # type: ignore[arg-type]
    return align_vocabularies(asked, inputs, base=inputs[0] if base else None), inputs


def sources(plan: VocabularyPlan, inputs: list[Checkpoint], name: str = EMBED) -> list[Source]:
    found = [source for source in plan.realigned([Stored(checkpoint, name) for checkpoint in inputs]) if source is not None]
    assert len(found) == len(inputs)
    return found


def tables(plan: VocabularyPlan, inputs: list[Checkpoint], name: str = EMBED) -> list[Tensor]:
    """One tensor of every model as it is merged, whole."""
    found = []
    for source in sources(plan, inputs, name):
        assert source.shape[0] == plan.rows
        found.append(source.read(0, int(np.prod(source.shape))).view(source.shape))
    return found


def row(folder: Path, token: str, name: str = EMBED) -> Tensor:
    """A token's row as the model stores it."""
    return load_file(folder / "model.safetensors")[name][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)]


def written(plan: VocabularyPlan, inputs: list[Checkpoint], folder: Path) -> Path:
    """The result's companion files in a folder."""
    folder.mkdir(exist_ok=True)
    for name, data in plan.companions(companion_files(inputs[0], None)).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_token_that_one_model_added_has_its_row_in_every_model(make: Maker, name: str) -> None:
    base, one, two = make("llama", 3)
    grow(one, "<one>")
    grow(two, "<two>", "<more>")
    plan, inputs = vocabulary(base, one, two)
    assert plan.added == ("<one>", "<two>", "<more>")
    assert [plan.ids[token] for token in ("w92", "<one>", "<two>", "<more>")] == [95, 96, 97, 98]
    assert (plan.rows, plan.warnings) == (99, ())
    for table in tables(plan, inputs, name):
        assert torch.equal(table[96], row(one, "<one>", name))
        assert torch.equal(table[97], row(two, "<two>", name))
        assert torch.equal(table[98], row(two, "<more>", name))


def test_the_tokens_that_all_share_keep_each_models_row_and_the_bases_id(make: Maker) -> None:
    base, one, two = make("llama", 3)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one, two)
    for folder, table in zip((base, one, two), tables(plan, inputs), strict=True):
        assert torch.equal(table[:96], load_file(folder / "model.safetensors")[EMBED][:96])


def test_ids_that_differ_are_matched_by_token(make: Maker) -> None:
    base, one, two = make("llama", 3)
    grow(one, "<a>", "<b>")
    grow(two, "<b>", "<a>")
    plan, inputs = vocabulary(base, one, two)
    assert (plan.ids["<a>"], plan.ids["<b>"]) == (96, 97)
    _, first, second = tables(plan, inputs)
    assert torch.equal(first[96:], torch.stack([row(one, "<a>"), row(one, "<b>")]))
    assert torch.equal(second[96:], torch.stack([row(two, "<a>"), row(two, "<b>")]))


def test_what_several_models_added_is_their_mean_where_it_is_missing(make: Maker) -> None:
    base, one, two, three = make("llama", 4)
    grow(one, "<both>")
    grow(two, "<x>", "<both>")
    plan, inputs = vocabulary(base, one, two, three)
    mean = (row(one, "<both>") + row(two, "<both>")) / 2
    wanted = [mean, row(one, "<both>"), row(two, "<both>"), mean]
    assert torch.equal(torch.stack([table[plan.ids["<both>"]] for table in tables(plan, inputs)]), torch.stack(wanted))


def test_what_the_base_has_a_model_that_lacks_it_takes_from_the_base(make: Maker) -> None:
    base, one, two = make("llama", 3)
    grow(base, "<new>")
    grow(one, "<new>")
    plan, inputs = vocabulary(base, one, two)
    assert plan.added == ()
    assert torch.equal(tables(plan, inputs)[2][96], row(base, "<new>"))


def test_without_a_base_the_first_model_is_an_owner_like_others(make: Maker) -> None:
    first, second, third = make("llama", 3)
    grow(first, "<new>")
    grow(second, "<new>")
    plan, inputs = vocabulary(first, second, third, base=False)
    assert torch.equal(tables(plan, inputs)[2][96], (row(first, "<new>") + row(second, "<new>")) / 2)


def test_padded_embeddings_keep_their_size_while_new_tokens_fit(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(base, rows=104)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one)
    assert (plan.ids["<one>"], plan.rows) == (96, 104)
    table, other = tables(plan, inputs)
    stored = load_file(base / "model.safetensors")[EMBED]
    assert torch.equal(table[96], row(one, "<one>"))
    assert torch.equal(table[97:], stored[97:])
    assert torch.equal(other[97:], stored[97:])


def test_models_of_one_vocabulary_with_different_padding_fit(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, rows=128)
    plan, inputs = vocabulary(base, one)
    assert plan.rows == 96
    assert torch.equal(tables(plan, inputs)[1], load_file(one / "model.safetensors")[EMBED][:96])


def test_padding_that_nobody_has_is_each_models_mean(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one, pad_to_multiple_of=32)
    assert plan.rows == 128
    for folder, table in zip((base, one), tables(plan, inputs), strict=True):
        mean = load_file(folder / "model.safetensors")[EMBED].double().mean(0).float()
        assert torch.equal(table[97:], mean.expand(31, -1))


def test_a_source_that_fits_is_given_back_as_it_is(make: Maker) -> None:
    base, one = make("llama", 2)
    plan, inputs = vocabulary(base, one)
    assert all(isinstance(source, Stored) for source in sources(plan, inputs))


def test_a_model_without_the_tensor_has_none_and_lends_none(make: Maker) -> None:
    base, one, two = make("llama", 3)
    grow(one, "<one>")
    grow(two, "<one>")
    plan, inputs = vocabulary(base, one, two)
    found = plan.realigned([Stored(inputs[0], EMBED), None, Stored(inputs[2], EMBED)])
    assert found[1] is None
    assert found[0] is not None
    assert torch.equal(found[0].read(96 * 32, 97 * 32), row(two, "<one>"))


def test_a_delta_lacks_nothing_but_changes_nothing(make: Maker) -> None:
    base, one, two = make("llama", 3)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one, two)
    found = plan.realigned([*(Stored(checkpoint, EMBED) for checkpoint in inputs[:2]), Stored(inputs[2], EMBED, delta=True)])
    assert found[2] is not None
    assert found[2].delta
    delta = found[2].read(0, 97 * 32).view(97, 32)
    assert torch.equal(delta, torch.cat([load_file(two / "model.safetensors")[EMBED], torch.zeros(1, 32)]))


def test_a_delta_lends_no_rows(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one)
    found = plan.realigned([Stored(inputs[0], EMBED), Stored(inputs[1], EMBED, delta=True)])
    assert found[0] is not None
    assert not found[0].read(96 * 32, 97 * 32).any()


def test_a_token_that_is_left_out_does_not_pass_for_padding(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(base, rows=104)
    grow(one, "<one>", rows=104)
    plan, inputs = vocabulary(base, one, source="base")
    stored = [load_file(folder / "model.safetensors")[EMBED] for folder in (base, one)]
    assert torch.equal(tables(plan, inputs)[1][96:], torch.cat([stored[0][96:97], stored[1][97:]]))


def test_the_bases_vocabulary_leaves_out_the_others_and_says_so(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>", "<two>")
    plan, inputs = vocabulary(base, one, source="base")
    assert (plan.rows, plan.added) == (96, ())
    assert plan.warnings == (f"{one}: 2 of its tokens are not in the result: '<one>', '<two>'.",)
    assert torch.equal(tables(plan, inputs)[1], load_file(one / "model.safetensors")[EMBED][:96])


def test_a_models_vocabulary_comes_with_its_ids_and_its_configs(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    words = ["[UNK]", "[EOS]", "[PAD]", *(f"w{i}" for i in reversed(range(93)))]
    _, one = make("llama", 2, parent="others", words=words, pad_token_id=2, eos_token_id=5)
    (one / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 5], "suppress_tokens": [4], "max_new_tokens": 7})
    )
    plan, inputs = vocabulary(base, one, source=one)
    assert plan.ids == AutoTokenizer.from_pretrained(one).get_vocab()
    stored = load_file(base / "model.safetensors")[EMBED]
    for token in ("[PAD]", "[EOS]", "w0", "w92"):
        assert torch.equal(
            tables(plan, inputs)[0][plan.ids[token]], stored[AutoTokenizer.from_pretrained(base).get_vocab()[token]]
        )
    result = written(plan, inputs, tmp_path / "result")
    config, generation = (json.loads((result / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (config["pad_token_id"], config["eos_token_id"]) == (2, 5)
    assert (generation["eos_token_id"], generation["suppress_tokens"]) == ([1, 5], [4])
    assert "max_new_tokens" not in generation
    assert AutoTokenizer.from_pretrained(result)("w3 w92")["input_ids"] == [plan.ids["w3"], plan.ids["w92"]]


def test_without_a_tokenizer_that_differs_no_file_changes(make: Maker) -> None:
    base, one = make("llama", 2)
    plan, inputs = vocabulary(base, one)
    carried = companion_files(inputs[0], None)
    assert plan.companions(carried) == carried


def test_the_result_knows_its_size(make: Maker, tmp_path: Path) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one)
    config = json.loads((written(plan, inputs, tmp_path / "result") / "config.json").read_text())
    assert config == inputs[0].config | {"vocab_size": 97}
    assert plan.configured({"model_type": "x", "text_config": {"vocab_size": 96}, "audio": {"vocab_size": 9}}) == {
        "model_type": "x",
        "text_config": {"vocab_size": 97},
        "audio": {"vocab_size": 9},
    }


def test_the_result_loads_and_reads_the_new_tokens(make: Maker, tmp_path: Path) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one)
    result = written(plan, inputs, tmp_path / "result")
    changed = {name: tables(plan, inputs, name)[0] for name in plan.tensors}
    save_file(load_file(base / "model.safetensors") | changed, result / "model.safetensors", {"format": "pt"})
    model, told = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(told.values())
    ids = AutoTokenizer.from_pretrained(result)("w1 <one> w2", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 3)
    assert torch.equal(model.get_input_embeddings()(ids)[0, 1], row(one, "<one>"))


def zeros(folder: Path) -> Tensor:
    return torch.zeros(32)


def of_w3(folder: Path) -> Tensor:
    return row(folder, "w3")


def own(folder: Path) -> Tensor:
    return row(folder, "<one>")


@pytest.mark.parametrize(
    ("given", "in_base", "in_owner"),
    [
        (lambda one: TokenRow(zero=True), zeros, own),
        (lambda one: TokenRow(zero=True, force=True), zeros, zeros),
        (lambda one: TokenRow(model=one, token="w3"), of_w3, own),
        (lambda one: TokenRow(model=one, token="w3", force=True), of_w3, of_w3),
        (lambda one: TokenRow(model=one, token_id=6), of_w3, own),
        (lambda one: TokenRow(model=one), own, own),
        (lambda one: TokenRow(), own, own),
    ],
    ids=["zero", "zero, forced", "token", "token, forced", "id", "model", "nothing"],
)
def test_a_tokens_row_can_be_given(make: Maker, given: Callable, in_base: Callable, in_owner: Callable) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one, tokens={"<one>": given(ModelRef(str(one)))})
    table, other = tables(plan, inputs)
    assert torch.equal(table[96], in_base(one))
    assert torch.equal(other[96], in_owner(one))


def test_a_forced_row_goes_before_the_rows_that_all_models_have(make: Maker) -> None:
    base, one, two = make("llama", 3)
    plan, inputs = vocabulary(base, one, two, tokens={"w5": TokenRow(model=ModelRef(str(two)), force=True)})
    assert all(torch.equal(table[8], row(two, "w5")) for table in tables(plan, inputs))


def test_a_token_that_nobody_has_is_added_with_zeros_and_a_warning(make: Maker, tmp_path: Path) -> None:
    base, one = make("llama", 2)
    plan, inputs = vocabulary(base, one, source="base", tokens={"<new>": TokenRow()})
    assert plan.added == ("<new>",)
    assert plan.warnings == ("No model has a row for '<new>': zeros.",)
    assert not tables(plan, inputs)[0][96].any()
    assert AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result")).encode("w1<new>w2") == [4, 96, 5]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda one: {"tokens": {"<x>": TokenRow(model=one)}}, "has 96 rows, but no row of a token '<x>'"),
        (lambda one: {"tokens": {"<x>": TokenRow(model=one, token_id=96)}}, "has 96 rows, but no row 96"),
        (lambda one: {"tokens": {"<x>": TokenRow(model=ModelRef("org/other"))}}, "Unknown model in `tokenizer`: 'org/other'"),
        (lambda one: {"source": ModelRef("org/other")}, "Unknown model in `tokenizer`: 'org/other'"),
    ],
)
def test_a_row_or_a_model_that_is_not_there_is_an_error(make: Maker, request_of: Callable, message: str) -> None:
    base, one = make("llama", 2)
    with pytest.raises(MergeError, match=message):
        vocabulary(base, one, **request_of(ModelRef(str(one))))


def test_a_models_token_without_a_row_is_left_out_and_said(make: Maker) -> None:
    base, one = make("llama", 2)
    tokenizer = AutoTokenizer.from_pretrained(one)
    tokenizer.add_tokens(["<dangling>"])
    tokenizer.save_pretrained(one)
    plan, _ = vocabulary(base, one)
    assert (plan.rows, plan.added) == (96, ())
    assert plan.warnings[0] == f"{one}: tokens without a row in its embeddings are left out: '<dangling>'."


def test_the_bases_token_without_a_row_gets_one_from_who_has_it(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<pad>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(base)
    plan, inputs = vocabulary(base, one)
    assert plan.rows == 97
    assert torch.equal(tables(plan, inputs)[0][96], row(one, "<pad>"))


def test_the_bases_token_that_nobody_has_a_row_for_stays_as_it_was(make: Maker) -> None:
    base, one = make("llama", 2)
    for folder in (base, one):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<dangling>"])
        tokenizer.save_pretrained(folder)
    plan, inputs = vocabulary(base, one)
    assert plan.rows == 96
    assert "beyond the 96 rows" in plan.warnings[0]
    assert all(isinstance(source, Stored) for source in sources(plan, inputs))


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(make: Maker) -> None:
    base, one, two = make("llama", 3)
    for file in two.glob("tokenizer*"):
        file.unlink()
    grow(one, "<one>")
    plan, inputs = vocabulary(base, one, two)
    assert torch.equal(tables(plan, inputs)[2][:96], load_file(two / "model.safetensors")[EMBED])


@pytest.mark.parametrize("which", [0, 1])
def test_a_tokenizer_that_cannot_be_read_is_an_error_that_says_what_to_do(make: Maker, which: int) -> None:
    folders = make("llama", 2)
    (folders[which] / "tokenizer.json").unlink()
    (folders[which] / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(MergeError, match=r"tokenizer\.json.*Save it once with transformers"):
        vocabulary(*folders)


def test_the_same_unreadable_tokenizer_is_no_problem_beside_a_readable_one(make: Maker) -> None:
    base, one = make("llama", 2)
    (one / "tokenizer.json").unlink()
    for folder in (base, one):
        (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    assert vocabulary(base, one)[0].warnings == ()


def test_a_tokenizer_of_nonsense_is_an_error(make: Maker) -> None:
    base, one = make("llama", 2)
    (one / "tokenizer.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the file of a tokenizer"):
        vocabulary(base, one)


def test_ids_with_gaps_take_no_new_tokens(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>", "<two>")
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if i not in (40, 41)}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="have gaps"):
        vocabulary(base, one)


def test_a_checkpoint_without_embeddings_is_an_error(make: Maker, tmp_path: Path) -> None:
    (base,) = make("llama", 1)
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({"x": torch.zeros(3)}, bare / "model.safetensors")
    with pytest.raises(MergeError, match=f"No embeddings of a vocabulary were found in {bare}"):
        vocabulary(base, bare)


# The tokenizers of several kinds: the result's loads, and finds the tokens.

CORPUS = [
    "the cat sat on the mat",
    "a dog and a cat",
    "protein kinase binds to the receptor",
    "merging models is averaging",
] * 20


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def trained(kind: Callable[[], Tokenizer]) -> PreTrainedTokenizerFast:
    tokenizer = kind()
    options = {"special_tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "show_progress": False}
    name = type(tokenizer.model).__name__
    if name == "BPE":
        options |= {"vocab_size": 280, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif name == "Unigram":
        options |= {"vocab_size": 60, "unk_token": "[UNK]"}
    else:
        options |= {"vocab_size": 60}
    trainer = tokenizer.model.get_trainer()
    tokenizer.train_from_iterator(CORPUS, type(trainer)(**options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


@pytest.mark.parametrize("kind", [byte_bpe, unigram, word_piece])
def test_tokens_are_added_to_every_kind_of_tokenizer(make: Maker, tmp_path: Path, kind: Callable[[], Tokenizer]) -> None:
    tokenizer = trained(kind)
    base, one, two = make("llama", 3, vocab_size=len(tokenizer))
    for folder in (base, one, two):
        tokenizer.save_pretrained(folder)
    grow(one, "<|im_start|>", "<|im_end|>", special=True)
    grow(two, AddedToken("kinase", single_word=True), "[TOOL]")
    plan, inputs = vocabulary(base, one, two)
    result = AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result"))
    for token in ("<|im_start|>", "<|im_end|>", "kinase", "[TOOL]"):
        assert result.convert_tokens_to_ids(token) == plan.ids[token]
        assert result.encode(token, add_special_tokens=False) == [plan.ids[token]]
    text = "<|im_start|>the cat[TOOL]<|im_end|>"
    assert result.decode(result(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True).split() in (
        ["the", "cat[TOOL]"],
        ["the", "cat", "[TOOL]"],
    )
    for sentence in ("the dog sat", "a receptor", "xyz"):
        assert result(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]


@pytest.fixture
def berts(tmp_path: Path) -> list[Path]:
    """Two BERTs with a masked-word head; the second has two words more, in its vocab.txt and its tokenizer's own model."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "con", "##ate", "##n"]
    folders = []
    for i, more in enumerate(([], ["protein", "##ase"])):
        torch.manual_seed(i)
        size = len(words) + len(more)
        config = BertConfig(vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        model = BertForMaskedLM(config)
        torch.nn.init.normal_(model.cls.predictions.bias)
        folders.append(tmp_path / f"bert{i}")
        model.save_pretrained(folders[-1])
        BertTokenizer(vocab={word: k for k, word in enumerate([*words, *more])}).save_pretrained(folders[-1])
    return folders


def test_of_a_bert_the_bias_of_the_head_is_aligned_as_well(berts: list[Path]) -> None:
    plan, inputs = vocabulary(*berts)
    words, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    assert plan.tensors == (words, bias)
    for name in plan.tensors:
        stored = load_file(berts[1] / "model.safetensors")[name]
        first, second = tables(plan, inputs, name)
        assert torch.equal(first[12:], stored[12:])
        assert torch.equal(second, stored)


def test_pieces_of_another_tokenizers_model_are_whole_words_and_cut_no_other(berts: list[Path], tmp_path: Path) -> None:
    plan, inputs = vocabulary(*berts)
    assert "2 pieces of its tokenizer's own model are kept as tokens of whole words" in plan.warnings[0]
    result = AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result"))
    assert result.tokenize("the protein sat") == ["the", "protein", "sat"]
    assert result.tokenize("proteincat cats") == ["[UNK]", "cat", "##s"]


def test_files_that_list_added_tokens_get_the_new_ones(make: Maker) -> None:
    base, one = make("llama", 2)
    grow(one, "<one>", special=True)
    (base / "added_tokens.json").write_text('{"w92": 95}')
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": {}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    files = vocabulary(base, one)[0].files
    assert json.loads(files["added_tokens.json"]) == {"w92": 95, "<one>": 96}
    entry = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]["96"]
    assert (entry["content"], entry["special"]) == ("<one>", True)


# Chat templates.


def template(folder: Path, text: str, legacy: bool = False) -> None:
    if legacy:
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": text}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ([None, "{{ 1 }}", "{{ 2 }}", "{{ 2 }}"], "{{ 2 }}"),
        (["{{ 1 }}", "{{ 2 }}", "{{ 2 }}", None], "{{ 2 }}"),
        (["{{ 1 }}", "{{ 2 }}", None, None], "{{ 1 }}"),
        ([None, "{{ 2 }}", "{{ 1 }}", None], "{{ 2 }}"),
        ([None, None, None, None], None),
    ],
)
@pytest.mark.parametrize("source", [None, "union"])
@pytest.mark.parametrize("legacy", [False, True])
def test_auto_is_the_template_that_most_models_have(
    make: Maker, tmp_path: Path, texts: list[str | None], wanted: str | None, source: str | None, legacy: bool
) -> None:
    folders = make("llama", 4)
    for folder, text in zip(folders, texts, strict=True):
        if text:
            template(folder, text, legacy)
    plan, inputs = vocabulary(*folders, source=source, chat_template="auto")  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result")).chat_template == wanted


def test_a_template_of_ones_own_takes_the_place_of_the_old(make: Maker, tmp_path: Path) -> None:
    base, one = make("llama", 2)
    template(base, "{{ 1 }}")
    plan, inputs = vocabulary(base, one, source=None, chat_template="{{ messages[0].content }}")  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result"))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Hi"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "[INST] Hi [/INST] Hello[EOS][INST] Bye [/INST]"),
        (
            "alpaca",
            "### Instruction:\nHi\n\n### Response:\nHello[EOS]\n\n### Instruction:\nBye\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
        ),
    ],
)
def test_the_common_formats_are_known_by_name(make: Maker, tmp_path: Path, name: str, wanted: str) -> None:
    base, one = make("llama", 2)
    plan, inputs = vocabulary(base, one, chat_template=name)
    tokenizer = AutoTokenizer.from_pretrained(written(plan, inputs, tmp_path / "result"))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == wanted


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_a_common_format_keeps_what_the_system_says(make: Maker, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make("llama", 1)[0])
    said = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    text = tokenizer.apply_chat_template(said, chat_template=BUILTIN[name], tokenize=False)
    assert text.count("Be brief.") == 1
    assert text.index("Be brief.") < text.index("Hi")


def test_a_format_whose_tokens_are_missing_is_said(make: Maker) -> None:
    base, one = make("llama", 2)
    plan, _ = vocabulary(base, one, chat_template="chatml")
    assert "The chat template chatml writes '<|im_start|>', '<|im_end|>'" in plan.warnings[0]
    grow(one, "<|im_start|>", "<|im_end|>", special=True)
    assert vocabulary(base, one, chat_template="chatml")[0].warnings == ()


# Which tensors have a row for each token.


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", {EMBED, HEAD}),
        ("tied-llama", {EMBED}),
        ("mixtral", {EMBED, HEAD}),
        ("bert", {"bert.embeddings.word_embeddings.weight"}),
        ("t5", {"shared.weight"}),
        ("gpt2", {"transformer.wte.weight"}),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known to transformers", "by name"])
def test_the_tensors_of_the_vocabulary_are_found(make: Maker, architecture: str, wanted: set[str], known: bool) -> None:
    (folder,) = make(architecture, 1)
    if not known:
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard", "architectures": ["Of"]}
        (folder / "config.json").write_text(json.dumps(config))
    found = vocabulary_tensors(opened(folder)[0])
    assert set(found) == wanted
    assert found[0] != HEAD


def test_a_model_without_a_vocabulary_has_no_such_tensors(tmp_path: Path) -> None:
    save_file({"head.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    assert vocabulary_tensors(opened(tmp_path)[0]) == ()


def test_scattered_rows_are_told(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    (base,) = make("llama", 1)
    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in reversed(range(93)))]
    (one,) = make("llama", 1, parent="others", words=words)
    plan, _ = vocabulary(base, one)
    assert plan.scattered((96, 96)) == (False, False)
    monkeypatch.setattr("hf_merge.merging.vocabulary.SCATTERED", 50)
    assert plan.scattered((96, 96)) == (False, True)
