import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from sklearn.metrics import f1_score

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.metrics.classes import Accuracy
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.predict import Tokens
from hf_merge.evaluation.runners.classification import Classification
from hf_merge.scores import Score, smoothed


@pytest.fixture
def bert(make_model):
    return make_model("bert")


def predictions(model, tokenizer, rows):
    names = []
    for text in rows["text"]:
        with torch.inference_mode():
            logits = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits
        names.append(model.config.id2label[int(logits.argmax())])
    return names


@pytest.mark.parametrize("split", ["search", "held_out"])
def test_accuracy_is_the_share_of_right_rows_of_the_split_with_outcomes_in_the_datasets_order(
    bert, evaluator, tokenizer, make_data, split
):
    data = make_data()
    right = [a == b for a, b in zip(predictions(bert, tokenizer, data[split]), data[split]["label"], strict=True)]
    assert 0 < sum(right) < len(right)
    score = evaluator(bert, Objective(name="o", dataset=data)).measure(bert, split)["o"]
    assert isinstance(score, Score)
    assert score.value == pytest.approx(np.mean(right))
    assert score.outcomes.tolist() == right
    assert score.outcomes.dtype == np.float32
    assert score.examples == 60
    assert score.seconds > 0


def test_search_rows_are_smoothed_where_that_is_asked_and_held_out_rows_never(bert, evaluator, make_data):
    data = make_data()
    plain, smooth = (evaluator(bert, Objective(name="o", dataset=data, smoothed=on)) for on in (False, True))
    assert (plain.smoothed, smooth.smoothed) == (frozenset(), {"o"})
    assert (plain.describe()[0]["smoothed"], smooth.describe()[0]["smoothed"]) == (False, True)
    exact, found = plain.measure(bert)["o"], smooth.measure(bert)["o"]
    assert found.margins.tolist() == exact.margins.tolist()
    assert found.outcomes == pytest.approx(smoothed(exact.margins), abs=1e-6)
    assert found.value == pytest.approx(smoothed(exact.margins).mean())
    assert ((found.outcomes > 0.5) == exact.outcomes).all()
    assert found.value != exact.value
    [*_, last] = smooth.rounds(bert)
    assert last["o"].value == pytest.approx(found.value)
    kept = [each.measure(bert, "held_out", replicates=5)["o"] for each in (plain, smooth)]
    assert kept[0].value == kept[1].value
    assert kept[0].outcomes.tolist() == kept[1].outcomes.tolist()
    assert kept[0].replicates.tolist() == kept[1].replicates.tolist()


def test_every_objective_is_scored_under_its_name(bert, evaluator, tokenizer, make_data):
    data = make_data()
    objectives = (
        Objective(name="a", dataset=data),
        Objective(name="b", dataset=data, metric="f1"),
        Objective(name="c", dataset=make_data(seed=1)),
    )
    scores = evaluator(bert, *objectives).measure(bert)
    assert list(scores) == ["a", "b", "c"]
    expected = f1_score(data["search"]["label"], predictions(bert, tokenizer, data["search"]), average="macro")
    assert scores["b"].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "bert"),
        ({"task": "language-modeling"}, "llama"),
        ({"task": "language-modeling", "metric": "token_accuracy"}, "gpt2"),
        ({"task": "text-generation", "metric": "chrf", "max_new_tokens": 4}, "llama"),
        ({"task": "text-generation", "metric": "rouge", "max_new_tokens": 4}, "t5"),
    ],
)
def test_scores_do_not_depend_on_the_batch_size(make_model, evaluator, make_data, fields, architecture):
    model, data = make_model(architecture), make_data(30, shortest=2)
    few, many = (
        evaluator(model, Objective(name="o", dataset=data, batch_size=size, **fields)).measure(model)["o"] for size in (1, 32)
    )
    assert few.value == pytest.approx(many.value, rel=1e-5)
    assert few.outcomes.tolist() == pytest.approx(many.outcomes.tolist(), rel=1e-4)


def test_labels_restrict_the_classes_and_number_them_for_the_metric(bert, evaluator, make_data, tokenizer):
    data, seen = make_data(labels=("when", "who")), []

    def spy(predictions, references):
        seen.append((predictions, references))
        return float((predictions == references).mean())

    score = evaluator(bert, Objective(name="o", dataset=data, metric=spy, labels=("when", "who"))).measure(bert)["o"]
    given, wanted = seen[-1]
    assert wanted.tolist() == [("when", "who").index(label) for label in data["search"]["label"]]
    assert set(given) == {0, 1}
    tokens = Tokens(ids=tuple(np.array(tokenizer(text)["input_ids"]) for text in data["search"]["text"]))
    runner = Classification(tokens, classes=(4, 2), pad_id=0, batch_size=9)
    assert given.tolist() == runner.answers(runner(bert)).tolist()
    assert score.value == (given == wanted).mean()


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (ClassLabel(names=["who", "when"]), None),
        (ClassLabel(names=["first", "second"]), ["who", "when"]),
        (None, ["who", "when"]),
    ],
    ids=["names of the dataset", "positions of a ClassLabel", "positions"],
)
def test_numbers_mean_the_same_classes_as_names(bert, evaluator, make_data, column, labels):
    named = make_data(labels=("who", "when"))
    numbered = named.map(lambda row: {"label": ("who", "when").index(row["label"])})
    if column is not None:
        numbered = numbered.cast_column("label", column)
    scores = [
        evaluator(bert, Objective(name="o", dataset=data, labels=given)).measure(bert)["o"]
        for data, given in ((named, labels), (numbered, labels))
    ]
    assert scores[0].outcomes.tolist() == scores[1].outcomes.tolist()


def test_class_numbers_fit_a_model_without_named_labels(make_model, evaluator, make_data):
    placeholders = {"id2label": {i: f"LABEL_{i}" for i in range(2)}, "label2id": {f"LABEL_{i}": i for i in range(2)}}
    model = make_model("bert", **placeholders)
    data = make_data(labels=(0, 1)).cast_column("label", ClassLabel(names=["bad", "good"]))
    assert 0 < evaluator(model, Objective(name="o", dataset=data)).measure(model)["o"].value < 1


def test_a_pair_of_columns_is_classified_as_the_tokenizer_pairs_them(bert, evaluator, make_data, tokenizer):
    data = DatasetDict({split: part.add_column("other", part["text"][::-1]) for split, part in make_data(30).items()})
    data = data.map(lambda row: {name: " ".join(row[name].split()[:20]) for name in ("text", "other")})
    right = []
    for row in data["search"]:
        with torch.inference_mode():
            logits = bert(**tokenizer(row["text"], row["other"], return_tensors="pt")).logits
        right.append(bert.config.id2label[int(logits.argmax())] == row["label"])
    score = evaluator(bert, Objective(name="o", dataset=data, input=("text", "other"))).measure(bert)["o"]
    assert score.outcomes.tolist() == right


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexity_equals_a_plain_loop_over_the_rows(make_model, evaluator, make_data, tokenizer, architecture):
    model, data = make_model(architecture), make_data(25, shortest=2)
    total, tokens, means = 0.0, 0, []
    for text in data["search"]["text"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            means.append(model(input_ids=ids, labels=ids).loss.item())
        tokens += ids.shape[1] - 1
        total += means[-1] * (ids.shape[1] - 1)
    score = evaluator(model, Objective(name="o", dataset=data, task="language-modeling")).measure(model)["o"]
    assert score.value == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert score.outcomes.tolist() == pytest.approx(means, rel=1e-4)


def test_long_rows_are_cut_and_rows_with_nothing_to_predict_left_out(make_model, evaluator, make_data):
    model = make_model("llama")
    data = make_data(20, shortest=2)
    cut = data.map(lambda row: {"text": " ".join(row["text"].split()[:5])})
    cut["search"] = cut["search"].add_item({"text": "w1", "label": "pos"})
    task = {"name": "o", "task": "language-modeling"}
    whole = evaluator(model, Objective(dataset=data, max_length=5, **task)).measure(model)["o"]
    short = evaluator(model, Objective(dataset=cut, **task)).measure(model)["o"]
    assert short.value == pytest.approx(whole.value)
    assert short.examples == 20


def test_a_generated_text_is_compared_with_the_target(make_model, evaluator, make_data):
    model, texts = make_model("llama"), []

    def spy(predictions, references):
        texts.append(predictions)
        return 0.0

    data = make_data(20)
    task = {"task": "text-generation", "prompt": "w3 {text} w5", "max_new_tokens": 3}
    evaluator(model, Objective(name="o", dataset=data, metric=spy, **task)).measure(model)
    answered = [text if i % 2 else "w0 w0 w0 w0" for i, text in enumerate(texts[-1])]
    data["search"] = data["search"].remove_columns("label").add_column("label", answered)
    score = evaluator(model, Objective(name="o", dataset=data, **task)).measure(model)["o"]
    assert (score.value, score.outcomes.tolist()) == (0.5, [0, 1] * 10)


def test_a_prompt_that_is_too_long_loses_its_start(make_model, evaluator, make_data):
    model, seen = make_model("llama"), []

    def spy(predictions, references):
        seen.append(predictions)
        return 0.0

    data = make_data(10, shortest=20)
    cut = data.map(lambda row: {"text": " ".join(row["text"].split()[-8:])})
    for rows in (data, cut):
        task = {"task": "text-generation", "max_new_tokens": 4, "max_length": 8, "metric": spy}
        evaluator(model, Objective(name="o", dataset=rows, **task)).measure(model)
    assert seen[-1] == seen[2]
    assert len(set(seen[-1])) > 1


def test_replicates_are_paired_between_models(make_model, evaluator, make_data):
    one, two = make_model("bert"), make_model("bert", seed=1)
    measuring = evaluator(one, Objective(name="o", dataset=make_data()))
    first, again, other = (measuring.measure(model, replicates=300)["o"] for model in (one, one, two))
    assert (first.replicates - again.replicates == 0).all()
    difference = first.outcomes - other.outcomes
    assert (first.replicates - other.replicates).std() == pytest.approx(difference.std() / math.sqrt(60), rel=0.2)


def test_replicates_hang_on_the_seed_the_split_and_the_objectives_name_alone(bert, evaluator, make_data):
    data = make_data()
    objectives = [Objective(name=name, dataset=data) for name in "ab"]
    one = evaluator(bert, *objectives).measure(bert, replicates=50)
    again = evaluator(bert, *reversed(objectives)).measure(bert, replicates=50)
    seeded = evaluator(bert, *objectives, seed=1).measure(bert, replicates=50)
    assert one["a"].replicates.tolist() == again["a"].replicates.tolist()
    assert one["a"].replicates.tolist() != one["b"].replicates.tolist()
    assert one["a"].replicates.tolist() != seeded["a"].replicates.tolist()


def test_the_replicates_have_the_spread_of_the_score(bert, evaluator, make_data):
    score = evaluator(bert, Objective(name="o", dataset=make_data(200))).measure(bert, replicates=2000)["o"]
    assert score.replicates.mean() == pytest.approx(score.value, abs=0.005)
    assert score.replicates.std() == pytest.approx(score.outcomes.std() / math.sqrt(200), rel=0.1)


def test_perplexity_is_bootstrapped_over_rows(make_model, evaluator, make_data):
    model = make_model("llama")
    score = evaluator(model, Objective(name="o", dataset=make_data(40, shortest=2), task="language-modeling")).measure(
        model, replicates=500
    )["o"]
    low, high = score.interval
    assert low < score.value < high


def test_directions_are_listed_in_order(make_model, evaluator, make_data):
    data = make_data(20, shortest=2)
    objectives = (
        Objective(name="ppl", dataset=data, task="language-modeling"),
        Objective(name="hits", dataset=data, task="language-modeling", metric="token_accuracy"),
    )
    assert list(evaluator(make_model("gpt2"), *objectives).directions.items()) == [("ppl", "minimize"), ("hits", "maximize")]


def fingerprint(evaluator, model, data, **fields):
    return evaluator(model, Objective(**{"name": "o", "dataset": data, **fields})).fingerprint


def test_a_fingerprint_hangs_on_contents_and_not_on_their_place(bert, evaluator, make_data, tmp_path):
    data = make_data()
    data.save_to_disk(tmp_path / "a")
    assert fingerprint(evaluator, bert, data) == fingerprint(evaluator, bert, tmp_path / "a")
    assert fingerprint(evaluator, bert, data) == fingerprint(evaluator, bert, data, batch_size=3)
    assert len(fingerprint(evaluator, bert, data)) == 32


@pytest.mark.parametrize(
    "fields",
    [
        {"metric": "f1"},
        {"labels": ("when", "where", "who", "neg", "pos")},
        {"max_length": 7},
        {"limit": 50},
        {"name": "p"},
        {"direction": "minimize"},
        {"smoothed": True},
        {"metric": "f1", "metric_arguments": {"average": "micro"}},
    ],
    ids=str,
)
def test_a_fingerprint_changes_with_what_changes_scores(bert, evaluator, make_data, fields):
    data = make_data()
    base = {"metric": "f1"} if "metric_arguments" in fields else {}
    assert fingerprint(evaluator, bert, data, **base) != fingerprint(evaluator, bert, data, **fields)


@pytest.mark.parametrize("split", ["search", "held_out"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_fingerprint_changes_with_one_row_of_either_split(bert, evaluator, make_data, split, column):
    data = make_data()
    rows = data[split].to_list()
    rows[3][column] = "w9 w9 w9 w9" if column == "text" else "neg" if rows[3]["label"] == "pos" else "pos"
    changed = DatasetDict({**data, split: Dataset.from_list(rows)})
    assert fingerprint(evaluator, bert, data) != fingerprint(evaluator, bert, changed)


def test_a_description_holds_the_facts_of_a_card(bert, evaluator, make_data):
    labels = ("who", "pos", "neg", "when", "where")
    [facts] = evaluator(bert, Objective(name="o", dataset=make_data(30), limit=20, labels=labels)).describe()
    assert facts["metric"] == "accuracy"
    assert facts["implementation"] == "hf_merge accuracy"
    assert (facts["split"], facts["held_out"]) == ("search", "held_out")
    assert (facts["rows_search"], facts["rows_held_out"]) == (20, 20)
    assert facts["labels"] == list(labels)
    assert facts["max_length"] == 48


def test_no_objectives_are_refused(bert, evaluator):
    with pytest.raises(EvaluationError, match="at least one"):
        evaluator(bert)


def test_all_that_is_wrong_is_said_at_once_before_a_model_runs(bert, evaluator, make_data):
    data = make_data()
    with pytest.raises(EvaluationError) as caught:
        evaluator(
            bert,
            Objective(name="a", dataset=data, input="sentence"),
            Objective(name="a", dataset=data, labels=("pos", "nge")),
            Objective(name="b", dataset=make_data(labels=("pos", "unheard"))),
            Objective(name="c", dataset=data, metric="f1", metric_arguments={"average": "makro"}),
            Objective(name="d", dataset=data, metric=lambda predictions, references: {"x": 1, "y": 2}),
            Objective(name="e", dataset=data, max_length=1000),
            Objective(name="f", dataset=data, task="text-generation", max_new_tokens=48),
            Objective(name="g", dataset=DatasetDict({"search": data["search"], "held_out": data["search"]})),
        )
    said = str(caught.value)
    for part in (
        "distinct names, and these stand for several: 'a'",
        "Objective 'a': Unknown column of search 'sentence'. Known: label, text.",
        "Unknown label 'nge'. Did you mean 'neg'?",
        "Objective 'b': The targets of search hold 'unheard'",
        "Objective 'c': Unknown average of f1 'makro'",
        "Objective 'd': The metric <lambda> gives several numbers: say which as metric_key: x, y",
        "Objective 'e': max_length=1000 is more than the 48 tokens",
        "Objective 'f': max_new_tokens=48 leaves no room for a prompt",
        "Objective 'g': 60 inputs stand both",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("architecture", "config", "fields", "said"),
    [
        ("t5", {}, {"task": "language-modeling"}, "has an encoder and a decoder"),
        ("bert", {"id2label": {0: "score"}, "label2id": {"score": 0}}, {}, "at least two labels; the model has score"),
        ("bert", {"vocab_size": 20}, {}, "and the model knows 20: they do not fit"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused(make_model, evaluator, make_data, architecture, config, fields, said):
    with pytest.raises(EvaluationError, match=said):
        evaluator(make_model(architecture, **config), Objective(name="o", dataset=make_data(), **fields))


@pytest.mark.parametrize(
    ("task", "said"), [("text-classification", "row 1, '', has no tokens"), ("language-modeling", "no row has two")]
)
def test_rows_without_tokens_are_refused(make_model, evaluator, task, said):
    texts = ["w1", ""] if task == "text-classification" else ["w1", "w2"]
    data = Dataset.from_dict({"text": texts, "label": ["pos", "neg"]})
    other = Dataset.from_dict({"text": ["w3 w4"], "label": ["pos"]})
    model = make_model("bert" if task == "text-classification" else "gpt2")
    with pytest.raises(EvaluationError, match=said):
        evaluator(model, Objective(name="o", dataset=data, held_out=other, task=task))


def test_a_model_with_other_labels_is_refused(bert, evaluator, make_model, make_data):
    swapped = make_model("bert", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    with pytest.raises(EvaluationError, match=r"The model's labels are neg, pos, and .* the labels pos, neg, who"):
        evaluator(bert, Objective(name="o", dataset=make_data())).measure(swapped)


def test_a_split_that_does_not_exist_is_refused(bert, evaluator, make_data):
    with pytest.raises(EvaluationError, match="Did you mean 'held_out'"):
        evaluator(bert, Objective(name="o", dataset=make_data())).measure(bert, "heldout")


def test_a_failure_names_the_objective_and_the_split(bert, evaluator, make_data):
    def undefined(predictions, references):
        return float("nan")

    with pytest.raises(EvaluationError, match="Objective 'o' on held_out: The metric undefined gave nan"):
        evaluator(bert, Objective(name="o", dataset=make_data(), metric=undefined)).measure(bert, "held_out")


def test_nothing_of_a_model_is_changed(bert, evaluator, make_data):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    config = bert.config.to_dict()
    evaluator(bert, Objective(name="o", dataset=make_data(), metric=Accuracy())).measure(bert, replicates=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in bert.state_dict().items())
    assert bert.config.to_dict() == config
    assert not any(parameter.is_inference() for parameter in bert.parameters())
