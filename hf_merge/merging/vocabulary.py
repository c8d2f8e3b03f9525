"""Models with different vocabularies: one vocabulary for the result, and each model's embeddings and head read in its order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.rows import MeanRow, RowMap, Rows
from hf_merge.checkpoints.source import Source
from hf_merge.errors import MergeError
from hf_merge.merging.chat_templates import BUILTIN, TOKENS, most_common, template_of
from hf_merge.merging.embeddings import vocabulary_tensors
from hf_merge.merging.fill import Given, row_maps
from hf_merge.merging.parents import Parents, some
from hf_merge.merging.settings import Ids, translated
from hf_merge.merging.tokenizer import is_tokenizer_file, read_vocabulary, tokenizer_files, with_template, with_tokens
from hf_merge.recipes.tokenizer import TokenizerRequest

SCATTERED = 4096
"""A map of more runs than this takes so many reads that a model on the Hub should be stored on this disk first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyPlan:
    """The vocabulary of a merge, and how each model is read in it.

    `ids` by token; `rows` of the result's embeddings (tokens and padding); the `tensors` of the primary that have such rows;
    `added` are the tokens that the source of the tokenizer does not have; `files` are the result's tokenizer; `settings` the
    ids in config.json and generation_config.json. `own` (models, rows) holds each model's row of each row of the result, -1
    for none (None: nothing is re-indexed), `given` what the recipe says of single rows, `padding` which stand for no token.
    """

    ids: Mapping[str, int]
    rows: int
    tensors: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    files: Mapping[str, bytes]
    settings: Ids
    warnings: tuple[str, ...] = ()
    own: Tensor | None = None
    base: int | None = None
    padding: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    given: Mapping[int, Given] = field(default_factory=dict)
    _maps: dict[Any, tuple[RowMap, ...]] = field(default_factory=dict, repr=False)

    def realigned(self, sources: Sequence[Source | None]) -> tuple[Source | None, ...]:
        """One tensor of all models (their order is that of `align_vocabularies`; None: it has none), in the result's rows.

        A source that fits already is given back as it is. The rows that a delta (an adapter) lacks are no change: zeros.
        """
        if self.own is None:
            return tuple(sources)
        maps = self.maps(tuple(s.shape[0] if s else 0 for s in sources), tuple(bool(s and s.delta) for s in sources))
        # A model that lacks the tensor lends no rows; another's source stands in its place.
        some = next((source for source in sources if source), None)
        filled = [source or some for source in sources]
        every = tuple(source for source in filled if source)
        every += tuple(MeanRow(source) for source in every)
        found: list[Source | None] = []
        for m, source in enumerate(sources):
            if source is None or maps[m].is_identity(m, source.shape[0]):
                found.append(source)
            else:
                found.append(Rows(every, maps[m].of(m) if source.delta else maps[m], m))
        return tuple(found)

    def maps(self, rows: tuple[int, ...], deltas: tuple[bool, ...] | None = None) -> tuple[RowMap, ...]:
        """The row map of every model for tensors of so many `rows`; those that are `deltas` lend none."""
        if self.own is None:
            raise MergeError("This merge keeps every row in its place: there are no row maps.")
        key = rows, deltas
        if key not in self._maps:
            own = torch.where(self.own < torch.tensor(rows)[:, None], self.own, -1)
            lenders = [not delta for delta in deltas] if deltas else None
            self._maps[key] = row_maps(own, self.base, self.given, self.padding, lenders)
        return self._maps[key]

    def scattered(self, rows: tuple[int, ...]) -> tuple[bool, ...]:
        """Per model, whether its rows are so scattered that it should not be read from a network (`Checkpoint.store` it)."""
        if self.own is None:
            return (False,) * len(rows)
        return tuple(rows.runs > SCATTERED for rows in self.maps(rows))

    def configured(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The primary's config.json or generation_config.json with the result's vocabulary size and token ids."""
        return translated(content, self.settings)

    def companions(self, carried: Mapping[str, bytes]) -> dict[str, bytes]:
        """The companion files of the result, from those of the primary: its tokenizer, and the configs that name its ids."""
        others = {name: data for name, data in carried.items() if not is_tokenizer_file(name)}
        return self.settings.in_files(others | dict(self.files))

    def __str__(self) -> str:
        shown = ", ".join(repr(token) for token in self.added[:5]) + (", …" if len(self.added) > 5 else "")
        added = f", {len(self.added)} added: {shown}" if self.added else ""
        notes = (f"Note: {warning}" for warning in self.warnings)
        return "\n".join([f"Vocabulary: {len(self.ids)} tokens in {self.rows} rows{added}", *notes])


def align_vocabularies(
    request: TokenizerRequest, inputs: Sequence[Checkpoint], base: Checkpoint | None = None
) -> VocabularyPlan:
    """One vocabulary for models that may have different ones; `inputs[0]` is the primary, and `request`'s models are pinned.

    The tokenizer is that of the primary ("union", "base") or of a model; the ids of its tokens do not move. New tokens get the
    ids after its last one: rows of padding while there are any, so that padded embeddings keep their size, and new rows then.
    What a model lacks is filled as `fill.row_maps` says; rows that stand for no token stay a model's own where it has them.

    Reads headers and small files alone. Raises `MergeError` for a tokenizer that cannot be read or added to, and for tokens
    that the request names and that are not there.
    """
    if request.source is None:
        return _kept(request, inputs)
    parents = Parents.read(inputs, request.source)
    lender, warnings = inputs[parents.donor], list[str]()
    new = parents.new_tokens(request, warnings)
    files, more = with_tokens(tokenizer_files(lender), [owner.entry(token) for token, owner in new.items()], lender.label)
    ids = {**parents.vocabularies[parents.donor].ids, **more}
    rows = parents.rows(ids, new, request.pad_to_multiple_of)
    own, padding = parents.own(ids, rows)
    given = parents.given(request, ids)
    files = _templated(request.chat_template, files, inputs, lender, ids, warnings)
    warnings += [*parents.losses(ids), *_without_rows(own, padding, given, ids, rows)]
    moved = lender if parents.donor else None
    return VocabularyPlan(
        ids=ids,
        rows=rows,
        tensors=parents.tensors,
        added=tuple(new),
        files=files,
        settings=Ids.between(parents.sizes[0], rows, parents.vocabularies[0].ids, ids, moved),
        warnings=tuple(warnings),
        own=own,
        base=None if base is None else list(inputs).index(base),
        padding=padding,
        given=given,
    )


def _kept(request: TokenizerRequest, inputs: Sequence[Checkpoint]) -> VocabularyPlan:
    """The primary's tokenizer as it is, but for the chat template."""
    primary, warnings = inputs[0], list[str]()
    vocabulary, tensors = read_vocabulary(primary), vocabulary_tensors(primary)
    ids = vocabulary.ids if vocabulary else {}
    rows = primary.index.tensors[tensors[0]].shape[0] if tensors else 0
    files = _templated(request.chat_template, tokenizer_files(primary), inputs, primary, ids, warnings)
    settings = Ids(before=rows, rows=rows)
    return VocabularyPlan(ids=ids, rows=rows, tensors=tensors, files=files, settings=settings, warnings=tuple(warnings))


def _templated(
    name: str | None,
    files: dict[str, bytes],
    inputs: Sequence[Checkpoint],
    lender: Checkpoint,
    ids: Mapping[str, int],
    warnings: list[str],
) -> dict[str, bytes]:
    """The tokenizer's files (the `lender`'s) with the chat template that is asked for."""
    if name is None:
        return files
    if name == "auto":
        template = most_common([template_of(checkpoint) for checkpoint in inputs])
        return files if template is None or template == template_of(lender) else with_template(files, template)
    if missing := [token for token in TOKENS.get(name, ()) if ids and token not in ids]:
        warnings.append(
            f"The chat template {name} writes {some(missing)}, which the vocabulary does not have: a text is cut into pieces "
            "there. Add them under `tokenizer: tokens:`."
        )
    return with_template(files, BUILTIN.get(name, name))


def _without_rows(own: Tensor, padding: Tensor, given: Mapping[int, Given], ids: Mapping[str, int], rows: int) -> Iterable[str]:
    nobody = (own < 0).all(0) & ~padding
    nobody[[row for row, what in given.items() if what.rows is not None]] = False
    empty = set(nobody.nonzero().flatten().tolist())
    zeros = [token for token, i in ids.items() if i in empty]
    if zeros:
        yield f"No model has a row for {some(zeros)}: zeros."
    if dangling := [token for token, i in ids.items() if i >= rows]:
        yield f"The tokenizer has tokens beyond the {rows} rows of the embeddings, as before: {some(dangling)}."
