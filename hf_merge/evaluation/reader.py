"""What stands between rows and a model: its tokenizer, its image processor, and what its config says of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.loaded_metric import LoadedMetric
from hf_merge.evaluation.metrics.summed import Values
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import Integers, Runner, Tokens
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.tasks import HEADS, TASKS, head_of
from hf_merge.scores import Score, smoothed

_LONGEST = 2048  # tokens of a row, unless an objective says more
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One split of one objective, ready to run: `references` hold one entry for each finding of `runner`.

    Where it is `smoothed`, rows that are nearly right or wrong count in part (`hf_merge.scores.smoothed`).
    """

    label: str
    runner: Runner
    references: Values
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    smoothed: bool = False

    def score(self, metric: LoadedMetric, found: Any, references: Values, *, replicates: int, seed: Sequence[int]) -> Score:
        """What the runner found for rows with these references, measured (`LoadedMetric.measure`), with its margins."""
        score = metric.measure(self.runner.answers(found), references, replicates=replicates, seed=seed)
        margins = self.runner.margins(found, references)
        if not self.smoothed or margins is None:
            return replace(score, margins=margins)
        outcomes = smoothed(margins)
        value = float(outcomes.mean())
        return replace(score, value=value, outcomes=outcomes.astype(np.float32), margins=margins, replicates=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Reads rows for models of one config.

    Args:
        config: of the models.
        tokenizer: of the models; None for models without texts.
        processor: of the models' images; None for models without images.
        pooling: how the models make one vector of a text's tokens: "mean", "cls" or "last".
        progress: whether long runs show a bar.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    processor: BaseImageProcessor | None = None
    pooling: str = "mean"
    progress: bool = False

    def check(self, objective: Objective) -> None:
        """Raises `EvaluationError` if the models cannot do the task, as far as their config tells."""
        task = TASKS[objective.task]
        architectures = self.config.architectures or ()
        heads = {name: head_of(name) for name in architectures}
        if task.heads and heads and all(head is not None and head not in task.heads for head in heads.values()):
            wanted = " or ".join(f"…{head}" for head in HEADS if head in task.heads)
            raise EvaluationError(f"{objective.task} needs a model {wanted}, and this one is {', '.join(architectures)}.")
        if not task.encoder_decoder and self.config.is_encoder_decoder:
            raise EvaluationError(f"{objective.task} cannot be measured on a model that has an encoder and a decoder.")
        if task.input == "image" and self.processor is None:
            raise EvaluationError(f"{objective.task} needs the model's image processor: give it as `processor`.")
        if objective.dataset is not None and task.input != "image" and self.tokenizer is None:
            raise EvaluationError(f"{objective.task} needs the model's tokenizer: give it as `tokenizer`.")

    @property
    def texts(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which `check` saw."""
        assert self.tokenizer is not None
        return self.tokenizer

    @property
    def own_padding(self) -> int | None:
        """The padding token that the models' config names."""
        found: int | None = getattr(self.config.get_text_config(), "pad_token_id", None)
        return found

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the models know; None if the config does not say."""
        size: int | None = getattr(self.config.get_text_config(), "vocab_size", None)
        return size

    def batches(self, objective: Objective) -> dict[str, Any]:
        """The arguments that every `BatchRunner` takes."""
        return {"batch_size": objective.batch_size, "progress": self.progress}

    def labels(self, objective: Objective) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
        """The labels among which a class is chosen, their numbers in the models' head, and whether order alone may match."""
        own = label_names(self.config)
        if len(own) < 2:
            raise EvaluationError(f"{objective.task} needs a head with at least two labels; the model has {', '.join(own)}.")
        if objective.labels is None:
            return own, tuple(range(len(own))), all(_PLACEHOLDER.fullmatch(name) for name in own)
        wrong = [unknown("label", name, own) for name in objective.labels if name not in own]
        if wrong:
            raise EvaluationError("\n".join(wrong))
        return objective.labels, tuple(own.index(name) for name in objective.labels), True

    def longest(self, objective: Objective, reserved: int = 0) -> int:
        """The most tokens of a row, `reserved` ones for an answer aside."""
        text = self.config.get_text_config()
        most = min(getattr(text, "max_position_embeddings", None) or 10**9, self.texts.model_max_length) - reserved
        if most < 1:
            raise EvaluationError(f"max_new_tokens={reserved} leaves no room for a prompt in this model.")
        if objective.max_length is not None and objective.max_length > most:
            raise EvaluationError(f"max_length={objective.max_length} is more than the {most} tokens that this model can take.")
        return objective.max_length or min(most, _LONGEST)

    def tokens(self, rows: Rows, most: int, *, keep_end: bool = False) -> Tokens:
        """The rows' texts or pairs of texts as tokens, at most `most` a row; with `keep_end` a long row loses its start.

        Raises:
            EvaluationError: a row has no tokens, or one that the models do not know.
        """
        encoded = self.texts(
            *(list(texts) for texts in rows.inputs),
            return_attention_mask=False,
            verbose=False,
            **({} if keep_end else {"truncation": True, "max_length": most}),
        )
        ids = tuple(np.array(row[-most:], dtype=np.int64) for row in encoded["input_ids"])
        self._refuse_unread(rows, ids)
        types = encoded.get("token_type_ids") if len(rows.inputs) == 2 else None
        return Tokens(ids=ids, types=None if types is None else tuple(np.array(row, dtype=np.int64) for row in types))

    def words(self, rows: Rows, most: int) -> tuple[Tokens, list[Integers]]:
        """The rows' lists of words as tokens, and each word's first token: -1 for words cut off, or without a token."""
        if not self.texts.is_fast:
            raise EvaluationError(f"token-classification needs a fast tokenizer, and this one is {type(self.texts).__name__}.")
        given = [list(words) for words in rows.inputs[0]]
        encoded = self.texts(
            given, is_split_into_words=True, truncation=True, max_length=most, return_attention_mask=False, verbose=False
        )
        ids = tuple(np.array(row, dtype=np.int64) for row in encoded["input_ids"])
        self._refuse_unread(rows, ids)
        first = []
        for row, words in enumerate(given):
            places = np.full(len(words), -1, dtype=np.int64)
            for token, word in reversed(list(enumerate(encoded.word_ids(row)))):
                if word is not None:
                    places[word] = token
            first.append(places)
        return Tokens(ids=ids), first

    def _refuse_unread(self, rows: Rows, ids: Sequence[Integers]) -> None:
        if (empty := next((i for i, row in enumerate(ids) if not len(row)), None)) is not None:
            raise EvaluationError(
                f"{rows.label}: row {empty}, {rows.inputs[0][empty]!r}, has no tokens, so there is nothing to predict. "
                "Remove such rows."
            )
        size = self.vocabulary
        if size is not None and (largest := max(int(row.max()) for row in ids)) >= size:
            raise EvaluationError(f"The tokenizer gives the token {largest}, and the model knows {size}: they do not fit.")


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """The labels of a config in the order of the head."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0])))
