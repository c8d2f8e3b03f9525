"""Scores of a model in memory: every objective's rows tokenized once, then measured for one model after the other."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.lm_eval import Harness
from hf_merge.evaluation.loaded_metric import LoadedMetric, load_metric
from hf_merge.evaluation.metrics.summed import Values
from hf_merge.evaluation.named_test import warn_of_test_data
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.prepared import Prepared, as_bytes, facts_of, identity, settings_of
from hf_merge.evaluation.reader import Reader, label_names
from hf_merge.evaluation.rounds import SHARES, PartialRun
from hf_merge.evaluation.rows import SEARCH, SPLITS, load_rows
from hf_merge.evaluation.runners.probes import PROBES
from hf_merge.evaluation.runners.table import RUNNERS
from hf_merge.evaluation.tasks import LM_EVAL, NONE, TASKS
from hf_merge.pareto import Floats
from hf_merge.scores import Score


class Evaluator:
    """Measures models on objectives. Data, metrics and labels are checked, and all rows tokenized, when it is made.

    Args:
        objectives: with distinct names.
        config: of the models that will be measured: it names their labels, their longest input and their padding token.
        tokenizer: of those models; None if no objective has texts.
        processor: of those models' images; None if no objective has images.
        pooling: how those models make one vector of a text's tokens, "mean", "cls" or "last" (`stated_pooling`).
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
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: BaseImageProcessor | None = None,
        pooling: str = "mean",
        seed: int = 0,
        device: str | torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.objectives = tuple(objectives)
        self.device = torch.device(device) if device is not None else PartialState().device
        self._seed = seed
        self._reader = Reader(config=config, tokenizer=tokenizer, processor=processor, pooling=pooling, progress=progress)
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
    def smoothed(self) -> frozenset[str]:
        """The names of the objectives whose search rows are smoothed."""
        return frozenset(objective.name for objective in self.objectives if objective.smoothed)

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that a score depends on besides the model: token ids, right answers, metrics, task settings.

        It hangs on contents and not on where the data was read from. A resumed study compares it.
        """
        return hashlib.sha256("\n".join(prepared.digest for prepared in self._prepared).encode()).hexdigest()[:32]

    def describe(self) -> list[dict[str, Any]]:
        """Each objective as plain facts for a card; `rows` counts what is scored."""
        return [facts_of(prepared) for prepared in self._prepared]

    def measure(
        self,
        model: PreTrainedModel,
        split: str = SEARCH,
        *,
        replicates: int = 0,
        facts: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Score]:
        """The model's scores by the objectives' names.

        Args:
            model: in memory, with the evaluator's config. Its mode (train or eval) and its configs are put back afterwards;
                nothing of it is kept.
            split: "search" or "held_out".
            replicates: bootstrap values of each metric. Replicate b draws the same rows for every model, so that differences
                of replicates are paired. At most 200 for a metric that is not hf_merge's own: each is a whole computation.
            facts: what is known of the model from how it was made; the metric delta_norm takes `delta_norm` from it.

        Returns:
            Scores with outcomes: 1 or 0 for a class, a choice or a text that is right or wrong; the row's chrF, ROUGE, nDCG or
            recall; its mean negative log-likelihood in nats (perplexity); its share of right tokens or tags, its entities' F1;
            its part of a correlation. Outcomes stand in the dataset's order. An objective without data has none, and the same
            value on either split.

        Raises:
            EvaluationError: the model does not fit the objectives, gives NaN, or a metric fails or is not finite.
        """
        self._take(model, split)
        return {prepared.objective.name: self._score(prepared, model, split, replicates, facts) for prepared in self._prepared}

    def rounds(
        self,
        model: PreTrainedModel,
        split: str = SEARCH,
        *,
        priorities: Mapping[str, Floats] = MappingProxyType({}),
        facts: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[dict[str, Score]]:
        """The model's scores on growing parts of the rows (`SHARES`), each holding the one before it; the last is on all.

        The parts follow `race_order` with the evaluator's seed, for every model. A round runs only the rows that are new to it,
        so all rounds together cost what `measure` does, but for batches that are filled less evenly.

        Args:
            model, split, facts: as in `measure`. The model must not change until the last round.
            priorities: by objective, how early to take each row `(n,)`, the highest first; see `race_order`.

        Yields:
            Scores whose `rows` say which rows their outcomes belong to. An objective whose metric is undefined on so few rows
            is missing in that round. An objective without data, or whose rows cannot be run apart, is whole (`rows` is None)
            from the first round on. The last round's scores are those of `measure`; what a model computes in floating point
            may differ in the last bits, as it does between batch sizes.

        Raises:
            EvaluationError: as in `measure`.
        """
        self._take(model, split)
        runs = {
            p.objective.name: PartialRun(p.parts[split], p.metric, self._seed, priorities.get(p.objective.name))
            for p in self._prepared
            if p.metric
        }
        fixed = {p.objective.name: self._score(p, model, split, 0, facts) for p in self._prepared if not p.metric}
        for share in (*SHARES, 1.0):
            scores = fixed | {name: _partial(name, run, model, share) for name, run in runs.items()}
            yield {name: score for name in self.directions if (score := scores[name]) is not None}

    def _take(self, model: PreTrainedModel, split: str) -> None:
        """Makes the model ready to be measured. Raises `EvaluationError` for one, or for a split, that does not fit."""
        if split not in SPLITS:
            raise EvaluationError(unknown("split", split, SPLITS))
        self._refuse_other(model)
        if model.device != self.device and getattr(model, "hf_device_map", None) is None:
            model.to(self.device)  # type: ignore[arg-type]

    def _score(
        self, prepared: Prepared, model: PreTrainedModel, split: str, replicates: int, facts: Mapping[str, float]
    ) -> Score:
        start, name = time.perf_counter(), prepared.objective.name
        if prepared.metric is None:
            score = _probe(prepared.objective, model, facts)
        else:
            part = prepared.parts[split]
            drawn_by = hashlib.sha256(f"{split} {name}".encode()).digest()[:16]
            try:
                found, seed = part.runner(model), [self._seed, *drawn_by]
                score = part.score(prepared.metric, found, part.references, replicates=replicates, seed=seed)
            except EvaluationError as error:
                raise EvaluationError(f"Objective {name!r} on {part.label}: {error}") from error
        return replace(score, seconds=time.perf_counter() - start)

    def _refuse_other(self, model: PreTrainedModel) -> None:
        classifies = any("labels" in TASKS[prepared.objective.task].options for prepared in self._prepared)
        if classifies and label_names(model.config) != label_names(self._reader.config):
            raise EvaluationError(
                f"The model's labels are {', '.join(label_names(model.config))}, and the evaluator was made for a model "
                f"with the labels {', '.join(label_names(self._reader.config))}."
            )

    def _prepare(self, objective: Objective) -> Prepared:
        self._reader.check(objective)
        if objective.task == NONE:
            return Prepared(objective=objective, digest=hashlib.sha256(repr(identity(objective)).encode()).hexdigest())
        if objective.task == LM_EVAL:
            harness = Harness(objective)
            metric, parts = harness.metric, {split: harness.part(split, self._reader) for split in SPLITS}
        else:
            metric, prepare = load_metric(objective), RUNNERS[objective.task]
            parts = {split: prepare(objective, rows, self._reader) for split, rows in load_rows(objective).items()}
        warn_of_test_data(objective, parts[SEARCH].label)
        parts[SEARCH] = replace(parts[SEARCH], smoothed=objective.smoothed)
        settings = settings_of(objective, metric, parts[SEARCH], self._reader)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
        for part in parts.values():
            if not TASKS[objective.task].own_metrics:
                _rehearse(metric, part.references)
            for values in part.runner.arrays():
                digest.update(np.ascontiguousarray(values).tobytes())
            digest.update(as_bytes(part.references))
        return Prepared(objective=objective, metric=metric, parts=parts, digest=digest.hexdigest())


def _wrong_names(objectives: Sequence[Objective]) -> Iterable[str]:
    if not objectives:
        yield "There are no objectives: give at least one."
    names = [objective.name for objective in objectives]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        yield f"Objectives need distinct names, and these stand for several: {', '.join(map(repr, repeated))}."


def _rehearse(metric: LoadedMetric, references: Values) -> None:
    """Perfect predictions: whether the metric takes such values and arguments shows before a model has run."""
    metric.number(references, references)


def _partial(name: str, run: PartialRun, model: PreTrainedModel, share: float) -> Score | None:
    try:
        return run.upto(model, share)
    except EvaluationError as error:
        raise EvaluationError(f"Objective {name!r} on {run.part.label}: {error}") from error


def _probe(objective: Objective, model: PreTrainedModel, facts: Mapping[str, float]) -> Score:
    try:
        value = PROBES[objective.metric](model, facts)
    except EvaluationError as error:
        raise EvaluationError(f"Objective {objective.name!r}: {error}") from error
    return Score(value=value, examples=0)
