import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.classes import class_ids
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.rows import Rows, load_rows


def table(*texts, label="yes"):
    return Dataset.from_dict({"text": list(texts), "label": [label] * len(texts)})


def many(count):
    return table(*(f"text {i}" for i in range(count)))


def rows(**fields):
    return load_rows(Objective(**{"name": "o", **fields}))


def texts(part):
    return list(part.inputs[0])


@pytest.mark.parametrize(
    ("names", "search", "held_out"),
    [
        (("train", "validation", "search", "test", "held_out"), "search", "held_out"),
        (("train", "validation", "test"), "validation", "test"),
        (("train", "test"), "train", "test"),
    ],
)
def test_without_names_the_usual_splits_are_taken(names, search, held_out):
    data = DatasetDict({name: table(f"a {name} text") for name in names})
    assert {split: part.label for split, part in rows(dataset=data).items()} == {"search": search, "held_out": held_out}


def test_without_a_second_split_half_of_the_rows_are_set_aside():
    parts = rows(dataset=DatasetDict({"train": many(400)}))
    assert 150 < len(parts["held_out"]) < 250
    assert sorted(texts(parts["search"]) + texts(parts["held_out"])) == sorted(many(400)["text"])


def test_a_share_is_about_that_share_of_the_rows():
    assert len(rows(dataset=many(1000), held_out=0.2)["held_out"]) == pytest.approx(200, abs=50)


def test_which_side_a_row_lands_on_does_not_depend_on_the_other_rows_or_their_order():
    alone = rows(dataset=many(50))
    among = rows(dataset=many(100).shuffle(seed=1))
    assert set(texts(alone["held_out"])) == set(texts(among["held_out"])) & set(many(50)["text"])


def test_a_share_keeps_equal_inputs_on_one_side():
    doubled = table(*(f"text  {i}" for i in range(40)), *(f"text {i} " for i in range(40)))
    parts = rows(dataset=doubled)
    assert len(parts["search"]) + len(parts["held_out"]) == 80


def test_a_dataset_of_its_own_can_be_held_out():
    assert texts(rows(dataset=table("a"), held_out=table("b"))["held_out"]) == ["b"]


def test_an_input_in_both_splits_is_refused_with_a_count_and_an_example():
    data = DatasetDict({"search": table("one", "a  b", "c"), "held_out": table("a b ", "d", "c")})
    with pytest.raises(EvaluationError, match=r"2 inputs stand both in .*search.* and in .*held_out.*'a b'"):
        rows(dataset=data)


def test_the_same_split_for_both_is_refused_also_when_it_is_a_default():
    with pytest.raises(EvaluationError, match="takes the split 'train', and so does `held_out`"):
        rows(dataset=DatasetDict({"train": many(10)}), held_out="train")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "trian"}, "Unknown split of a dataset in memory 'trian'. Did you mean 'train'?"),
        ({"held_out": "tset"}, "Did you mean 'test'?"),
        ({"input": "sentence"}, "Unknown column of train 'sentence'. Known: label, text."),
        ({"target": "answer"}, "Unknown column of train 'answer'"),
        ({"task": "text-generation", "prompt": "{question}?"}, "Unknown column of train 'question'"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(fields, said):
    with pytest.raises(EvaluationError) as caught:
        rows(dataset=DatasetDict({"train": many(4), "test": table("z")}), **fields)
    assert said in str(caught.value)


def test_an_empty_split_is_refused():
    with pytest.raises(EvaluationError, match="held_out has no rows"):
        rows(dataset=DatasetDict({"search": many(2), "held_out": many(0)}))


@pytest.mark.parametrize(("value", "said"), [(None, "holds nothing in row 1"), (7, "holds int 7 in row 1")])
def test_an_input_that_is_not_text_is_refused_with_its_row(value, said):
    column = ["a", None] if value is None else [6, 7]
    said = said if value is None else "holds int 6 in row 0"
    with pytest.raises(EvaluationError, match=said):
        rows(dataset=Dataset.from_dict({"text": column, "label": ["x", "y"]}))


def test_a_limit_keeps_the_same_rows_in_the_datasets_order_whatever_that_order_is():
    straight, shuffled = (
        rows(dataset=data, held_out=table("z"), limit=7)["search"] for data in (many(50), many(50).shuffle(seed=2))
    )
    assert set(texts(straight)) == set(texts(shuffled))
    assert len(straight) == 7
    assert texts(straight) == sorted(texts(straight), key=lambda text: int(text.split()[1]))


def test_a_prompt_is_filled_from_the_columns():
    data = Dataset.from_dict({"q": ["why"], "topic": ["art"], "a": ["so"]})
    other = Dataset.from_dict({"q": ["how"], "topic": ["art"], "a": ["so"]})
    parts = rows(dataset=data, held_out=other, task="text-generation", input="q", target="a", prompt="{topic}: {q}?")
    assert texts(parts["search"]) == ["art: why?"]
    assert parts["search"].targets == ("so",)


def test_a_pair_of_columns_is_read_together_and_told_apart():
    data = Dataset.from_dict({"a": ["x y", "x"], "b": ["z", "y z"], "label": ["p", "q"]})
    part = rows(dataset=data, held_out=data.select([]).add_item({"a": "q", "b": "q", "label": "p"}), input=["a", "b"])["search"]
    assert part.inputs == (("x y", "x"), ("z", "y z"))
    assert len(set(part.identities())) == 2


def test_language_modeling_needs_no_target_and_passes_over_rows_without_text():
    data = DatasetDict({name: Dataset.from_dict({"text": ["", f"{name} text", "  "]}) for name in ("search", "held_out")})
    assert texts(rows(dataset=data, task="language-modeling")["search"]) == ["search text"]


@pytest.mark.parametrize("form", ["json", "csv", "tsv", "parquet"])
def test_a_local_file_is_read(form, tmp_path):
    path = tmp_path / f"rows.{form}"
    write = {"json": Dataset.to_json, "csv": Dataset.to_csv, "tsv": Dataset.to_csv, "parquet": Dataset.to_parquet}[form]
    write(many(20), path, **({"sep": "\t"} if form == "tsv" else {}))
    parts = rows(dataset=str(path))
    assert len(parts["search"]) + len(parts["held_out"]) == 20


def test_the_files_of_a_folder_are_its_splits(tmp_path):
    many(3).to_parquet(tmp_path / "search.parquet")
    table("other").to_parquet(tmp_path / "held_out.parquet")
    assert {split: len(part) for split, part in rows(dataset=tmp_path).items()} == {"search": 3, "held_out": 1}


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    DatasetDict({"search": many(3), "held_out": table("other")}).save_to_disk(tmp_path / "saved")
    assert len(rows(dataset=str(tmp_path / "saved"))["search"]) == 3


@pytest.mark.parametrize("name", ["missing.csv", "./missing", "rows.xlsx"])
def test_a_path_that_cannot_be_read_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(EvaluationError, match=r"does not exist on this machine|cannot be read|can be read"):
        rows(dataset=name)


def test_a_dataset_that_the_hub_does_not_have_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match="'no-such-org/no-such-data' could not be loaded"):
        rows(dataset="no-such-org/no-such-data")


def targets(values, names=None):
    return Rows(label="search", inputs=(("x",) * len(values),), targets=tuple(values), class_names=names)


LABELS = ("NEGATIVE", "POSITIVE", "who")


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        (["POSITIVE", "who"], None, [1, 2]),
        (["positive", "Who"], None, [1, 2]),
        ([2, 0], None, [2, 0]),
        ([0, 1], ("positive", "negative"), [1, 0]),
        ([np.int64(1)], None, [1]),
    ],
)
def test_classes_are_matched_by_name_where_there_is_one_and_else_by_position(values, classes, expected):
    assert class_ids(targets(values, classes), LABELS, positional=False).tolist() == expected


def test_classes_with_names_that_nobody_knows_are_matched_by_position_only_where_that_is_meant():
    given = targets([1, 0], ("bad", "good", "other"))
    assert class_ids(given, LABELS, positional=True).tolist() == [1, 0]
    with pytest.raises(EvaluationError, match="the 3 classes bad, good, other, and none of them is among the 3 labels"):
        class_ids(given, LABELS, positional=False)


def test_names_that_differ_only_in_case_are_not_guessed():
    assert class_ids(targets(["a", "A"]), ("A", "a"), positional=False).tolist() == [1, 0]
    with pytest.raises(EvaluationError, match="hold 'Ab'"):
        class_ids(targets(["Ab"]), ("AB", "ab"), positional=False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["POSITVE"], "hold 'POSITVE', expected one of NEGATIVE, POSITIVE, who or its position. Did you mean 'POSITIVE'?"),
        ([0, 7, 9, 7], "hold 7, 9, expected"),
        ([-1, -1], "A -1 marks a hidden answer"),
        ([None], "Some rows have no answer"),
        ([0.5], "hold 0.5"),
        ([True], "hold True"),
    ],
)
def test_targets_that_are_no_labels_are_listed(values, said):
    with pytest.raises(EvaluationError) as caught:
        class_ids(targets(values), LABELS, positional=False)
    assert said in str(caught.value)


def test_the_names_of_a_class_label_are_read_from_the_dataset():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    assert rows(dataset=data, held_out=table("b"))["search"].class_names == ("no", "yes")


def test_a_dataset_is_read_from_the_hub(hub, tmp_path):
    files = {}
    for split, data in {"train": many(6), "test": table("other")}.items():
        data.to_parquet(tmp_path / "rows.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    hub.seed("demo/rows", files, repo_type="dataset")
    assert {split: len(part) for split, part in rows(dataset="demo/rows").items()} == {"search": 6, "held_out": 1}
