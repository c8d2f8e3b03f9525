"""Scores of a model in memory: every objective's rows tokenized once, then measured for one model after the other."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.loaded_metric import LoadedMetric, load_metric
from hf_merge.evaluation.metrics import Values
from hf_merge.evaluation.objective import LANGUAGE_MODELING, TEXT_CLASSIFICATION, TEXT_GENERATION, Objective
from hf_merge.evaluation.predict import (
    LanguageModeling,
    Runner,
    TextClassification,
    TextGeneration,
    Tokens,
    hits,
    negative_log_likelihood,
)
from hf_merge.evaluation.rows import SEARCH, SPLITS, Rows, class_ids, load_rows
from hf_merge.scores import Score

_LONGEST = 2048  # tokens of a row, unless an objective says more
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One split of one objective, ready to run."""

    label: str
    runner: Runner
    references: Values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    objective: Objective
    metric: LoadedMetric
    labels: tuple[str, ...]
    max_length: int
    parts: Mapping[str, _Part]
    digest: str


class Evaluator:
    """Measures models on objectives. Data, metrics and labels are checked, and all rows tokenized, when it is made.

    Args:
        objectives: with distinct names.
        tokenizer: of the models that will be measured.
        config: of those models: it names their labels, their longest input and their padding token.
        seed: of the bootstrap.
        device: where models run; None takes accelerate's choice. A model elsewhere is moved there, as `model.to` does, unless
            accelerate has spread it over several devices.
        progress: whether long runs show a bar.

    Raises:
        EvaluationError: all that is wrong with the objectives, before any model has run.
    """

    def __init__(
        self,
        objectives: Iterable[Objective],
        *,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.objectives = tuple(objectives)
        self.device = torch.device(device) if device is not None else PartialState().device
        self._tokenizer, self._config, self._seed, self._progress = tokenizer, config, seed, progress
        wrong = list(_wrong_names(self.objectives))
        prepared = []
        for objective in self.objectives:
            try:
                prepared.append(self._prepare(objective))
            except EvaluationError as error:
                wrong.append(f"Objective {objective.name!r}: {error}")
        if wrong:
            raise EvaluationError("\n".join(wrong))
        self._prepared = tuple(prepared)

    @property
    def directions(self) -> Mapping[str, str]:
        """What each objective is, by name: "maximize" or "minimize"."""
        return MappingProxyType({objective.name: str(objective.direction) for objective in self.objectives})

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that a score depends on besides the model: token ids, right answers, metrics, task settings.

        It hangs on contents and not on where the data was read from. A resumed study compares it.
        """
        return hashlib.sha256("\n".join(prepared.digest for prepared in self._prepared).encode()).hexdigest()[:32]

    def describe(self) -> list[dict[str, Any]]:
        """Each objective as plain facts for a card; `rows` counts what is scored."""
        return [_facts(prepared) for prepared in self._prepared]

    def measure(self, model: PreTrainedModel, split: str = SEARCH, *, replicates: int = 0) -> dict[str, Score]:
        """The model's scores by the objectives' names.

        Args:
            model: in memory, with the evaluator's config. Its mode (train or eval) and its configs are put back afterwards;
                nothing of it is kept.
            split: "search" or "held_out".
            replicates: bootstrap values of each metric. Replicate b draws the same rows for every model, so that differences
                of replicates are paired. At most 200 for a metric that is not hf_merge's own: each is a whole computation.

        Returns:
            Scores with outcomes: 1 or 0 for a class or a text that is right or wrong; the row's chrF; its mean negative
            log-likelihood in nats (perplexity); its share of right tokens. Outcomes stand in the dataset's order.

        Raises:
            EvaluationError: the model does not fit the objectives, gives NaN, or a metric fails or is not finite.
        """
        if split not in SPLITS:
            raise EvaluationError(unknown("split", split, SPLITS))
        self._refuse_other(model)
        if model.device != self.device and getattr(model, "hf_device_map", None) is None:
            model.to(self.device)  # type: ignore[arg-type]
        return {prepared.objective.name: self._score(prepared, model, split, replicates) for prepared in self._prepared}

    def _score(self, prepared: _Prepared, model: PreTrainedModel, split: str, replicates: int) -> Score:
        start, part, name = time.perf_counter(), prepared.parts[split], prepared.objective.name
        drawn_by = hashlib.sha256(f"{split} {name}".encode()).digest()[:16]
        try:
            predictions = part.runner(model)
            score = prepared.metric.measure(predictions, part.references, replicates=replicates, seed=[self._seed, *drawn_by])
        except EvaluationError as error:
            raise EvaluationError(f"Objective {name!r} on {part.label}: {error}") from error
        return replace(score, seconds=time.perf_counter() - start)

    def _refuse_other(self, model: PreTrainedModel) -> None:
        classifies = any(prepared.objective.task == TEXT_CLASSIFICATION for prepared in self._prepared)
        if classifies and _label_names(model.config) != _label_names(self._config):
            raise EvaluationError(
                f"The model's labels are {', '.join(_label_names(model.config))}, and the evaluator was made for a model "
                f"with the labels {', '.join(_label_names(self._config))}."
            )

    def _prepare(self, objective: Objective) -> _Prepared:
        if self._config.is_encoder_decoder and objective.task == LANGUAGE_MODELING:
            raise EvaluationError("language-modeling needs a causal model, and this one has an encoder and a decoder.")
        metric = load_metric(objective)
        names, classes, positional = self._labels(objective)
        max_length = self._max_length(objective)
        rows = load_rows(objective)
        digest = hashlib.sha256(json.dumps(_settings(objective, metric, names), sort_keys=True, default=repr).encode())
        parts = {}
        for split, part in rows.items():
            tokens = self._tokenize(objective, part, max_length)
            references: Values
            if objective.task == TEXT_CLASSIFICATION:
                references = class_ids(part, names, positional=positional)
            elif objective.task == LANGUAGE_MODELING:
                references = (tokens.lengths - 1).astype(np.float64)
            else:
                references = list(part.targets or ())
            if objective.task != LANGUAGE_MODELING:
                _rehearse(metric, references)
            runner = self._runner(objective, tokens, classes)
            parts[split] = _Part(label=part.label, runner=runner, references=references)
            _digest_rows(digest, tokens, references)
        return _Prepared(
            objective=objective, metric=metric, labels=names, max_length=max_length, parts=parts, digest=digest.hexdigest()
        )

    def _labels(self, objective: Objective) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
        """The labels among which a class is chosen, their numbers in the model's head, and whether order alone may match."""
        if objective.task != TEXT_CLASSIFICATION:
            return (), (), False
        own = _label_names(self._config)
        if len(own) < 2:
            raise EvaluationError(f"text-classification needs a head with at least two labels; the model has {', '.join(own)}.")
        if objective.labels is None:
            return own, tuple(range(len(own))), all(_PLACEHOLDER.fullmatch(name) for name in own)
        wrong = [unknown("label", name, own) for name in objective.labels if name not in own]
        if wrong:
            raise EvaluationError("\n".join(wrong))
        return objective.labels, tuple(own.index(name) for name in objective.labels), True

    def _max_length(self, objective: Objective) -> int:
        text = self._config.get_text_config()
        most = min(getattr(text, "max_position_embeddings", None) or 10**9, self._tokenizer.model_max_length)
        if objective.task == TEXT_GENERATION and not self._config.is_encoder_decoder:
            most -= objective.max_new_tokens
            if most < 1:
                raise EvaluationError(f"max_new_tokens={objective.max_new_tokens} leaves no room for a prompt in this model.")
        if objective.max_length is not None and objective.max_length > most:
            raise EvaluationError(f"max_length={objective.max_length} is more than the {most} tokens that this model can take.")
        return objective.max_length or min(most, _LONGEST)

    def _tokenize(self, objective: Objective, rows: Rows, max_length: int) -> Tokens:
        paired = len(rows.inputs) == 2
        whole = objective.task == TEXT_GENERATION and not self._config.is_encoder_decoder
        cutting = {} if whole else {"truncation": True, "max_length": max_length}
        encoded = self._tokenizer(
            *(list(texts) for texts in rows.inputs), return_attention_mask=False, verbose=False, **cutting
        )
        # A prompt's end is what is continued, so its start gives way.
        ids = tuple(np.array(row[-max_length:], dtype=np.int64) for row in encoded["input_ids"])
        if objective.task == LANGUAGE_MODELING:
            ids = tuple(row for row in ids if len(row) > 1)
        empty = [i for i, row in enumerate(ids) if not len(row)]
        if empty or not ids:
            example = f"row {empty[0]}, {rows.inputs[0][empty[0]]!r}, has no tokens" if empty else "no row has two tokens"
            raise EvaluationError(f"{rows.label}: {example}, so there is nothing to predict. Remove such rows.")
        size = getattr(self._config.get_text_config(), "vocab_size", None)
        if size is not None and (largest := max(int(row.max()) for row in ids)) >= size:
            raise EvaluationError(f"The tokenizer gives the token {largest}, and the model knows {size}: they do not fit.")
        types = encoded.get("token_type_ids") if paired else None
        return Tokens(ids=ids, types=None if types is None else tuple(np.array(row, dtype=np.int64) for row in types))

    def _runner(self, objective: Objective, tokens: Tokens, classes: Sequence[int]) -> Runner:
        text = self._config.get_text_config()
        own = getattr(text, "pad_token_id", None)
        shared = {"batch_size": objective.batch_size, "progress": self._progress}
        if objective.task == TEXT_CLASSIFICATION:
            return TextClassification(tokens, classes=classes, pad_id=own, **shared)
        if objective.task == LANGUAGE_MODELING:
            count = negative_log_likelihood if objective.metric == "perplexity" else hits
            return LanguageModeling(tokens, count=count, pad_id=own or 0, logits=text.vocab_size, **shared)
        found = [self._tokenizer.pad_token_id, own, self._tokenizer.eos_token_id, 0]
        return TextGeneration(
            tokens,
            tokenizer=self._tokenizer,
            max_new_tokens=objective.max_new_tokens,
            pad_id=next(value for value in found if value is not None),
            left=not self._config.is_encoder_decoder,
            **shared,
        )


def _wrong_names(objectives: Sequence[Objective]) -> Iterable[str]:
    if not objectives:
        yield "There are no objectives: give at least one."
    names = [objective.name for objective in objectives]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        yield f"Objectives need distinct names, and these stand for several: {', '.join(map(repr, repeated))}."


def _label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0])))


def _rehearse(metric: LoadedMetric, references: Values) -> None:
    """Perfect predictions: whether the metric takes such values and arguments shows before a model has run."""
    metric.number(references, references)


def _settings(objective: Objective, metric: LoadedMetric, labels: Sequence[str]) -> list[Any]:
    generation = [objective.max_new_tokens] if objective.task == TEXT_GENERATION else []
    arguments = sorted(metric.arguments.items())
    return [
        objective.name,
        objective.task,
        objective.direction,
        metric.identity,
        metric.key,
        arguments,
        list(labels),
        generation,
    ]


def _digest_rows(digest: Any, tokens: Tokens, references: Values) -> None:
    for values in (tokens.lengths, *tokens.ids, *(tokens.types or ())):
        digest.update(values.tobytes())
    digest.update(references.tobytes() if isinstance(references, np.ndarray) else json.dumps(references).encode())


def _facts(prepared: _Prepared) -> dict[str, Any]:
    objective, metric = prepared.objective, prepared.metric
    return {
        "name": objective.name,
        "task": objective.task,
        "metric": metric.name,
        "metric_key": metric.key,
        "metric_arguments": dict(metric.arguments),
        "implementation": metric.implementation,
        "direction": objective.direction,
        "dataset": objective.dataset_label,
        "config": objective.config,
        "revision": objective.revision,
        "split": prepared.parts[SEARCH].label,
        "held_out": prepared.parts["held_out"].label,
        **{f"rows_{split}": len(part.references) for split, part in prepared.parts.items()},
        "labels": list(prepared.labels),
        "max_length": prepared.max_length,
        "max_new_tokens": objective.max_new_tokens if objective.task == TEXT_GENERATION else None,
    }
