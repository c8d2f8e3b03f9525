"""Whether models fit each other, from headers, configs and tokenizers alone; and which tensor of one is which of another."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.source import elements
from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import CheckpointError, MergeError
from hf_merge.merging.architecture import tied_names

LEAST_SHARED = 0.25
"""Share of the primary's tensors that all models have, below which a merge of what they share is none of these models."""
_HEADS = (
    "Where only heads or buffers differ, say in the recipe what becomes of them: `private: base` keeps the base's, `owner` "
    "keeps any model's, `drop` leaves them out."
)
_LAYOUT = (
    "{} holds as many numbers under other names: load it with transformers and save it again (`from_pretrained`, "
    "`save_pretrained`), and the other models as well if need be, so that all are written in one way."
)
_SAME_CONFIG = ("num_attention_heads", "num_key_value_heads", "hidden_act", "position_embedding_type")


@dataclass(frozen=True)
class Alignment:
    """For every tensor of the result, in order, its name in each checkpoint (`inputs`' order); empty where it has none."""

    tensors: Mapping[str, tuple[str, ...]]


def align(inputs: Sequence[Checkpoint], private: str = "refuse", by_token: tuple[str, ...] | None = None) -> Alignment:
    """Match every model's tensors to those of the first one, the primary.

    Raises `MergeError` that lists every mismatch: architecture, missing and surplus tensors, shapes, kinds of dtype,
    vocabulary, labels; `CheckpointError` for weights in codes. Nothing but headers and small files is read. Tied
    copies (which a checkpoint may or may not hold) are one tensor. Names that differ by a first part ("bert.") are matched.

    With a policy for `private` tensors other than "refuse", what only some models have (heads, buffers) is no mismatch: "drop"
    leaves it out, "base" keeps what the primary has of it, "owner" what any model has. Other shapes are private, too.
    With `by_token`, vocabularies may differ: the rows of these tensors are matched by token and not by number.
    """
    primary, open_heads = inputs[0], private != "refuse"
    _refuse_unreadable(inputs)
    ties = _all_ties(inputs)
    names = {_canonical(name, primary, ties[0]): None for name in tensors(primary)}
    lookup = [_lookup(c, tied, primary, ties[0]) for c, tied in zip(inputs, ties, strict=True)]
    problems = []
    for checkpoint, tied, own in zip(inputs[1:], ties[1:], lookup[1:], strict=True):
        found = [
            *_config_problems(primary, checkpoint, open_heads),
            *(_vocabulary_problems(primary, checkpoint) if by_token is None else ()),
            *(() if open_heads else _tensor_problems(list(names), primary, ties[0], checkpoint, tied, own, by_token or ())),
        ]
        problems += [f"{checkpoint.label}: {problem}" for problem in found]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        number = f"{len(problems)} mismatch{'es' if len(problems) > 1 else ''}"
        raise MergeError(f"The models do not fit {primary.label}, {number}:{listed}{_remedy(list(names), inputs, lookup)}")
    if not open_heads:
        return Alignment({name: tuple(own.get(name, "") for own in lookup) for name in names})
    matched = dict(_with_private(names, inputs, lookup, private, by_token or ()))
    merged = sum(all(places) for places in matched.values())
    if merged < LEAST_SHARED * len(names):
        raise MergeError(
            f"Only {merged} of the {len(names)} tensors of {primary.label} are in all the models in one shape: they are no "
            "fine-tunes of one base, and `private` is for what each has besides (a head, buffers)."
        )
    return Alignment(matched)


def _with_private(
    names: Iterable[str],
    inputs: Sequence[Checkpoint],
    lookup: Sequence[Mapping[str, str]],
    private: str,
    by_token: tuple[str, ...],
) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The tensors that all models have in one shape, and of the others those that the policy keeps, each with one owner."""
    every = list(names)
    if private == "owner":
        every += [name for own in lookup[1:] for name in _besides(every, own)]
    for name in dict.fromkeys(every):
        places = tuple(own.get(name, "") for own in lookup)
        found = [tensors(c)[place] for c, place in zip(inputs, places, strict=True) if place]
        kinds = {(e.shape[1:] if name in by_token else e.shape, e.dtype.is_floating_point) for e in found}
        if len(found) == len(inputs) and len(kinds) == 1:
            yield name, places
        elif private != "drop" and (places[0] or private == "owner"):
            owner = next(i for i, place in enumerate(places) if place)
            yield name, tuple(place if i == owner else "" for i, place in enumerate(places))


def _besides(names: Sequence[str], own: Mapping[str, str]) -> Iterable[str]:
    """The names, as the primary would write them, of a model's tensors that are not among `names`."""
    first: dict[str, str] = {}
    for name, place in own.items():
        first.setdefault(place, name)
    taken = {own[name] for name in names if name in own}
    return [name for place, name in first.items() if place not in taken]


def _remedy(names: Sequence[str], inputs: Sequence[Checkpoint], lookup: Sequence[Mapping[str, str]]) -> str:
    """What can be done for models that differ, if they look like one architecture; starts a line of its own."""
    primary = inputs[0]
    if any([*_config_problems(primary, c, True), *_vocabulary_problems(primary, c)] for c in inputs[1:]):
        return ""
    for checkpoint, own in zip(inputs[1:], lookup[1:], strict=True):
        absent = [elements(tensors(primary)[name]) for name in names if name not in own]
        besides = [elements(tensors(checkpoint)[own[name]]) for name in _besides(names, own)]
        if absent and sum(absent) == sum(besides):
            return "\n" + _LAYOUT.format(checkpoint.label)
    shared = sum(1 for _ in _with_private(names, inputs, lookup, "drop", ()))
    return f"\n{_HEADS}" if 2 * shared > len(names) else ""


def _all_ties(inputs: Sequence[Checkpoint]) -> list[dict[str, str]]:
    """Each model's tied tensors; transformers is asked only where they matter: names differ, or a tied copy is stored."""
    same = all(tensors(c).keys() == tensors(inputs[0]).keys() for c in inputs)
    if same and not any(_has_copies(checkpoint) for checkpoint in inputs):
        return [{} for _ in inputs]
    return [tied_names(checkpoint) for checkpoint in inputs]


def _has_copies(checkpoint: Checkpoint) -> bool:
    """Whether its config says that tensors are tied, and two as large as the vocabulary are of one shape."""
    size = checkpoint.config.get("vocab_size")
    shapes = Counter(e.shape for e in tensors(checkpoint).values() if e.shape and e.shape[0] == size)
    return bool(checkpoint.config.get("tie_word_embeddings")) and any(times > 1 for times in shapes.values())


def _canonical(name: str, checkpoint: Checkpoint, tied: Mapping[str, str]) -> str:
    source = tied.get(name)
    return source if source is not None and source in tensors(checkpoint) else name


def _lookup(
    checkpoint: Checkpoint, tied: Mapping[str, str], primary: Checkpoint, primary_tied: Mapping[str, str]
) -> dict[str, str]:
    """Name in the checkpoint by each name it answers to: its own as the primary would write it, and those that are tied to
    it but not stored."""
    own = {name: name for name in tensors(checkpoint)}
    for copy, source in tied.items():
        if source in own:
            own[copy] = source
        elif copy in own:
            own[source] = own[copy]
    wanted = {*tensors(primary), *primary_tied}
    if checkpoint is primary or wanted <= own.keys():
        return own
    best = max([own, *_renamed(own, wanted)], key=lambda names: len(wanted & names.keys()))
    return best


def _renamed(own: Mapping[str, str], wanted: Iterable[str]) -> Iterable[dict[str, str]]:
    """The names with one more first part, or one less: a model with a head and the same one without write them so."""
    for first in {name.partition(".")[0] for name in wanted}:
        yield {f"{first}.{name}": place for name, place in own.items()} | dict(own)
    for first in {name.partition(".")[0] for name in own}:
        yield {name.removeprefix(f"{first}."): place for name, place in own.items()} | dict(own)


def _refuse_unreadable(inputs: Sequence[Checkpoint]) -> None:
    """Quantized checkpoints that are not numbers, all of them at once."""
    problems = []
    for checkpoint in inputs:
        try:
            tensors(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))


def _config_problems(primary: Checkpoint, other: Checkpoint, open_heads: bool) -> Iterable[str]:
    a, b = primary.config, other.config
    for key in ("model_type",) if open_heads else ("model_type", "architectures"):
        if a.get(key) and b.get(key) and a[key] != b[key]:
            yield f"another architecture: {key} is {b[key]!r}, {primary.label} has {a[key]!r}."
    for key in _SAME_CONFIG:
        if key in a and key in b and a[key] != b[key]:
            yield f"{key} is {b[key]!r} in config.json, {primary.label} has {a[key]!r}."
    labels = [_labels(config) for config in (a, b)]
    if not open_heads and labels[0] and labels[1] and labels[0] != labels[1]:
        yield f"its classes are {labels[1]}, those of {primary.label} are {labels[0]}: the heads mean different things."


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    named = config.get("id2label")
    if not isinstance(named, Mapping):
        return None
    values = [str(label) for _, label in sorted(named.items(), key=lambda pair: (len(pair[0]), pair[0]))]
    return None if all(value == f"LABEL_{i}" for i, value in enumerate(values)) else values


def _tensor_problems(
    names: list[str],
    primary: Checkpoint,
    primary_tied: Mapping[str, str],
    other: Checkpoint,
    tied: Mapping[str, str],
    own: Mapping[str, str],
    by_token: tuple[str, ...],
) -> Iterable[str]:
    for name in names:
        wanted = tensors(primary)[name]
        if name not in own:
            if wanted.dtype.is_floating_point:
                yield f"tensor {name!r} is missing."
            continue
        entry = tensors(other)[own[name]]
        rows_only = name in by_token and entry.shape[1:] == wanted.shape[1:]
        if entry.shape != wanted.shape and not rows_only:
            rows = " (another vocabulary?)" if entry.shape[1:] == wanted.shape[1:] and len(entry.shape) > 1 else ""
            yield f"{name!r} has shape {list(entry.shape)}, {primary.label} has {list(wanted.shape)}{rows}."
        elif entry.dtype.is_floating_point != wanted.dtype.is_floating_point:
            yield f"{name!r} is {entry.dtype}, in {primary.label} {wanted.dtype}."
    taken = {own[name] for name in names if name in own}
    for name, entry in tensors(other).items():
        # Integer buffers (position_ids and the like) are made by the model's class; a stored tied copy equals its source.
        if name not in taken and name not in tied and entry.dtype.is_floating_point:
            tie = f", where it is tied to {primary_tied[name]!r}" if name in primary_tied else ""
            yield f"tensor {name!r} does not exist in {primary.label}{tie}."


def _vocabulary_problems(primary: Checkpoint, other: Checkpoint) -> Iterable[str]:
    for file in ("tokenizer.json", "vocab.json", "vocab.txt"):
        if file in primary.files.sizes and file in other.files.sizes:
            first, second = primary.bytes(file) or b"", other.bytes(file) or b""
            if first != second:
                known = _vocabulary(primary, file, first), _vocabulary(other, file, second)
                yield from _vocabulary_difference(*known, primary)
            return


def _vocabulary(checkpoint: Checkpoint, file: str, data: bytes) -> dict[str, int]:
    """Token ids by token. Raises `CheckpointError` for a file that holds none."""
    try:
        return _token_ids(file, data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.label}: {file} is not the file of a tokenizer: {error!r}") from error


def _token_ids(file: str, data: bytes) -> dict[str, int]:
    if file == "vocab.txt":
        return {token: i for i, token in enumerate(data.decode("utf-8", "replace").splitlines())}
    content = json.loads(data)
    if file == "vocab.json":
        return dict(content)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}


def _vocabulary_difference(first: Mapping[str, int], second: Mapping[str, int], primary: Checkpoint) -> Iterable[str]:
    differing = [token for token in {**first, **second} if first.get(token) != second.get(token)]
    if differing:
        shown = ", ".join(repr(token) for token in sorted(differing)[:3])
        yield (
            f"another vocabulary: {len(differing)} tokens differ from {primary.label}'s {len(first)} "
            f"({shown}{', …' if len(differing) > 3 else ''}). Merged embeddings would mix up tokens: "
            "ask for one vocabulary with `tokenizer: {source: union}`."
        )
