"""What the generative specialists are searched and judged on."""

from collections.abc import Iterable, Sequence

from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge.demo.data import Row
from hf_merge.demo.generator_data import ANSWER_TOKENS, CODE, TRANSLATION
from hf_merge.demo.specialists import Data, FamilyFolder
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.tasks import CODE_GENERATION, TEXT_GENERATION
from hf_merge.scores import Score


def objectives(built: FamilyFolder, *, rows: int = 128, execute: bool = False) -> list[Objective]:
    """What the models of a built family are searched and judged on: chrF of translations, exact answers of the other two.

    Args:
        built: a family of `hf_merge.demo.generators`.
        rows: the most search rows of each task; the held-out rows are all there are.
        execute: whether Python itself judges the answers to Python expressions (`assert EXPRESSION == ANSWER`, in a sandbox).
            It takes longer than comparing texts, and differs only where a right value is written in another way.
    """
    found = []
    for task in built.family.tasks:
        search = built.dataset(task.name, "search")
        search = search.select(range(min(rows, len(search))))
        splits = DatasetDict({"search": search, "held_out": built.dataset(task.name, "held_out")})
        found.append(_objective(task.name, splits, "chrf" if task.name == TRANSLATION else "exact_match", execute))
    return found


def exactly_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Data, tasks: Iterable[str]
) -> dict[str, Score]:
    """The share of held-out rows whose answer is exactly the right one, by task."""
    wanted = [
        _objective(name, DatasetDict({split: _dataset(data[name][split]) for split in ("search", "held_out")}), "exact_match")
        for name in tasks
    ]
    evaluator = Evaluator(wanted, tokenizer=tokenizer, config=model.config, device="cpu", progress=False)
    return evaluator.measure(model, "held_out")


def _objective(task: str, splits: DatasetDict, metric: str, execute: bool = False) -> Objective:
    if execute and task == CODE:
        return Objective(
            name=task,
            dataset=splits,
            task=CODE_GENERATION,
            max_new_tokens=ANSWER_TOKENS[task],
            task_arguments={"program": "assert {text}{completion}\n"},
            allow_code_execution=True,
        )
    return Objective(name=task, dataset=splits, task=TEXT_GENERATION, metric=metric, max_new_tokens=ANSWER_TOKENS[task])


def _dataset(rows: Sequence[Row]) -> Dataset:
    return Dataset.from_dict({"text": [row.text for row in rows], "label": [row.label for row in rows]})
