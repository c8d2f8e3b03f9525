import pytest
from datasets import ClassLabel, Dataset

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.columns import read_choices

FOUR = [["red", "green", "blue", "pink"]] * 3
LABELLED = [{"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}] * 3


def read(choices, answers, feature=None):
    data = Dataset.from_dict({"choices": choices, "answer": answers})
    if feature is not None:
        data = data.cast_column("answer", feature)
    return read_choices(data, "choices", "answer", "search")


@pytest.mark.parametrize(
    ("choices", "answers", "feature"),
    [
        (FOUR, [0, 3, 1], None),
        (FOUR, [0, 3, 1], ClassLabel(names=["A", "B", "C", "D"])),
        (FOUR, ["0", "3", "1"], None),
        (FOUR, ["A", "D", "B"], None),
        (FOUR, ["red", " pink", "green"], None),
        ([["3", "5", "7", "8"]] * 3, ["3", "8", "5"], None),
    ],
)
def test_the_right_choice_is_told_by_position_letter_or_text(choices, answers, feature):
    assert read(choices, answers, feature)[1] == (0, 3, 1)


def test_the_right_choice_may_be_told_by_its_label():
    texts, right = read(LABELLED, ["1", "3", "2"])
    assert right == (0, 2, 1)
    assert texts[0] == ("red", "green", "blue")


@pytest.mark.parametrize(
    ("choices", "answers", "said"),
    [
        (FOUR, ["red", "A", "B"], "is not the position, the label or the text of a choice"),
        (FOUR, [0, 1, 4], "row 2 has 4"),
        (FOUR, [0, 1, -1], "row 2 has -1"),
        ([["1", "0"]] * 2, ["1", "0"], "can be read in several ways"),
        ([["one"]], [0], "expected at least two texts"),
        ([["one", " "]], [0], "none of them empty"),
        (["one"], [0], "holds str 'one' in row 0"),
    ],
)
def test_choices_that_cannot_be_read_are_refused(choices, answers, said):
    with pytest.raises(EvaluationError, match=said):
        read(choices, answers)
