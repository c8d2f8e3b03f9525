"""Tasks of lm-evaluation-harness as objectives: its prompts, answers and metrics, our rows, splits, outcomes and intervals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_merge.errors import EvaluationError, unknown
from hf_merge.evaluation.loaded_metric import LoadedMetric
from hf_merge.evaluation.metrics.summed import Floats, Share, Values, counted
from hf_merge.evaluation.objective import HARNESS_ARGUMENTS, Objective
from hf_merge.evaluation.predict import LOGITS
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import HELD_OUT, SEARCH, Rows, deal
from hf_merge.evaluation.runners.harness import HarnessRunner, plain, quiet
from hf_merge.scores import MAXIMIZE, MINIMIZE, Score

_FEWSHOT_SEED = 1234  # the harness's own

# An extra: everything else here works without it.
_FOUND = find_spec("lm_eval") is not None
_TASKS: Any = import_module("lm_eval.tasks") if _FOUND else None
_API: Any = import_module("lm_eval.api.task") if _FOUND else None
_METRICS: Any = import_module("lm_eval.api.registry") if _FOUND else None
_ELSEWHERE = frozenset(("dataset_path", "dataset_name", "dataset_kwargs", "metadata"))  # where a task's data and file are


@dataclass(frozen=True, kw_only=True, eq=False)
class HarnessMetric(LoadedMetric):
    """How the harness aggregates its numbers of single rows. An outcome is a row's own number, or else what the aggregation
    makes of that row alone (1 or 0 for a right or wrong class)."""

    def measure(self, predictions: Values, references: Values, *, replicates: int, seed: Sequence[int]) -> Score:
        """The score over these rows; see `LoadedMetric.measure`."""
        score = super().measure(predictions, references, replicates=replicates, seed=seed)
        if isinstance(self.function, _Mean):
            return score
        return replace(score, outcomes=np.array([self._alone(value) for value in predictions], dtype=np.float32))

    def _alone(self, value: Any) -> float:
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, int | np.integer) for part in value):
            return float(value[0] == value[1])
        if isinstance(value, int | float | np.number):
            return float(value)
        return self.number([value], [None])


class _Mean(Share):
    key, about = "mean", "The mean of the predictions."

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        return counted(predictions)


class Harness:
    """A task of the harness, open: its rows, dealt out to the search and to what no search sees, its metric, its runners.

    `objective.dataset` names it: one of the harness's own tasks, or a task's YAML file. The rows are those of the split that
    the harness evaluates (test, or else validation), of which `held_out` sets a share aside by a hash of the question (a half,
    unless given); or `split` and `held_out` name splits of the task's dataset. Examples in prompts are never held-out rows.

    Raises:
        EvaluationError: the harness is not installed; the task, its data, the metric, the filter or an argument does not exist;
            the task runs what models write; or as `load_rows` would.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective, self._task = objective, _open(str(objective.dataset))
        self._arguments = dict(objective.task_arguments)
        for name in self._arguments:
            if name not in HARNESS_ARGUMENTS:
                raise EvaluationError(unknown("task argument of lm-eval", name, HARNESS_ARGUMENTS))
        if (shots := self._arguments.get("num_fewshot")) is not None:
            self._task.set_config("num_fewshot", shots)
        self.filter = _chosen("filter", self._arguments.get("filter"), [f.name for f in self._task._filters])
        higher = self._task.higher_is_better()
        self._metric = _chosen("metric", objective.metric, list(higher))
        direction = MAXIMIZE if higher[self._metric] else MINIMIZE
        if objective.direction != direction:
            raise EvaluationError(f"The harness says to {direction} {self._metric}: set direction={direction!r}.")
        self._docs, self.rows = self._deal()

    @property
    def metric(self) -> LoadedMetric:
        """The task's metric, ready to score what a runner gives."""
        aggregation = self._task.aggregation()[self._metric]
        mean = aggregation is _METRICS.get_aggregation("mean")
        made = version("lm_eval")
        config = {key: value for key, value in self._task.dump_config().items() if key not in _ELSEWHERE}
        return HarnessMetric(
            name=self._metric,
            implementation=f"lm-evaluation-harness {made}, task {self._task.config.task}, filter {self.filter}",
            identity=json.dumps([made, self._metric, self.filter, config], default=plain, sort_keys=True),
            function=_Mean() if mean else _Aggregation(aggregation),
            key=None,
            arguments={},
        )

    def part(self, split: str, reader: Reader) -> Part:
        """The rows of "search" or "held_out", ready to run; a reference is a row as the task's data has it, in JSON."""
        rows, objective = self.rows[split], self._objective
        docs = [self._docs[split][i] for i in rows.targets or ()]
        self._task.set_config("test_split", self._splits[split])  # a row of this split is no example for itself
        self._task.set_fewshot_seed(_FEWSHOT_SEED)
        requests = [self._requests(i, doc, reader.texts) for i, doc in enumerate(docs)]
        runner = HarnessRunner(
            requests,
            self._judge,
            self._task._filters,
            tokenizer=reader.texts,
            batch_size=_batch_size(requests, objective, reader),
            max_length=objective.max_length,
        )
        references = [json.dumps(doc, sort_keys=True, default=plain) for doc in docs]
        return Part(label=rows.label, runner=runner, references=references, max_length=objective.max_length)

    def _deal(self) -> tuple[dict[str, Sequence[dict[str, Any]]], dict[str, Rows]]:
        objective, own = self._objective, self._task.config.test_split or self._task.config.validation_split
        search, held_out = objective.split or own, objective.held_out
        if isinstance(held_out, Dataset):
            raise EvaluationError("`held_out` of a task of the harness is a split's name or a share in (0, 1), not a Dataset.")
        share = 0.5 if held_out is None else held_out
        self._splits = {SEARCH: search, HELD_OUT: share if isinstance(share, str) else search}
        docs = {split: self._read(name) for split, name in self._splits.items()}
        rows = {
            split: Rows(label=self._splits[split], inputs=(tuple(map(self._question, part)),), targets=tuple(range(len(part))))
            for split, part in docs.items()
        }
        dealt = deal(rows[SEARCH], rows[HELD_OUT] if isinstance(share, str) else share, objective.limit)
        hidden = set(dealt[HELD_OUT].identities())
        if (sampler := getattr(self._task, "sampler", None)) is not None:
            keys = Rows(label="examples", inputs=(tuple(map(self._question, sampler.df)),), targets=None).identities()
            sampler.replace_df([doc for doc, key in zip(sampler.df, keys, strict=True) if key not in hidden])
        return docs, dealt

    def _read(self, split: str) -> Sequence[dict[str, Any]]:
        data = self._task.dataset
        if split not in data:
            raise EvaluationError(unknown(f"split of {self._task.config.task}", split, data))
        process = self._task.config.process_docs
        return list(data[split] if process is None else process(data[split]))

    def _question(self, doc: dict[str, Any]) -> str:
        """What makes a row that row: its question, or else all of it (some tasks have none, or only the choices differ)."""
        text = self._task.doc_to_text(doc)
        return text if isinstance(text, str) and text.strip() else json.dumps(doc, sort_keys=True, default=plain)

    def _requests(self, number: int, doc: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        task, chat = self._task, bool(self._arguments.get("chat_template"))

        def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            system_instruction=self._arguments.get("system_instruction"),
            apply_chat_template=chat,
            fewshot_as_multiturn=bool(self._arguments.get("fewshot_as_multiturn", chat)),
            chat_template=template if chat else None,
            gen_prefix=task.doc_to_prefix(doc),
        )
        made = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(task.config.task, number, task.config.repeats),
            apply_chat_template=chat,
            chat_template=template if chat else None,
        )
        return made if isinstance(made, list) else [made]

    def _judge(self, requests: Sequence[Any]) -> Any:
        """The metric's number (or what its aggregation takes) of one row, from its answered requests."""
        answers = [request.filtered_resps[self.filter] for request in sorted(requests, key=lambda request: request.idx)]
        found = self._task.process_results(requests[0].doc, answers)
        if self._metric not in found:
            raise EvaluationError(unknown("metric of the task", self._metric, found))
        return found[self._metric]


@dataclass(frozen=True)
class _Aggregation:
    """An aggregation of the harness in the shape of a metric."""

    aggregate: Callable[[list[Any]], float]

    def __call__(self, *, predictions: Values, references: Values) -> float:
        return float(self.aggregate(list(predictions)))


def _open(name: str) -> Any:
    if not _FOUND:
        raise EvaluationError("Tasks of lm-evaluation-harness need it: pip install 'hf_merge[lm-eval]'.")
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise EvaluationError(f"The task file {name!r} does not exist.")
        manager, spec = _manager(False), str(path)
    else:
        manager, spec = _manager(True), name
        if name not in manager.all_subtasks:
            raise EvaluationError(_unknown_task(name, manager))
    # The harness raises whatever its loader, Jinja, datasets or a task's own functions raise.
    try:
        with quiet():
            task = next(iter(manager.load([spec])["tasks"].values()))
    except Exception as error:
        raise EvaluationError(f"The task {name!r} could not be opened: {type(error).__name__}: {error}") from error
    if not isinstance(task, _API.ConfigurableTask):
        raise EvaluationError(f"The task {name!r} is Python of its own; only tasks that a YAML file describes can be run.")
    if task.config.unsafe_code:
        raise EvaluationError(f"The task {name!r} runs what models write without a sandbox: use the task code-generation.")
    return task


@lru_cache(maxsize=2)
def _manager(everything: bool) -> Any:
    """The harness's index of tasks: its own, which takes seconds to read, or none."""
    return _TASKS.TaskManager(include_defaults=everything)


def _batch_size(requests: Sequence[Sequence[Any]], objective: Objective, reader: Reader) -> int:
    """The most requests at once: no more than the objective says, and than keep a batch's logits within memory."""
    texts = ["".join(arg for arg in request.args if isinstance(arg, str)) for row in requests for request in row]
    longest = max(map(len, reader.texts(texts, return_attention_mask=False, verbose=False)["input_ids"]))
    most = objective.max_length or getattr(reader.config.get_text_config(), "max_position_embeddings", None) or longest
    return max(1, min(objective.batch_size, LOGITS // (min(longest, most) * (reader.vocabulary or len(reader.texts)))))


def _chosen(kind: str, given: str | None, known: Sequence[str]) -> str:
    if given is not None and given not in known:
        raise EvaluationError(unknown(f"{kind} of the task", given, known))
    return given or known[0]


def _unknown_task(name: str, manager: Any) -> str:
    if name in manager.all_tasks:
        return f"{name!r} is a group of tasks of lm-evaluation-harness. Give each of its tasks as an objective of its own."
    close = get_close_matches(name, manager.all_subtasks, n=3)
    hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
    return f"lm-evaluation-harness has no task {name!r}.{hint} A task of your own is the path of its .yaml file."
