"""The vocabularies that a merge starts from, and where each of their tokens goes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import MergeError, unknown
from hf_merge.merging.embeddings import vocabulary_tensors
from hf_merge.merging.fill import Given
from hf_merge.merging.tokenizer import Vocabulary, read_vocabulary, same_slow_files
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.tokenizer import TokenizerRequest

_SAVE = "Save it once with transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…)), which writes that file"
_UNKNOWN = Vocabulary({}, {})


@dataclass(frozen=True, kw_only=True)
class Parents:
    """The models with their vocabularies, the rows of their embeddings (`sizes`) and the `tensors` of the first that have them.

    `donor` is the position of the one whose tokenizer the result gets.
    """

    inputs: Sequence[Checkpoint]
    vocabularies: Sequence[Vocabulary]
    sizes: Sequence[int]
    tensors: tuple[str, ...]
    donor: int

    @classmethod
    def read(cls, inputs: Sequence[Checkpoint], source: str | ModelRef | None) -> "Parents":
        """From the models' headers and small files.

        Raises `MergeError` if a model has no embeddings, or a tokenizer that cannot be told from the primary's.
        """
        names = [vocabulary_tensors(checkpoint) for checkpoint in inputs]
        if bare := [c.label for c, found in zip(inputs, names, strict=True) if not found]:
            raise MergeError(
                f"No embeddings of a vocabulary were found in {', '.join(bare)}: leave `tokenizer` out of the recipe."
            )
        return cls(
            inputs=inputs,
            vocabularies=_vocabularies(inputs),
            sizes=[c.index.tensors[found[0]].shape[0] for c, found in zip(inputs, names, strict=True)],
            tensors=names[0],
            donor=_position(source, inputs) if isinstance(source, ModelRef) else 0,
        )

    def new_tokens(self, request: TokenizerRequest, warnings: list[str]) -> dict[str, Vocabulary]:
        """The tokens that the result has beyond the donor's, each with a vocabulary that has it; a model's in order of ids.

        Tokens without a row in their own model's embeddings are left out, and said in `warnings`, like pieces of another
        tokenizer's model, which texts are rarely cut into any more.
        """
        known, new = self.vocabularies[self.donor].ids, dict[str, Vocabulary]()
        for checkpoint, vocabulary, size in zip(self.inputs, self.vocabularies, self.sizes, strict=True):
            if request.source != "union" or vocabulary.ids == known:
                continue
            fresh = sorted((i, token) for token, i in vocabulary.ids.items() if token not in known and token not in new)
            new |= {token: vocabulary for i, token in fresh if i < size}
            if dangling := [token for i, token in fresh if i >= size]:
                warnings.append(f"{checkpoint.label}: tokens without a row in its embeddings are left out: {some(dangling)}.")
            if pieces := [token for i, token in fresh if i < size and token not in vocabulary.added]:
                warnings.append(
                    f"{checkpoint.label}: {len(pieces)} pieces of its tokenizer's own model are kept as tokens of whole words, "
                    f"its rules for cutting texts are not: {some(pieces)}."
                )
        for token in request.tokens:
            if token not in known and token not in new:
                new[token] = next((v for v in self.vocabularies if token in v.ids), _UNKNOWN)
        return new

    def rows(self, ids: Mapping[str, int], new: Mapping[str, Vocabulary], multiple: int | None) -> int:
        """Rows of the result: the donor's with its padding, more if tokens that are new or have a row somewhere need them."""
        size, all_sizes = self.sizes[self.donor], list(zip(self.vocabularies, self.sizes, strict=True))
        beyond = [token for token, i in ids.items() if i >= size]
        wanted = [token for token in beyond if token in new or any(v.ids.get(token, s) < s for v, s in all_sizes)]
        rows = max([size, *(ids[token] + 1 for token in wanted)])
        return -(-rows // multiple) * multiple if multiple else rows

    def own(self, ids: Mapping[str, int], rows: int) -> tuple[Tensor, Tensor]:
        """Each model's own row of each row of the result (models, rows), -1 for none; which rows stand for no token (rows)."""
        tokens, places = list(ids), torch.tensor(list(ids.values()), dtype=torch.int64)
        inside = places < rows
        padding = torch.ones(rows, dtype=torch.bool)
        padding[places[inside]] = False
        own = torch.full((len(self.inputs), rows), -1, dtype=torch.int64)
        for m, (vocabulary, size) in enumerate(zip(self.vocabularies, self.sizes, strict=True)):
            at = torch.tensor([vocabulary.ids.get(token, -1) for token in tokens], dtype=torch.int64)
            own[m, places[inside]] = torch.where(at < size, at, -1)[inside]
            free = padding.clone()
            free[size:] = False
            taken = torch.tensor(list(vocabulary.ids.values()), dtype=torch.int64)
            free[taken[taken < rows]] = False
            own[m, free] = torch.arange(rows)[free]
        return own, padding

    def given(self, request: TokenizerRequest, ids: Mapping[str, int]) -> dict[int, Given]:
        """What the request says of single rows. Raises `MergeError` for a row that is to be taken and is not there."""
        found = {}
        for token, row in request.tokens.items():
            if row.model is None:
                found[ids[token]] = Given(() if row.zero else None, row.force)
                continue
            m = _position(row.model, self.inputs)
            size, name = self.sizes[m], token if row.token is None else row.token
            at = self.vocabularies[m].ids.get(name, size) if row.token_id is None else row.token_id
            if at >= size:
                what = f"row {row.token_id}" if row.token_id is not None else f"row of a token {name!r}"
                raise MergeError(
                    f"The row of {token!r} comes from {self.inputs[m].label}, which has {size} rows, but no {what}."
                )
            found[ids[token]] = Given(((m, at),), row.force)
        return found

    def losses(self, ids: Mapping[str, int]) -> Iterable[str]:
        """What each model has that the result has not."""
        for checkpoint, vocabulary in zip(self.inputs, self.vocabularies, strict=True):
            if lost := [token for token in vocabulary.ids if token not in ids]:
                yield f"{checkpoint.label}: {len(lost)} of its tokens are not in the result: {some(lost)}."


def some(tokens: Sequence[str]) -> str:
    """The first tokens, and how many more there are."""
    return ", ".join(repr(token) for token in tokens[:3]) + (f" and {len(tokens) - 3} more" if len(tokens) > 3 else "")


def _position(ref: ModelRef, inputs: Sequence[Checkpoint]) -> int:
    for i, checkpoint in enumerate(inputs):
        if checkpoint.ref == ref.plain:
            return i
    raise MergeError(unknown("model in `tokenizer`:", str(ref), [str(checkpoint.ref) for checkpoint in inputs]))


def _vocabularies(inputs: Sequence[Checkpoint]) -> list[Vocabulary]:
    """Every model's vocabulary; that of the primary for a model that has no tokenizer, or the same unreadable one."""
    primary = read_vocabulary(inputs[0])
    if primary is None:
        raise MergeError(
            f"{inputs[0].label} has no tokenizer.json, and its tokens cannot be told without one. {_SAVE}, or leave "
            "`tokenizer` out of the recipe."
        )
    found = [primary]
    for checkpoint in inputs[1:]:
        own = read_vocabulary(checkpoint)
        if own is None and not same_slow_files(inputs[0], checkpoint):
            raise MergeError(
                f"{checkpoint.label} has a tokenizer without a tokenizer.json, other than that of {inputs[0].label}. {_SAVE}."
            )
        found.append(own or primary)
    return found
