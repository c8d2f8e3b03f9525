"""An objective made ready: its splits, what a score depends on, and how a card tells it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_merge.evaluation.loaded_metric import LoadedMetric
from hf_merge.evaluation.metrics.summed import Values
from hf_merge.evaluation.named_test import searches_test_data
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import SEARCH
from hf_merge.evaluation.tasks import TASKS


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """An objective with its splits, ready to run; one without data has neither splits nor a metric, only a probe."""

    objective: Objective
    digest: str
    metric: LoadedMetric | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)


def identity(objective: Objective) -> list[Any]:
    """Its name, task, direction and metric."""
    return [objective.name, objective.task, objective.direction, objective.metric_name]


def settings_of(objective: Objective, metric: LoadedMetric, part: Part, reader: Reader) -> list[Any]:
    """What a score depends on besides rows and right answers."""
    options = TASKS[objective.task].options
    return [
        *identity(objective)[:3],
        metric.identity,
        metric.key,
        sorted(metric.arguments.items()),
        list(part.labels),
        [objective.max_new_tokens] if "max_new_tokens" in options else [],
        [objective.pooling or reader.pooling] if "pooling" in options else [],
        *(["smoothed"] if objective.smoothed else []),
    ]


def as_bytes(references: Values) -> bytes:
    """Right answers for a digest."""
    return references.tobytes() if isinstance(references, np.ndarray) else json.dumps(references).encode()


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """Plain facts for a card."""
    objective, metric = prepared.objective, prepared.metric
    if metric is None:
        described = {"name": objective.name, "metric": objective.metric, "direction": objective.direction}
        return {**described, "implementation": f"hf_merge {objective.metric}"}
    part = prepared.parts[SEARCH]
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
        "split": part.label,
        "searched_on_test": searches_test_data(objective, part.label),
        "held_out": prepared.parts["held_out"].label,
        **{f"rows_{split}": len(part.references) for split, part in prepared.parts.items()},
        "smoothed": objective.smoothed,
        "labels": list(part.labels),
        "max_length": part.max_length,
        "max_new_tokens": objective.max_new_tokens if "max_new_tokens" in TASKS[objective.task].options else None,
    }
