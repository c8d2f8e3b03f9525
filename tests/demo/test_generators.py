from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge.demo.data import Row, read_parquet
from hf_merge.demo.generator_data import (
    ANSWER_TOKENS,
    END,
    IGNORED,
    PACK,
    arithmetic,
    make_tokenizer,
    packed,
    python_values,
    translation,
)
from hf_merge.demo.generator_objectives import objectives
from hf_merge.demo.generators import GENERATORS, SCALES, generators
from hf_merge.demo.specialists import FamilyFolder, Task, build_family
from hf_merge.errors import HfMergeError
from hf_merge.evaluation.code import SLOT, run_program
from hf_merge.evaluation.measure import Evaluator
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.rows import load_rows

TASKS = {task.name: task for task in GENERATORS.tasks}
SHORT = replace(GENERATORS, name="short", sizes={"train": 64, "search": 8, "held_out": 8})
OVER_BASE = {"translation": 8.0, "math": 0.15, "code": 0.1}
OVER_OTHERS = {"translation": 1.5, "math": 0.15, "code": 0.1}
OVER_AVERAGE = {"translation": 0.5, "math": 0.15, "code": 0.05}
"""Of chrF, and of shares of right answers: more than three standard errors of a difference but for the last, which says that
something is left to be searched for."""
GRAMMAR = {
    "soon a young pig follows a big woman": "bald verfolgt ein junges Schwein eine große Frau",
    "the new pig loves a quiet dog": "das neue Schwein liebt einen stillen Hund",
    "a fast king buys the woman": "ein schneller König kauft die Frau",
    "a queen finds a small teacher": "eine Königin findet einen kleinen Lehrer",
    "a big woman loves the fast book": "eine große Frau liebt das schnelle Buch",
}

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
every_model = pytest.mark.parametrize("name", ["base", *TASKS])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> FamilyFolder:
    """The family after a few steps of training each: everything is there but knowledge."""
    return build_family(SHORT, tmp_path_factory.mktemp("short"), progress=False)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, float]]:
    """Model -> task -> held-out score of the real family; "average" is the plain average of the specialists."""
    built = build_family(GENERATORS, progress=False)
    evaluator = evaluator_of(built, objectives(built))
    states = {name: load_file(folder / "model.safetensors") for name, folder in folders(built).items()}
    states["average"] = {key: torch.stack([states[name][key] for name in TASKS]).mean(0) for key in states["base"]}
    model = LlamaForCausalLM.from_pretrained(built.base)
    found = {}
    for name, state in states.items():
        model.load_state_dict(state, strict=False)  # the head is tied to the embeddings, so no file has it
        found[name] = {task: score.value for task, score in evaluator.measure(model, "held_out").items()}
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer([*translation(), *arithmetic(), *python_values()])


def folders(built: FamilyFolder) -> dict[str, Path]:
    return {"base": built.base, **built.models}


def evaluator_of(built: FamilyFolder, wanted: list[Objective]) -> Evaluator:
    config = LlamaForCausalLM.from_pretrained(built.base).config
    return Evaluator(
        wanted, tokenizer=PreTrainedTokenizerFast.from_pretrained(built.base), config=config, device="cpu", progress=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".parquet"}


@pytest.mark.parametrize("drawn", [translation, arithmetic, python_values])
def test_rows_are_the_same_each_time(drawn: Callable[[], list[Row]]) -> None:
    assert drawn() == drawn()


@pytest.mark.parametrize("english", GRAMMAR)
def test_a_sentence_has_the_genders_cases_and_order_of_german(english: str) -> None:
    assert Row(f"{english} =>", GRAMMAR[english]) in translation()


@pytest.mark.parametrize("drawn", [arithmetic, python_values])
def test_answers_are_what_python_says(drawn: Callable[[], list[Row]]) -> None:
    wrong = [row for row in drawn() if eval(row.text.rstrip("=")) != eval(row.label)]
    assert not wrong


@every_task
def test_no_prompt_stands_in_two_splits(short: FamilyFolder, task: Task) -> None:
    parts = [{row.text for row in read_parquet(path)} for path in short.data[task.name].values()]
    assert len(set.union(*parts)) == sum(map(len, parts))


@every_task
def test_the_longest_answer_fits(tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    lengths = [len(ids) for ids in tokenizer([row.label for row in task.load_rows()])["input_ids"]]
    assert max(lengths) + 1 <= ANSWER_TOKENS[task.name]


@pytest.mark.parametrize("text", ["Größe 12, ☃ [3,1][0]==", "  two  spaces\n"])
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("2026")["input_ids"]) == 4


def test_the_loss_is_taken_over_answers_and_their_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    _, _, targets = packed(tokenizer, [Row("3+4-0=", "7"), Row("7+6+2=", "15")])
    assert tokenizer.decode(targets[targets != IGNORED]) == f"7{END}15{END}"


def test_a_packed_row_is_read_as_if_it_stood_alone(tokenizer: PreTrainedTokenizerFast, short: FamilyFolder) -> None:
    model = LlamaForCausalLM.from_pretrained(short.base)
    rows = arithmetic()[:2]
    (ids, positions, _), (alone, _, _) = packed(tokenizer, rows), packed(tokenizer, rows[1:])
    assert ids.shape == (1, PACK)
    first, second = (len(tokenizer(row.text + row.label)["input_ids"]) + 1 for row in rows)
    with torch.inference_mode():
        whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, first : first + second]
        single = model(input_ids=alone[:, :second]).logits[0]
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-5)


@every_model
def test_a_model_is_an_ordinary_llama_of_six_layers(short: FamilyFolder, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders(short)[name])
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers == 6
    assert model.num_parameters() < 1.1e6


@every_model
def test_a_model_comes_with_its_tokenizer(short: FamilyFolder, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders(short)[name])
    assert tokenizer.decode(tokenizer("3+4-0=")["input_ids"]) == "3+4-0="
    assert tokenizer.eos_token == END


@every_task
def test_a_specialist_has_the_tensors_of_the_base(short: FamilyFolder, task: Task) -> None:
    base, tuned = (
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (short.base, short.models[task.name])
    )
    assert tuned == base


@every_task
def test_the_card_of_a_specialist_names_license_base_data_and_result(short: FamilyFolder, task: Task) -> None:
    card = ModelCard.load(short.models[task.name] / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "demo/llama-tiny-base"
    assert task.about in card.text
    assert "% of the 8 held-out rows" in card.text


def test_the_card_of_the_base_shows_a_prompt_of_every_task(short: FamilyFolder) -> None:
    card = ModelCard.load(short.base / "README.md")
    assert card.data.license == "apache-2.0"
    assert [line.split(" | ")[0] for line in card.text.splitlines() if "`" in line and line.startswith("|")] == [
        f"| {name}" for name in TASKS
    ]


def test_objectives_search_few_rows_and_hold_out_all(short: FamilyFolder) -> None:
    facts = evaluator_of(short, objectives(short, rows=5)).describe()
    assert {fact["name"]: (fact["metric"], fact["rows_search"], fact["rows_held_out"]) for fact in facts} == {
        "translation": ("chrf", 5, 8),
        "math": ("exact_match", 5, 8),
        "code": ("exact_match", 5, 8),
    }


@pytest.mark.parametrize(("written", "passes"), [("{}", True), ("({})", True), ("[{}]", False), ("", False)])
def test_python_itself_may_judge_the_answers_to_expressions(short: FamilyFolder, written: str, passes: bool) -> None:
    wanted = objectives(short, execute=True)[-1]
    program = (load_rows(wanted)["search"].targets or ())[0]
    label = next(row.label for row in read_parquet(short.data["code"]["search"]))
    assert run_program(program.replace(SLOT, written.format(label))).passed is passes


def test_two_builds_have_the_same_bytes(short: FamilyFolder, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(123)
    try:
        second = build_family(SHORT, tmp_path, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert contents(short.path) == contents(second.path)


def test_a_build_without_progress_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_family(SHORT, tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build it on")
def test_the_larger_family_is_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(HfMergeError, match="trained on a GPU"):
        build_family(generators("generators-large", "small"), tmp_path, progress=False)


def test_the_larger_family_is_another_one() -> None:
    larger = generators("generators-large", "small")
    assert larger.base in SCALES
    assert larger.digest != GENERATORS.digest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_task
def test_a_specialist_beats_the_base_on_its_task(table: dict[str, dict[str, float]], task: Task) -> None:
    assert table[task.name][task.name] > table["base"][task.name] + OVER_BASE[task.name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_task
def test_a_specialist_is_clearly_the_best_on_its_task(table: dict[str, dict[str, float]], task: Task) -> None:
    others = [table[other][task.name] for other in TASKS if other != task.name]
    assert table[task.name][task.name] > max(others) + OVER_OTHERS[task.name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_task
def test_the_average_of_the_specialists_neither_collapses_nor_is_best(table: dict[str, dict[str, float]], task: Task) -> None:
    assert table["base"][task.name] < table["average"][task.name] < table[task.name][task.name] - OVER_AVERAGE[task.name]
