"""Any metric, ready to score: one of ours, an `evaluate` module, a callable, a script, or one from the Hub."""

import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
from huggingface_hub import is_offline_mode
from numpy.typing import ArrayLike, NDArray

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.metrics.summed import Floats, SummedMetric, Values
from hf_merge.evaluation.metrics.table import METRICS
from hf_merge.evaluation.metrics.texts import plain
from hf_merge.evaluation.objective import Objective
from hf_merge.scores import Score

# A metric that is not ours is recomputed for each replicate, in Python: thousands of replicates would take minutes.
MOST_RECOMPUTED = 200
_REPLICATES_AT_ONCE = 128
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedMetric:
    """A metric ready to run. `implementation` names the code behind it for a card; `identity` changes when that code does."""

    name: str
    implementation: str
    identity: str
    function: Any
    key: str | None
    arguments: Mapping[str, Any]

    def value(self, predictions: Values, references: Values) -> float:
        """The score as a finite float.

        Raises:
            EvaluationError: the metric fails, gives several numbers and no key says which, or gives NaN or infinity.
        """
        return _finite(self.name, self.number(predictions, references))

    def number(self, predictions: Values, references: Values) -> float:
        """The score as the metric gives it: it may be NaN or infinite."""
        call = getattr(self.function, "compute", self.function)
        try:
            result = call(predictions=predictions, references=references, **self.arguments)
        except EvaluationError:
            raise
        except Exception as error:  # whatever the metric's code raises
            raise EvaluationError(f"The metric {self.name} failed: {type(error).__name__}: {error}") from error
        if isinstance(result, Mapping):
            result = result[self._chosen(result)]
        try:
            return float(result)
        except (TypeError, ValueError):
            shown = f"{type(result).__name__} {result!r:.100}"
            raise EvaluationError(f"The metric {self.name} gave {shown}, expected a number; `metric_key` picks one.") from None

    def _chosen(self, result: Mapping[str, Any]) -> str:
        if self.key is not None:
            if self.key not in result:
                raise EvaluationError(unknown(f"metric_key of {self.name}", self.key, result))
            return self.key
        if len(result) == 1:
            return next(iter(result))
        if self.name in result:
            return self.name
        raise EvaluationError(f"The metric {self.name} gives several numbers: say which as metric_key: {', '.join(result)}.")

    def measure(self, predictions: Values, references: Values, *, replicates: int, seed: Sequence[int]) -> Score:
        """The score over these rows, with outcomes and, if asked for and possible, bootstrap replicates.

        Replicate b counts the rows that `seed` draws for it, whatever the predictions are. A metric that is not ours is
        recomputed for every replicate, of which there are then at most `MOST_RECOMPUTED`; where that fails (a metric may
        be undefined on rows of one class), there are none and the log says so. The outcomes of such a metric are 1 for a
        row whose prediction equals its reference (texts: once stripped), else 0.
        """
        n = len(references)
        if isinstance(self.function, SummedMetric):
            metric, rows = self.function, self.function.statistics(predictions, references, **self.arguments)
            value = _finite(self.name, float(metric.value(rows.sum(0, keepdims=True), **self.arguments)[0]))
            drawn = [metric.value(counts @ rows, **self.arguments) for counts in _resampled(n, replicates, seed)]
            outcomes = metric.outcomes(rows, **self.arguments)
            return _score(value, outcomes, np.concatenate(drawn) if drawn else None)
        value = self.value(predictions, references)
        exact = [plain(a) == plain(b) for a, b in zip(predictions, references, strict=True)]
        return _score(value, exact, self._recomputed(predictions, references, min(replicates, MOST_RECOMPUTED), seed))

    def _recomputed(self, predictions: Values, references: Values, replicates: int, seed: Sequence[int]) -> Floats | None:
        values = []
        try:
            for counts in _resampled(len(references), replicates, seed):
                for count in counts:
                    rows = np.repeat(np.arange(len(count)), count.astype(np.int64))
                    values.append(self.value(_pick(predictions, rows), _pick(references, rows)))
        except EvaluationError as error:
            _logger.warning("No bootstrap of %s: %s", self.name, error)
            return None
        return np.array(values) if values else None


def load_metric(objective: Objective) -> LoadedMetric:
    """An objective's metric: an `evaluate` module, a callable, one of ours, a script, or one from the Hub, in this order.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    metric, name = objective.metric, objective.metric_name
    if isinstance(metric, str) and metric in METRICS:
        module = METRICS[metric]()
        implementation = f"hf_merge {metric}"
        identity = f"hf_merge:{metric}"
    elif (path := objective.metric_path) is not None:
        module = _load(str(path.resolve()), f"the script {path}")
        implementation = f"evaluate module from the local script {path.name}"
        identity = f"script:{_digest(inspect.getsource(type(module)))}"
    elif isinstance(metric, str):
        module = _load_from_hub(metric)
        implementation = f"evaluate module {metric} from the Hub"
        identity = f"hub:{metric}:{_digest(inspect.getsource(type(module)))}"
    else:
        module = metric
        kind = "evaluate module" if hasattr(metric, "compute") else "callable"
        function = getattr(metric, "func", metric)  # behind a functools.partial
        code = function if inspect.isroutine(function) else type(function)
        implementation = f"{kind} {code.__module__}.{code.__qualname__}"
        identity = f"{implementation}:{getattr(metric, 'config_name', '')}:{_digest(_source(code))}"
    return LoadedMetric(
        name=name,
        implementation=implementation,
        identity=identity,
        function=module,
        key=objective.metric_key,
        arguments=objective.metric_arguments,
    )


def _load(path: str, what: str) -> evaluate.EvaluationModule:
    # A module script may raise anything at import.
    try:
        return evaluate.load(path, keep_in_memory=True)
    except Exception as error:
        raise EvaluationError(f"The metric could not be loaded from {what}: {type(error).__name__}: {error}") from error


def _load_from_hub(name: str) -> evaluate.EvaluationModule:
    if is_offline_mode():  # evaluate has a switch of its own
        evaluate.config.HF_EVALUATE_OFFLINE = True
    repo = name if "/" in name else f"evaluate-metric/{name}"
    try:
        return evaluate.load(repo, keep_in_memory=True)
    except (FileNotFoundError, ConnectionError) as error:
        # evaluate says that a script is missing in the working directory, whatever the reason.
        why = (
            "this machine is set to work offline, and it is not in the cache"
            if evaluate.config.HF_EVALUATE_OFFLINE
            else "it is not in the cache, and the Hub has no such metric or cannot be reached"
        )
        raise EvaluationError(
            f"The metric {name!r} could not be loaded from https://huggingface.co/spaces/{repo}: {why}. "
            f"Metrics that need no download: {', '.join(METRICS)}."
        ) from error
    except Exception as error:
        raise EvaluationError(
            f"The metric {name!r} from the Hub could not be loaded: {type(error).__name__}: {error}"
        ) from error


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # built in, or typed into a prompt
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _resampled(rows: int, replicates: int, seed: Sequence[int]) -> Iterator[Floats]:
    """How often each replicate holds each row, in blocks `(b, rows)`; replicate b does not depend on how many there are."""
    rng = np.random.default_rng(seed)
    for start in range(0, replicates, _REPLICATES_AT_ONCE):
        b = min(_REPLICATES_AT_ONCE, replicates - start)
        drawn = rng.integers(0, rows, size=(b, rows)) + np.arange(b)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=b * rows).reshape(b, rows).astype(np.float64)


def _score(value: float, outcomes: ArrayLike, replicates: Floats | None) -> Score:
    each = np.asarray(outcomes, dtype=np.float32)
    return Score(value=value, examples=len(each), outcomes=each, replicates=replicates)


def _finite(name: str, value: float) -> float:
    if not np.isfinite(value):
        raise EvaluationError(f"The metric {name} gave {value}, expected a finite number.")
    return value


def _pick(values: Values, rows: NDArray[np.int64]) -> Values:
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
