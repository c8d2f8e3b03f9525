"""Metrics of tokens and of words."""

import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.metrics.summed import Floats, Share, SummedMetric, Values

_TAGS = datasets.List(datasets.Value("string"))
_TAG = re.compile(r"O|[BIES]-.+")


class Perplexity(SummedMetric):
    """exp(total negative log-likelihood / total tokens), of tokens and not of rows; an outcome is a row's mean in nats.

    predictions are each row's summed negative log-likelihood in nats, references its number of predicted tokens.
    """

    key, feature = "perplexity", datasets.Value("float64")
    about = "exp(sum of predictions / sum of references): negative log-likelihoods of rows, and their numbers of tokens."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return _paired(predictions, references)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        with np.errstate(over="ignore"):
            return np.exp(sums[:, 0] / sums[:, 1])

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        return statistics[:, 0] / statistics[:, 1]


class TokenAccuracy(Share):
    """The share of tokens that a model ranks first, of tokens and not of rows; an outcome is a row's own share.

    predictions are each row's number of right tokens, references its number of predicted tokens.
    """

    key, feature = "token_accuracy", datasets.Value("float64")
    about = "sum of predictions / sum of references: right tokens of rows, and their numbers of tokens."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return _paired(predictions, references)


class TagAccuracy(Share):
    """The share of words whose tag is right, of words and not of rows; an outcome is a row's own share (1 without words).

    predictions and references are lists of tags, one for each word.
    """

    key, feature = "tag_accuracy", _TAGS
    about = "Share of words whose tag is right; predictions and references are lists of tags."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        pairs = zip(predictions, references, strict=True)
        return _table([(sum(a == b for a, b in zip(*tags, strict=True)), len(tags[1])) for tags in pairs], 2)

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        return np.where(statistics[:, 1] > 0, statistics[:, 0] / np.maximum(statistics[:, 1], 1), 1)


class EntityF1(SummedMetric):
    """F1 = 2 right / (predicted + true) of entities, over all rows and types: one is right if its type, start and end are.

    Tags are "O", "B-type" and "I-type" (as well as "E-" and "S-"), read as the CoNLL evaluation does (Tjong Kim Sang and De
    Meulder, 2003; seqeval's default): an "I-" that continues nothing begins an entity. An outcome is a row's own F1, 1 for a
    row that rightly has no entity.
    """

    key, feature = "entity_f1", _TAGS
    about = "F1 of entities in lists of tags O, B-type, I-type."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        rows = []
        for given, wanted in zip(predictions, references, strict=True):
            found, true = entities(given), entities(wanted)
            rows.append((len(found & true), len(found), len(true)))
        return _table(rows, 3)

    def value(self, sums: Floats, **arguments: Any) -> Floats:
        both = sums[:, 1] + sums[:, 2]
        return 2 * sums[:, 0] / np.where(both > 0, both, 1)

    def outcomes(self, statistics: Floats, **arguments: Any) -> Floats:
        return np.where(statistics[:, 1] + statistics[:, 2] > 0, self.value(statistics), 1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities that tags mark, as type, first word and word after the last.

    Raises `EvaluationError` for a tag that marks none of a known kind.
    """
    found, kind, start, before = set(), "", 0, "O"
    for i, tag in enumerate([*tags, "O"]):
        if not _TAG.fullmatch(tag):
            raise EvaluationError(
                f"entity_f1 reads the tags O, B-type and I-type, and {tag!r} is none: take the metric tag_accuracy."
            )
        goes_on = tag[0] in "IE" and before[0] in "BI" and tag[2:] == kind
        if not goes_on:
            if before != "O":
                found.add((kind, start, i))
            kind, start = tag[2:], i
        before = tag
    return found


def _paired(predictions: Values, references: Values) -> Floats:
    return np.stack((np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)), axis=1)


def _table(rows: Sequence[Sequence[int]], width: int) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(-1, width)
