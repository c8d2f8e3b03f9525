import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective

TAGS = ["O", "B-x", "I-x", "B-y", "I-y"]
TASK = {"name": "o", "task": "token-classification", "input": "words", "target": "tags"}


@pytest.fixture
def tagger(make_model):
    return make_model("bert-tagger")


@pytest.fixture
def tagged():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 40)
    words = [[f"w{i}" for i in rng.integers(0, 61, length)] for length in lengths]
    every = Dataset.from_dict({"words": words, "tags": [rng.choice(TAGS, length).tolist() for length in lengths]})
    return DatasetDict({"search": every.select(range(20)), "held_out": every.select(range(20, 40))})


def by_hand(model, tokenizer, rows):
    found = []
    for words in rows["words"]:
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
        with torch.inference_mode():
            found.append([model.config.id2label[i] for i in model(input_ids=ids).logits[0].argmax(-1).tolist()])
    return found


@pytest.mark.parametrize("batch_size", [1, 16])
def test_tag_accuracy_equals_a_plain_loop_over_the_rows(tagger, evaluator, tokenizer, tagged, batch_size):
    right = [
        np.mean([a == b for a, b in zip(*pair, strict=True)])
        for pair in zip(by_hand(tagger, tokenizer, tagged["search"]), tagged["search"]["tags"], strict=True)
    ]
    objective = Objective(dataset=tagged, metric="tag_accuracy", batch_size=batch_size, **TASK)
    score = evaluator(tagger, objective).measure(tagger)["o"]
    assert score.outcomes.tolist() == pytest.approx(right)
    assert 0 < score.value < 1


def test_a_metric_gets_the_names_of_tags_row_by_row(tagger, evaluator, tokenizer, tagged):
    seen = []

    def spy(predictions, references):
        seen.append((predictions, references))
        return 0.0

    evaluator(tagger, Objective(dataset=tagged, metric=spy, **TASK)).measure(tagger)
    assert seen[-1] == (by_hand(tagger, tokenizer, tagged["search"]), tagged["search"]["tags"][:])


def test_perfect_tags_have_an_entity_f1_of_one(tagger, evaluator, tokenizer, tagged):
    search = tagged["search"].remove_columns("tags").add_column("tags", by_hand(tagger, tokenizer, tagged["search"]))
    objective = Objective(dataset=DatasetDict({**tagged, "search": search}), **TASK)
    assert evaluator(tagger, objective).measure(tagger)["o"].value == 1


def test_numbers_of_tags_mean_the_same_as_their_names(tagger, evaluator, tagged):
    names = ["I-x", "O", "B-x", "B-y", "I-y"]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=names))})
    numbered = tagged.map(lambda row: {"tags": [names.index(tag) for tag in row["tags"]]}).cast(features)
    named, other = (
        evaluator(tagger, Objective(dataset=data, **TASK)).measure(tagger)["o"].outcomes for data in (tagged, numbered)
    )
    assert named.tolist() == other.tolist()


def test_a_words_tag_is_that_of_its_first_token_and_words_without_one_are_outside(make_model, evaluator, tokenizer, tagged):
    tagger, seen = make_model("bert-tagger"), []
    rows = Dataset.from_dict({"words": [["w8 w18", " ", "w48"]], "tags": [["O", "O", "O"]]})

    def spy(predictions, references):
        seen.append(predictions)
        return 0.0

    evaluator(
        tagger, Objective(dataset=DatasetDict({"search": rows, "held_out": tagged["search"]}), metric=spy, **TASK)
    ).measure(tagger)
    with torch.inference_mode():
        logits = tagger(input_ids=torch.tensor([tokenizer.convert_tokens_to_ids(["w8", "w18", "w48"])])).logits[0]
    first, second, third = (tagger.config.id2label[i] for i in logits.argmax(-1).tolist())
    assert seen[-1] == [[first, "O", third]]
    assert "O" not in {first, third}
    assert first != second


def test_words_that_are_cut_off_are_outside(tagger, evaluator, tagged):
    seen = []

    def spy(predictions, references):
        seen.append(predictions)
        return 0.0

    evaluator(tagger, Objective(dataset=tagged, metric=spy, max_length=3, **TASK)).measure(tagger)
    assert [len(tags) for tags in seen[-1]] == [len(tags) for tags in tagged["search"]["tags"]]
    assert {tag for tags in seen[-1] for tag in tags[3:]} == {"O"}
    assert {tag for tags in seen[-1] for tag in tags[:3]} != {"O"}


def test_only_the_given_labels_compete(tagger, evaluator, tagged):
    two = tagged.map(lambda row: {"tags": ["B-y" if tag[0] == "B" else "O" for tag in row["tags"]]})
    seen = []

    def spy(predictions, references):
        seen.append(predictions)
        return 0.0

    evaluator(tagger, Objective(dataset=two, metric=spy, labels=("O", "B-y"), **TASK)).measure(tagger)
    assert {tag for tags in seen[-1] for tag in tags} == {"O", "B-y"}


@pytest.mark.parametrize(
    ("words", "tags", "said"),
    [
        (["w1 w2"], [["O"]], "expected a list of words"),
        ([["w1"]], ["O"], "expected a list of tags"),
        ([["w1", "w2"]], [["O"]], "Row 0 of search has 2 words and 1 tags"),
        ([["w1"]], [["B-z"]], "hold 'B-z'"),
        ([[]], [[]], "has no tokens"),
    ],
)
def test_rows_that_cannot_be_tagged_are_refused(tagger, evaluator, tagged, words, tags, said):
    rows = Dataset.from_dict({"words": words, "tags": tags})
    with pytest.raises(EvaluationError, match=said):
        evaluator(tagger, Objective(dataset=DatasetDict({"search": rows, "held_out": tagged["search"]}), **TASK))


@pytest.mark.parametrize(
    ("architecture", "task", "said"),
    [
        (
            "BertForSequenceClassification",
            "token-classification",
            "needs a model …ForTokenClassification, and this one is Bert",
        ),
        ("LlamaForCausalLM", "text-classification", "needs a model …ForSequenceClassification"),
        ("BertForMaskedLM", "language-modeling", "language-modeling needs a model"),
        ("BertModel", "fill-mask", "needs a model …ForMaskedLM"),
    ],
)
def test_a_model_with_another_head_is_refused_before_it_runs(tagger, evaluator, make_data, architecture, task, said):
    tagger.config.architectures = [architecture]
    with pytest.raises(EvaluationError, match=said):
        evaluator(tagger, Objective(name="o", dataset=make_data(), task=task))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "SomethingNew"])
def test_a_model_of_the_right_or_of_an_unknown_head_is_let_pass(make_model, evaluator, make_data, architecture):
    model = make_model("gpt2")
    model.config.architectures = [architecture]
    assert evaluator(model, Objective(name="o", dataset=make_data(shortest=2), task="language-modeling"))


def test_texts_need_a_tokenizer(tagger, evaluator, tagged):
    with pytest.raises(EvaluationError, match="needs the model's tokenizer"):
        evaluator(tagger, Objective(dataset=tagged, **TASK), tokenizer=None)
