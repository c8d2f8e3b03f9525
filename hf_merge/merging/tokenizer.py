"""A tokenizer's files: the tokens they hold, and the same tokenizer with more tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from tokenizers import AddedToken, Tokenizer

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.companions import TOKENIZER
from hf_merge.errors import CheckpointError, MergeError

FAST = "tokenizer.json"
_SLOW = ("*.model", "vocab.json", "vocab.txt")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Vocabulary:
    """The `ids` of all tokens, and of those that stand beside the tokenizer's model (`added`) the flags."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    def entry(self, token: str) -> AddedToken:
        """The token as one that is added to another tokenizer.

        A piece of this tokenizer's own model is found only as a whole word of a text, so that it cuts no word of the other.
        """
        flags = self.added.get(token, {"single_word": token in self.ids, "normalized": False})
        return AddedToken(token, **{name: bool(flags[name]) for name in _FLAGS if name in flags})


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer."""
    return any(fnmatch(name, pattern) for pattern in TOKENIZER)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a model has a tokenizer of its own."""
    return any(map(is_tokenizer_file, checkpoint.files.sizes))


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a model's tokenizer, by name."""
    names = [name for name in checkpoint.files.sizes if is_tokenizer_file(name)]
    return {name: data for name in names if (data := checkpoint.bytes(name)) is not None}


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """A model's vocabulary, from tokenizer.json, or else vocab.json or vocab.txt; None if it has none of them.

    Raises `CheckpointError` for a file that holds no vocabulary.
    """
    for file in (FAST, "vocab.json", "vocab.txt"):
        data = checkpoint.bytes(file)
        if data is not None:
            try:
                return _vocabulary(file, data, checkpoint.json("added_tokens.json") if file != FAST else None)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{checkpoint.label}: {file} is not the file of a tokenizer: {error!r}") from error
    return None


def _vocabulary(file: str, data: bytes, added: Mapping[str, int] | None) -> Vocabulary:
    if file == FAST:
        content = json.loads(data)
        ids = (content.get("model") or {}).get("vocab") or {}
        if isinstance(ids, list):
            ids = {piece[0]: i for i, piece in enumerate(ids)}
        flags = {token["content"]: token for token in content.get("added_tokens") or []}
        return Vocabulary({**ids, **{token: int(entry["id"]) for token, entry in flags.items()}}, flags)
    if file == "vocab.txt":
        ids = {token: i for i, token in enumerate(data.decode("utf-8", "replace").splitlines())}
    else:
        ids = dict(json.loads(data))
    more = dict(added or {})
    return Vocabulary({**ids, **more}, {token: {"normalized": False} for token in more})


def same_slow_files(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two models without a readable vocabulary have the same tokenizer, or the second has none at all."""
    names = [name for name in second.files.sizes if fnmatch(name, "*.model") or name == "added_tokens.json"]
    return all(first.bytes(name) == second.bytes(name) for name in names)


def with_tokens(
    files: Mapping[str, bytes], tokens: Sequence[AddedToken], label: str
) -> tuple[dict[str, bytes], dict[str, int]]:
    """A tokenizer's files with `tokens` added after its last id, and the ids they got.

    Every file that lists added tokens gets them. Raises `MergeError` for a tokenizer without a tokenizer.json, or one whose ids
    have gaps that tokens cannot be added behind, and `CheckpointError` for one that the tokenizers library refuses.
    """
    if not tokens:
        return dict(files), {}
    if FAST not in files:
        raise MergeError(
            f"{label} has no {FAST}, so {len(tokens)} tokens ({tokens[0].content!r} …) cannot be added to its tokenizer. Save "
            "it once with transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…)), which writes that file."
        )
    try:
        tokenizer = Tokenizer.from_str(files[FAST].decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{label}: {FAST} is not the file of a tokenizer: {error}") from error
    taken = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(list(tokens))
    every = tokenizer.get_vocab()
    ids = {token.content: every[token.content] for token in tokens}
    if taken & set(ids.values()) or len(set(ids.values())) < len(tokens):
        raise MergeError(f"{label}: the ids in {FAST} have gaps, and tokens cannot be added to it without taking another's id.")
    found = {**files, FAST: tokenizer.to_str(pretty=True).encode()}
    if "added_tokens.json" in files or any(fnmatch(name, pattern) for name in files for pattern in _SLOW):
        found["added_tokens.json"] = _json({**json.loads(files.get("added_tokens.json", b"{}")), **ids})
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in settings:
        entries = {str(ids[t.content]): {"content": t.content} | {name: getattr(t, name) for name in _FLAGS} for t in tokens}
        settings["added_tokens_decoder"] |= entries
        found["tokenizer_config.json"] = _json(settings)
    return found, ids


def with_template(files: Mapping[str, bytes], template: str | list[Any]) -> dict[str, bytes]:
    """A tokenizer's files with another chat template: a text in its own file, several named ones in tokenizer_config.json."""
    found = {name: data for name, data in files.items() if not name.startswith("chat_template")}
    settings = json.loads(found.get("tokenizer_config.json", b"{}"))
    settings.pop("chat_template", None)
    if isinstance(template, str):
        found["chat_template.jinja"] = template.encode()
    else:
        settings["chat_template"] = template
    if settings:
        found["tokenizer_config.json"] = _json(settings)
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
