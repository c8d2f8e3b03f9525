"""Texts as vectors: how similar two are, and which documents a query finds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import BatchRunner, Integers, Items, Runner, in_order
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows

FOUND = 100
"""Documents that a retrieval lists for each query, at most."""
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def stated_pooling(settings: Mapping[str, Any] | None) -> str:
    """The pooling that a checkpoint's `1_Pooling/config.json` (of sentence-transformers) asks for; "mean" if there is none.

    Raises `EvaluationError` for one that is not known here.
    """
    modes = [name for name, on in (settings or {}).items() if name.startswith("pooling_mode_") and on is True]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in _MODES:
        raise EvaluationError(f"The checkpoint pools by {', '.join(modes)}. Known: {', '.join(_MODES)}, one of them.")
    return _MODES[modes[0]]


class Embeddings(BatchRunner):
    """Each text as a vector of length 1, `(n, width)` float32: the last hidden states, pooled.

    `pooling`: "mean" over the tokens, "cls" (the first token) or "last" (the last one).
    """

    def __init__(self, items: Items, *, pooling: str, **kwargs: Any) -> None:
        super().__init__(items, **kwargs)
        self.pooling = pooling

    def _predict(self, model: PreTrainedModel, rows: Integers) -> Tensor:
        body: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        parts = []
        for places, inputs in self._each(model, rows):
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            hidden = getattr(body(**inputs), "last_hidden_state", None)
            if hidden is None:
                raise EvaluationError(f"{type(model).__name__} gives no hidden states to make a vector of.")
            parts.append((places, torch.nn.functional.normalize(self._pooled(hidden.float(), mask), dim=1)))
        return in_order(parts)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Similarity(Runner):
    """The cosine of each row's two texts, `(n,)` float64.

    Args:
        embeddings: of the distinct texts.
        pairs: positions of each row's two among them, `(n, 2)`.
    """

    def __init__(self, embeddings: Embeddings, *, pairs: Integers) -> None:
        self.embeddings, self.pairs = embeddings, pairs

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> NDArray[np.float64]:
        wanted, places = np.unique(self.pairs if rows is None else self.pairs[rows], return_inverse=True)
        vectors = self.embeddings(model, wanted).double().numpy()[places.reshape(-1, 2)]
        cosines: NDArray[np.float64] = (vectors[:, 0] * vectors[:, 1]).sum(1)
        return cosines

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (*self.embeddings.arrays(), self.pairs)


class Retrieval(Runner):
    """The names of the documents that each query finds, nearest first, at most `FOUND`.

    Args:
        embeddings: of the documents, then of the queries.
        names: of the documents.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, embeddings: Embeddings, *, names: Sequence[str]) -> None:
        self.embeddings, self.names = embeddings, names

    def __call__(self, model: PreTrainedModel, rows: Integers | None = None) -> list[list[str]]:
        count = len(self.names)
        queries = np.arange(count, len(self.embeddings.items.lengths)) if rows is None else rows + count
        vectors = self.embeddings(model, np.concatenate([np.arange(count), queries]))
        similarity = vectors[count:] @ vectors[:count].T
        # Stable: documents that are equally near stand in the corpus' order, on every machine.
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :FOUND]
        return [[self.names[document] for document in found] for found in nearest.tolist()]

    def arrays(self) -> Iterator[NDArray[Any]]:
        yield from (*self.embeddings.arrays(), np.array(self.names))


def sentence_similarity(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """A pair of texts a row; references are their similarities by people, on any scale."""
    texts = dict.fromkeys(text for column in rows.inputs for text in column)
    number = {text: i for i, text in enumerate(texts)}
    pairs = np.array([[number[text] for text in column] for column in rows.inputs], dtype=np.int64).T
    embeddings, most = _embeddings(objective, list(texts), rows.label, reader)
    return Part(
        label=rows.label,
        runner=Similarity(embeddings, pairs=pairs),
        references=np.array(rows.targets or (), dtype=np.float64),
        max_length=most,
    )


def text_retrieval(objective: Objective, rows: Rows, reader: Reader) -> Part:
    """A query a row; references are lists of the relevant documents' names.

    The documents are the corpus, or else all targets of these rows, which then are their own names.
    """
    references = [list(targets) for targets in rows.targets or ()]
    corpus = rows.corpus or {text: text for texts in references for text in texts}
    embeddings, most = _embeddings(objective, [*corpus.values(), *rows.inputs[0]], rows.label, reader)
    runner = Retrieval(embeddings, names=tuple(corpus))
    return Part(label=rows.label, runner=runner, references=references, max_length=most)


def _embeddings(objective: Objective, texts: Sequence[str], label: str, reader: Reader) -> tuple[Embeddings, int]:
    most = reader.longest(objective)
    tokens = reader.tokens(Rows(label=label, inputs=(tuple(texts),), targets=None), most)
    pooling = objective.pooling or reader.pooling
    return Embeddings(tokens, pooling=pooling, pad_id=reader.own_padding or 0, **reader.batches(objective)), most
