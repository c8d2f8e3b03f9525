"""Which tokenizer and chat template a merge gets: `tokenizer`, `tokenizer_source` and `chat_template` of a recipe, as data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_merge.errors import RecipeError, unknown
from hf_merge.model_ref import ModelRef

KEYS = ("tokenizer", "tokenizer_source", "chat_template")
"""The keys of a recipe's mapping that `from_dict` reads and `to_dict` writes."""
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
KINDS = ("model_token", "zero")
VOCABULARIES = ("union", "base")


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Where the embedding of one token comes from in a model that lacks the token; with `force`, in every model.

    From `model`: its row of `token`, or the row `token_id`, or else its row of the same token. `zero`: zeros. Neither: the
    usual rule (the base's row, else the only owner's, else the mean of the owners').
    """

    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("zero", "force"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name!r} of a token is true or false, got {getattr(self, name)!r}.")
        if self.zero and self.model is not None:
            raise RecipeError(f"A token's row comes either from {self.model} or is zero, not both.")
        if self.model is None and (self.token is not None or self.token_id is not None):
            raise RecipeError("A token's row of another token needs the model that it is read from: give 'model'.")
        if self.token is not None and self.token_id is not None:
            raise RecipeError(f"Give 'token' ({self.token!r}) or 'token_id' ({self.token_id!r}), not both.")
        if self.token is not None and not isinstance(self.token, str):
            raise RecipeError(f"'token' is a text, got {self.token!r}.")
        if self.token_id is not None and (type(self.token_id) is not int or self.token_id < 0):
            raise RecipeError(f"'token_id' is a whole number from 0 on, got {self.token_id!r}.")


@dataclass(frozen=True, kw_only=True)
class TokenizerRequest:
    """The vocabulary and the chat template of a merge. Raises `RecipeError` for what makes no sense.

    `source` is "union" (the base's tokens and every other model's), "base", one of the recipe's models, or None: the base's
    tokenizer as it is, which all models must share. `tokens` says where single tokens come from, and adds them if they are
    new. The rows of the embeddings are filled up to a multiple of `pad_to_multiple_of`. `chat_template` is "auto" (the one
    that most models have), the name of a common format, or a Jinja text; None keeps that of the tokenizer.
    """

    source: str | ModelRef | None = "union"
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", dict(self.tokens))
        wrong = list(self._problems())
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _problems(self) -> Iterable[str]:
        if isinstance(self.source, str) and self.source not in VOCABULARIES:
            yield unknown("source of the tokenizer", self.source, VOCABULARIES) + " A model is given as a ModelRef."
        multiple = self.pad_to_multiple_of
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            yield f"'pad_to_multiple_of' is a whole number from 1 on, got {multiple!r}."
        if self.source is None and (self.tokens or multiple is not None):
            yield "A tokenizer that is kept as it is takes neither 'tokens' nor 'pad_to_multiple_of': give 'source'."
        for token, row in self.tokens.items():
            if not isinstance(token, str) or not token:
                yield f"A token is a text that is not empty, got {token!r}."
            if not isinstance(row, TokenRow):
                yield f"Of token {token!r} a TokenRow is expected, got {row!r}."
        template = self.chat_template
        if template is not None and not isinstance(template, str):
            yield f"'chat_template' is a name or a Jinja text, got {template!r}."
        elif template is not None and template not in (*CHAT_TEMPLATES, "auto") and "{" not in template:
            yield unknown("chat template", template, (*CHAT_TEMPLATES, "auto")) + " A Jinja text has '{{ … }}' in it."

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """The models that the request names, each once: they must be models of the recipe."""
        named = [self.source if isinstance(self.source, ModelRef) else None, *(row.model for row in self.tokens.values())]
        return tuple(dict.fromkeys(ref for ref in named if ref is not None))

    def pinned(self, pin: Callable[[ModelRef], ModelRef]) -> "TokenizerRequest":
        """The same request with every model as `pin` gives it: at its commit."""
        tokens = {token: replace(row, model=pin(row.model)) if row.model else row for token, row in self.tokens.items()}
        return replace(self, source=pin(self.source) if isinstance(self.source, ModelRef) else self.source, tokens=tokens)


def from_dict(content: Mapping[str, Any], ref: Callable[[Any], ModelRef] = ModelRef.parse) -> TokenizerRequest | None:
    """The request in a recipe's mapping (its `KEYS` alone are read); None if there is none. `ref` reads a model's reference.

    Raises `RecipeError` for unknown keys and values that make no sense.
    """
    given = {key: content[key] for key in KEYS if content.get(key) is not None}
    if not given:
        return None
    if "tokenizer" in given and "tokenizer_source" in given:
        raise RecipeError("'tokenizer_source' is the old form of 'tokenizer': {'source': …}: keep one of the two.")
    template = given.get("chat_template")
    if "tokenizer" not in given:
        return TokenizerRequest(source=_source(given.get("tokenizer_source"), ref), chat_template=template)
    block = _mapping(given["tokenizer"], "'tokenizer'", ("source", "tokens", "pad_to_multiple_of"))
    tokens = block.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(f"'tokens' is a mapping of tokens to their sources, got {tokens!r}.")
    return TokenizerRequest(
        source=_source(block.get("source", "union"), ref),
        tokens={token: _row(token, entry, ref) for token, entry in tokens.items()},
        pad_to_multiple_of=block.get("pad_to_multiple_of"),
        chat_template=template,
    )


def to_dict(request: TokenizerRequest) -> dict[str, Any]:
    """The request as the `KEYS` of a recipe's mapping, as `from_dict` reads them."""
    found: dict[str, Any] = {}
    if request.source is not None:
        block = {
            "source": str(request.source),
            "tokens": {token: _entry(row) for token, row in request.tokens.items()} or None,
            "pad_to_multiple_of": request.pad_to_multiple_of,
        }
        found["tokenizer"] = {key: value for key, value in block.items() if value is not None}
    if request.chat_template is not None:
        found["chat_template"] = request.chat_template
    return found


def _source(given: Any, ref: Callable[[Any], ModelRef]) -> str | ModelRef | None:
    return given if given is None or given in VOCABULARIES else ref(given)


def _row(token: Any, entry: Any, ref: Callable[[Any], ModelRef]) -> TokenRow:
    where = f"token {token!r}"
    entry = _mapping({} if entry is None else entry, where, ("source", "force"))
    source, force = entry.get("source"), entry.get("force", False)
    if not (isinstance(source, Mapping) and "kind" in source):
        return TokenRow(model=None if source is None else ref(source), force=force)
    if source["kind"] not in KINDS:
        raise RecipeError(f"In {where}: {unknown('kind of source', source['kind'], KINDS)}")
    if source["kind"] == "zero":
        _mapping(source, f"the source of {where}", ("kind",))
        return TokenRow(zero=True, force=force)
    source = _mapping(source, f"the source of {where}", ("kind", "model", "token", "token_id"))
    if source.get("model") is None or (source.get("token") is None and source.get("token_id") is None):
        raise RecipeError(f"In {where}: a 'model_token' needs 'model', and 'token' or 'token_id', got {dict(source)!r}.")
    return TokenRow(model=ref(source["model"]), token=source.get("token"), token_id=source.get("token_id"), force=force)


def _entry(row: TokenRow) -> dict[str, Any]:
    source: Any = str(row.model) if row.model else {"kind": "zero"} if row.zero else None
    if row.token is not None or row.token_id is not None:
        which = {"token": row.token} if row.token is not None else {"token_id": row.token_id}
        source = {"kind": "model_token", "model": str(row.model), **which}
    return ({} if source is None else {"source": source}) | ({"force": True} if row.force else {})


def _mapping(given: Any, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} is a mapping with {', '.join(known)}, got {given!r}.")
    for key in given:
        if key not in known:
            raise RecipeError(unknown(f"key in {where}:", key, known))
    return given
