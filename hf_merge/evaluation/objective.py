"""What a merged model is scored on: an objective is a task, its rows, a metric and a direction."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, DatasetDict

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.tasks import CODE_GENERATION, LM_EVAL, LOWER_IS_BETTER, NEEDS_LEAVE, NONE, TASKS, TEXT_CLASSIFICATION
from hf_merge.scores import MAXIMIZE, MINIMIZE
from hf_merge.shown import as_printed

HARNESS_ARGUMENTS = ("num_fewshot", "filter", "chat_template", "system_instruction", "fewshot_as_multiturn")
_POOLING = ("mean", "cls", "last")
_POSITIVE = ("max_new_tokens", "max_length", "batch_size", "limit")


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """One thing to be good at. Checks itself; raises `EvaluationError` with all that is wrong in it.

    Args:
        name: what tables, plots and cards call it; different for every objective of a study.
        dataset: a `Dataset` or `DatasetDict`, a Hub id, a local .json/.jsonl/.csv/.tsv/.parquet file, or a folder of such
            files (each named after its split) or one written by `save_to_disk`.
        task: one of `hf_merge.evaluation.tasks.TASKS`:
            - "text-classification", "image-classification": the class of a row;
            - "token-classification": the tag of each of a list of words (that of the word's first token);
            - "language-modeling": a causal model predicts each next token of the input (rows with fewer than two tokens are
              left out); "fill-mask": a masked model predicts 15 % of its tokens, which a hash of the text chooses;
            - "text-generation": the greedy continuation of the input, or the answer of an encoder-decoder;
            - "multiple-choice": the likeliest of a row's `choices` after the input;
            - "sentence-similarity": the cosine of two texts' embeddings; "text-retrieval": the documents nearest to a query;
            - "code-generation": the program that follows the input, which passes its tests or does not (pass@k; `k`, `seconds`
              and `memory` of a program are `metric_arguments`);
            - "lm-eval": a task of lm-evaluation-harness (see `from_lm_eval`);
            - "none": no data: the metrics size (parameters), delta_norm (sum of absolute differences from the base) and
              latency (seconds a generated token, or a row; measured, so noisy).
        metric: None for the task's own (the first of its `metrics` in `TASKS`); the name of a metric of hf_merge;
            an `evaluate` module (instance); a callable `(predictions=, references=)` that returns a number or a dict; the
            path of a metric script; or the Hub name of one. A metric of classes or choices gets whole numbers: positions in
            `labels`, or else in the model's own list of labels, or among the choices. One of tags gets lists of names, one of
            generated texts texts, one of similarity numbers, one of retrieval lists of documents' names.
        metric_key: which number of a metric's result is the score; needed when there are several.
        metric_arguments: further keyword arguments for the metric's `compute`.
        direction: "maximize" or "minimize"; None takes the metric's own where it is known, else "maximize".
        split: the split that a search looks at. None takes "search", "validation" or "train", whichever comes first.
        held_out: the rows that no search sees: a split's name, a `Dataset`, or a share in (0, 1) of `split` that a hash of
            each row's input sets aside. None takes the split "held_out" or "test", whichever comes first, else 0.5.
        config: the dataset's configuration, as `load_dataset` takes it.
        revision: the dataset's commit or branch on the Hub.
        input: the column that the model reads; a pair of columns for sentence-similarity, one or two for text-classification.
        target: the column with the right answer; not used by language-modeling and fill-mask. Classes and tags are the names of
            labels, or numbers (a `ClassLabel`'s names if the model knows them, else positions in `labels` or in the model's
            labels); the right choice is its position, label, letter or text; relevant documents are one name or a list.
        labels: the only labels among which a class is chosen, for a model whose one head serves several tasks.
        choices: for multiple-choice, the column with each row's choices: a list of texts, or lists of `text` and `label`.
        corpus: for text-retrieval, the documents: a dataset as above with the columns `id` and `text`. None: the targets are
            texts, and the documents are all targets of the split.
        pooling: for embeddings, "mean", "cls" or "last"; None is what the model's checkpoint asks for, else "mean".
        prompt: for generation and multiple-choice, a template such as "Question: {question} Answer:" over the columns; None is
            the input alone.
        max_new_tokens: of a generated continuation.
        speculative: whether greedy answers of causal models are guessed from those of the models measured before, and checked
            in one pass: the same answers, but for rounding, in less time. False generates each token by token.
        smoothed: whether the search sees a smoothed accuracy: rows whose answer is nearly right or wrong count in part
            (`hf_merge.scores.smoothed`), so that fewer rows say as much. Held-out rows are never smoothed.
        max_length: tokens of a row, longer rows are cut (generation keeps a prompt's end). None: what model and tokenizer
            can take, at most 2048.
        batch_size: the most rows that run at once; fewer if rows are long or memory is short. Scores do not depend on it.
        limit: the most rows of either split; which ones stay is decided by a hash of the input.
        task_arguments: of code-generation and lm-eval. For code: `program`, a template over the columns and `{completion}` that
            is run (None is the input, the completion, and the target on a line of its own); `samples` of each prompt (k unless
            given; one is greedy, several are drawn); their `temperature` (0.8); `stops`, texts before which a completion ends.
        allow_code_execution: allows code-generation to run what models write, in a sandbox (`hf_merge.evaluation.code`).
        trust_metric_code: allows a metric from the Hub, which is downloaded Python that runs on this machine.
    """

    name: str
    dataset: Dataset | DatasetDict | str | Path | None = field(default=None, repr=False)
    task: str = TEXT_CLASSIFICATION
    metric: Any = None
    metric_key: str | None = None
    metric_arguments: Mapping[str, Any] = field(default_factory=dict)
    direction: str | None = None
    split: str | None = None
    held_out: str | float | Dataset | None = None
    config: str | None = None
    revision: str | None = None
    input: str | tuple[str, ...] = "text"
    target: str = "label"
    labels: tuple[str, ...] | None = None
    choices: str = "choices"
    corpus: Dataset | DatasetDict | str | Path | None = field(default=None, repr=False)
    pooling: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 64
    speculative: bool = True
    smoothed: bool = False
    max_length: int | None = None
    batch_size: int = 256
    limit: int | None = None
    task_arguments: Mapping[str, Any] = field(default_factory=dict)
    allow_code_execution: bool = False
    trust_metric_code: bool = False

    @classmethod
    def from_lm_eval(cls, task: str | Path, *, name: str | None = None, **settings: Any) -> "Objective":
        """A task of lm-evaluation-harness (extra `lm-eval`), measured by the harness itself on the model in memory.

        Args:
            task: one of the harness's own, such as "gsm8k", or the path of a task's .yaml file.
            name: of the objective; the task's unless given.
            settings: `num_fewshot`, `filter` (which of the task's reads the answers), `chat_template` (True uses it),
                `system_instruction`, `fewshot_as_multiturn`; and of the fields above `metric` (one of the task's; None is its
                first), `direction`, `split` and `held_out` (splits of the task's dataset, or a share of the one that the
                harness evaluates, as a hash of the question deals it out), `limit`, `batch_size` and `max_length`.
        """
        arguments = {key: settings.pop(key) for key in HARNESS_ARGUMENTS if key in settings}
        return cls(name=name or Path(task).stem, dataset=task, task=LM_EVAL, task_arguments=arguments, **settings)

    def __post_init__(self) -> None:
        if self.metric is None and self.task in TASKS and TASKS[self.task].metrics:
            self._set("metric", TASKS[self.task].metrics[0])
        if self.task == CODE_GENERATION and self.allow_code_execution is True:
            self._set("metric_arguments", {**self.metric_arguments, "allow_code_execution": True})
        if self.direction is None:
            self._set("direction", MINIMIZE if {self.metric_name, self.metric_key} & LOWER_IS_BETTER else MAXIMIZE)
        if isinstance(self.input, list):
            self._set("input", tuple(self.input))
        if isinstance(self.labels, list):
            self._set("labels", tuple(self.labels))
        wrong = [*self._wrong_task(), *self._wrong_metric(), *self._wrong_rows()]
        if wrong:
            raise EvaluationError("\n".join(f"Objective {self.name!r}: {problem}" for problem in wrong))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _wrong_task(self) -> Iterable[str]:
        if not isinstance(self.name, str) or not self.name.strip():
            yield f"`name` is a non-empty text, got {self.name!r}."
        if self.task not in TASKS:
            yield unknown("task", self.task, TASKS)
        if self.direction not in (MAXIMIZE, MINIMIZE):
            yield unknown("direction", self.direction, (MAXIMIZE, MINIMIZE))
        for name in _POSITIVE:
            value = getattr(self, name)
            optional = name in ("max_length", "limit")
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                yield f"`{name}` is a positive whole number{' or None' if optional else ''}, got {value!r}."
        if self.task == CODE_GENERATION and self.metric_arguments.get("allow_code_execution") is not True:
            yield NEEDS_LEAVE
        yield from self._wrong_options()

    def _wrong_options(self) -> Iterable[str]:
        for name in ("labels", "corpus", "pooling", "prompt", "smoothed", "task_arguments"):
            if getattr(self, name) not in (None, {}, False) and self.task in TASKS and name not in TASKS[self.task].options:
                belongs = " and ".join(task for task in TASKS if name in TASKS[task].options)
                yield f"`{name}` belongs to {belongs}, and the task is {self.task!r}."
        if self.labels is not None:
            if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
                yield f"`labels` is a list of names, got {self.labels!r}."
            elif len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
                yield f"`labels` holds at least two names, each once, got {self.labels!r}."
        if self.corpus is not None and not isinstance(self.corpus, Dataset | DatasetDict | str | Path):
            yield f"`corpus` is a Dataset, a DatasetDict, a Hub id or a path, got {type(self.corpus).__name__}."
        for name in ("speculative", "smoothed"):
            if not isinstance(getattr(self, name), bool):
                yield f"`{name}` is True or False, got {getattr(self, name)!r}."
        if self.smoothed is True and self.metric != "accuracy":
            yield f"`smoothed` goes with the metric 'accuracy', got {self.metric_name!r}."
        if self.pooling not in (None, *_POOLING):
            yield unknown("pooling", self.pooling, _POOLING)

    def _wrong_metric(self) -> Iterable[str]:
        if not isinstance(self.metric_arguments, Mapping):
            yield f"`metric_arguments` maps names to values, got {self.metric_arguments!r}."
        if isinstance(self.metric, type):
            yield f"`metric` is the class {self.metric.__name__}; give an instance, {self.metric.__name__}()."
            return
        if self.task == LM_EVAL:
            if not isinstance(self.metric, str | None):
                yield f"`metric` of a task of lm-evaluation-harness is the name of one of its own, got {self.metric!r}."
            return
        if self.task in TASKS and self.metric not in (own := TASKS[self.task].metrics):
            if TASKS[self.task].own_metrics:
                yield f"{self.task} is scored by {' or '.join(own)}, got the metric {self.metric_name!r}."
            elif task := next((task for task in TASKS if self.metric in TASKS[task].metrics), None):
                yield f"{self.metric!r} scores {task}; the task {self.task!r} is scored by {', '.join(own)}."
            elif (path := self.metric_path) is not None:
                if not path.exists():
                    yield f"the metric script {str(self.metric)!r} does not exist."
            elif not isinstance(self.metric, str):
                if not callable(self.metric) and not hasattr(self.metric, "compute"):
                    yield f"`metric` is a name, a path, an evaluate module or a callable, got {self.metric!r}."
            elif not self.trust_metric_code:
                yield (
                    f"{unknown('metric', self.metric, own)} A metric of that name on the Hub is downloaded "
                    "Python that would run on this machine: set trust_metric_code=True if that is what you want."
                )

    def _wrong_rows(self) -> Iterable[str]:
        if self.task == NONE:
            if given := [
                name for name in ("dataset", "split", "held_out", "config", "revision", "limit") if getattr(self, name)
            ]:
                yield f"the task 'none' has no data: leave out {', '.join(given)}."
            return
        if not isinstance(self.dataset, Dataset | DatasetDict | str | Path):
            yield f"`dataset` is a Dataset, a DatasetDict, a Hub id or a path, got {type(self.dataset).__name__}."
        if isinstance(self.dataset, Dataset) and self.split is not None:
            yield f"a Dataset has no splits: leave out split={self.split!r}, or give a DatasetDict."
        if isinstance(self.dataset, Dataset) and isinstance(self.held_out, str):
            yield f"a Dataset has no split {self.held_out!r} to hold out: give a Dataset or a share in (0, 1)."
        if isinstance(self.dataset, Dataset | DatasetDict) and (self.config or self.revision):
            yield "`config` and `revision` belong to a dataset that is loaded by name, and this one is in memory."
        if isinstance(self.held_out, str) and self.held_out == self.split:
            yield f"`split` and `held_out` are both {self.split!r}: the held-out rows must be rows that the search never saw."
        elif isinstance(self.held_out, bool) or not isinstance(self.held_out, str | Dataset | float | None):
            yield f"`held_out` is a split's name, a Dataset or a share in (0, 1), got {self.held_out!r}."
        elif isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            yield f"`held_out` as a share lies strictly between 0 and 1, got {self.held_out!r}."
        for name in ("target", "choices"):
            if not isinstance(getattr(self, name), str):
                yield f"`{name}` is a column's name, got {getattr(self, name)!r}."
        if not self.inputs or not all(isinstance(column, str) for column in self.inputs):
            yield f"`input` is a column's name, got {self.input!r}."
        elif self.task in TASKS and not TASKS[self.task].columns[0] <= len(self.inputs) <= TASKS[self.task].columns[1]:
            least, most = TASKS[self.task].columns
            count = {(1, 1): "one column", (2, 2): "a pair of columns"}.get((least, most), "one column or a pair")
            yield f"`input` is {count} for {self.task}, got {self.input!r}."
        try:
            fields = self.prompt_columns
        except (ValueError, TypeError) as error:
            yield f"`prompt` is not a template: {error}."
        else:
            if self.prompt is not None and not all(fields):
                yield f"`prompt` names columns between braces, such as '{{{self.inputs[0]}}}'; got {self.prompt!r}."

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input columns: one, or two for a pair."""
        return self.input if isinstance(self.input, tuple) else (self.input,)

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the prompt's template names, or the input if there is none."""
        if self.prompt is None:
            return self.inputs
        return tuple(name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None)

    @property
    def metric_path(self) -> Path | None:
        """The script or folder of a metric that is a local path; None for every other metric."""
        if isinstance(self.metric, Path):
            return self.metric.expanduser()
        if not isinstance(self.metric, str):
            return None
        path = Path(self.metric).expanduser()
        # A bare name never stands for a folder that happens to lie in the working directory.
        local = (
            self.metric.startswith(("/", "./", "../", "~")) or path.suffix == ".py" or ("/" in self.metric and path.is_dir())
        )
        return path if local else None

    @property
    def metric_name(self) -> str:
        """The metric's name as tables and cards print it."""
        if (path := self.metric_path) is not None:
            return path.stem
        if isinstance(self.metric, str):
            return self.metric.rpartition("/")[2]
        if self.metric is None:
            return "the task's metric"
        return str(getattr(self.metric, "name", None) or getattr(self.metric, "__name__", type(self.metric).__name__))

    @property
    def dataset_label(self) -> str:
        """The dataset as a card prints it: a Hub id with its configuration, or a name that gives away no path."""
        if self.dataset is None:
            return "no data"
        if isinstance(self.dataset, Dataset | DatasetDict):
            first = self.dataset if isinstance(self.dataset, Dataset) else next(iter(self.dataset.values()), None)
            return (first is not None and first.info.dataset_name) or "a dataset in memory"
        local = isinstance(self.dataset, Path) or Path(self.dataset).expanduser().exists()
        label = Path(self.dataset).expanduser().resolve().name if local else str(self.dataset)
        return f"{label} ({self.config})" if self.config else label

    _repr_pretty_ = as_printed

    def __str__(self) -> str:
        if self.dataset is None:
            return f"{self.name}: {self.direction} {self.metric_name}"
        split = f" [{self.split}]" if self.split else ""
        return f"{self.name}: {self.direction} {self.metric_name} of {self.task} on {self.dataset_label}{split}"
