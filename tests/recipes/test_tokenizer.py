"""The tokenizer block of a recipe: read, written, and refused where it makes no sense."""

import pytest

from hf_merge.errors import RecipeError
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.tokenizer import TokenizerRequest, TokenRow, from_dict, to_dict

CHAT = ModelRef("org/chat", "v1")
BLOCK = {
    "tokenizer": {
        "source": "union",
        "tokens": {
            "<a>": {"source": "org/chat@v1"},
            "<b>": {"source": {"kind": "model_token", "model": "org/chat@v1", "token": "<y>"}, "force": True},
            "<c>": {"source": {"kind": "model_token", "model": "org/chat@v1", "token_id": 0}},
            "<d>": {"source": {"kind": "zero"}},
            "<e>": {},
        },
        "pad_to_multiple_of": 64,
    },
    "chat_template": "chatml",
}
REQUEST = TokenizerRequest(
    source="union",
    tokens={
        "<a>": TokenRow(model=CHAT),
        "<b>": TokenRow(model=CHAT, token="<y>", force=True),
        "<c>": TokenRow(model=CHAT, token_id=0),
        "<d>": TokenRow(zero=True),
        "<e>": TokenRow(),
    },
    pad_to_multiple_of=64,
    chat_template="chatml",
)


def test_the_whole_block_is_read() -> None:
    assert from_dict(BLOCK) == REQUEST


def test_the_whole_block_is_written_as_it_is_read() -> None:
    assert to_dict(REQUEST) == BLOCK


@pytest.mark.parametrize(
    ("content", "request_"),
    [
        ({}, None),
        ({"tokenizer": None, "merge_method": "ties"}, None),
        ({"tokenizer": {}}, TokenizerRequest(source="union")),
        ({"tokenizer": {"tokens": None}}, TokenizerRequest(source="union")),
        ({"tokenizer": {"tokens": {"<e>": None}}}, TokenizerRequest(tokens={"<e>": TokenRow()})),
        ({"tokenizer_source": "base"}, TokenizerRequest(source="base")),
        ({"tokenizer_source": "org/chat@v1"}, TokenizerRequest(source=CHAT)),
        ({"tokenizer": {"source": "org/chat@v1"}}, TokenizerRequest(source=CHAT)),
        ({"chat_template": "auto"}, TokenizerRequest(source=None, chat_template="auto")),
    ],
)
def test_short_forms_are_read(content: dict, request_: TokenizerRequest | None) -> None:
    assert from_dict(content) == request_


@pytest.mark.parametrize("request_", [TokenizerRequest(source=source) for source in ("union", "base", CHAT, None)])
def test_what_is_written_is_read_again(request_: TokenizerRequest) -> None:
    again = from_dict({**to_dict(request_), "merge_method": "ties"})
    assert again == (None if request_.source is None else request_)


def test_how_references_are_read_can_be_given() -> None:
    content = {"tokenizer": {"source": {"path": "org/chat"}, "tokens": {"<a>": {"source": {"path": "org/chat"}}}}}
    found = from_dict(content, lambda given: ModelRef(given["path"]))
    assert found is not None
    assert found.refs == (ModelRef("org/chat"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer": {"sources": "union"}}, "Unknown key in 'tokenizer': 'sources'. Did you mean 'source'"),
        ({"tokenizer": "union"}, "'tokenizer' is a mapping with source, tokens, pad_to_multiple_of, got 'union'"),
        ({"tokenizer": {}, "tokenizer_source": "union"}, "keep one of the two"),
        ({"tokenizer": {"tokens": ["<a>"]}}, "'tokens' is a mapping of tokens to their sources"),
        ({"tokenizer": {"tokens": {"<a>": {"sorce": "org/m"}}}}, "Unknown key in token '<a>': 'sorce'. Did you mean 'source'"),
        ({"tokenizer": {"tokens": {"<a>": "org/m"}}}, "token '<a>' is a mapping with source, force, got 'org/m'"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "zeros"}}}}}, "In token '<a>': Unknown kind of source 'zeros'"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "zero", "model": "org/m"}}}}}, "Unknown key in the source"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "model": "org/m"}}}}}, "a 'model_token' needs"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "token": "<b>"}}}}}, "a 'model_token' needs"),
        ({"tokenizer": {"tokens": {"<a>": {"force": "yes"}}}}, "'force' of a token is true or false, got 'yes'"),
        ({"tokenizer": {"tokens": {"": {}}}}, "A token is a text that is not empty"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "'pad_to_multiple_of' is a whole number from 1 on, got 0"),
        ({"tokenizer": {"pad_to_multiple_of": "64"}}, "'pad_to_multiple_of' is a whole number from 1 on, got '64'"),
        ({"chat_template": "chatlm"}, "Unknown chat template 'chatlm'. Did you mean 'chatml'"),
        ({"chat_template": 3}, "'chat_template' is a name or a Jinja text"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_says_where(content: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict(content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenRow(model=CHAT, zero=True), "either from org/chat@v1 or is zero"),
        (lambda: TokenRow(token="<b>"), "give 'model'"),
        (lambda: TokenRow(model=CHAT, token="<b>", token_id=3), "not both"),
        (lambda: TokenRow(model=CHAT, token_id=-1), "'token_id' is a whole number from 0 on, got -1"),
        (lambda: TokenizerRequest(source="unoin"), "Did you mean 'union'"),
        (lambda: TokenizerRequest(source=None, tokens={"<a>": TokenRow()}), "give 'source'"),
        (lambda: TokenizerRequest(source=None, pad_to_multiple_of=8), "give 'source'"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(make, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert message in str(caught.value)


def test_the_models_that_are_named_are_known_and_pinned() -> None:
    assert REQUEST.refs == (CHAT,)
    pinned = TokenizerRequest(source=CHAT, tokens=REQUEST.tokens).pinned(lambda ref: ref.pinned("0123"))
    assert pinned.refs == (ModelRef("org/chat", "0123"),)
    assert pinned.tokens["<b>"] == TokenRow(model=ModelRef("org/chat", "0123"), token="<y>", force=True)
