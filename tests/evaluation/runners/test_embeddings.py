import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from scipy.stats import pearsonr, spearmanr

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.runners.embeddings import stated_pooling

SIMILARITY = {"name": "o", "task": "sentence-similarity", "input": ("text", "other"), "target": "gold"}
RETRIEVAL = {"name": "o", "task": "text-retrieval", "target": "relevant"}


def words(rng):
    return " ".join(f"w{i}" for i in rng.integers(0, 61, rng.integers(1, 25)))


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    every = Dataset.from_dict(
        {
            "text": [words(rng) for _ in range(60)],
            "other": [words(rng) for _ in range(60)],
            "gold": rng.normal(size=60).tolist(),
        }
    )
    return DatasetDict({"search": every.select(range(30)), "held_out": every.select(range(30, 60))})


@pytest.fixture
def corpus():
    rng = np.random.default_rng(1)
    return Dataset.from_dict({"id": list(range(25)), "text": [words(rng) for _ in range(25)]})


@pytest.fixture
def queries():
    rng = np.random.default_rng(2)
    relevant = [rng.choice(25, rng.integers(1, 4), replace=False).tolist() for _ in range(40)]
    every = Dataset.from_dict({"text": [words(rng) for _ in range(40)], "relevant": relevant})
    return DatasetDict({"search": every.select(range(20)), "held_out": every.select(range(20, 40))})


def embed(model, tokenizer, text, pooling="mean"):
    body = model.encoder if model.config.is_encoder_decoder else model
    with torch.inference_mode():
        hidden = body(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].double().numpy()
    return vector / np.linalg.norm(vector)


def cosines(model, tokenizer, rows, pooling="mean"):
    pairs = zip(rows["text"], rows["other"], strict=True)
    return [embed(model, tokenizer, a, pooling) @ embed(model, tokenizer, b, pooling) for a, b in pairs]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize(("metric", "reference"), [("spearman", spearmanr), ("pearson", pearsonr)])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_similarity_correlates_as_by_a_plain_loop(
    make_model, evaluator, tokenizer, pairs, pooling, metric, reference, batch_size
):
    model = make_model("bert-body")
    expected = reference(cosines(model, tokenizer, pairs["search"], pooling), pairs["search"]["gold"]).statistic
    objective = Objective(dataset=pairs, metric=metric, pooling=pooling, batch_size=batch_size, **SIMILARITY)
    assert evaluator(model, objective).measure(model)["o"].value == pytest.approx(expected, abs=1e-4)


def test_the_encoder_of_an_encoder_decoder_embeds(make_model, evaluator, tokenizer, pairs):
    model = make_model("t5")
    expected = pearsonr(cosines(model, tokenizer, pairs["search"]), pairs["search"]["gold"]).statistic
    objective = Objective(dataset=pairs, metric="pearson", **SIMILARITY)
    assert evaluator(model, objective).measure(model)["o"].value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stated", ["mean", "cls"])
def test_the_checkpoint_says_how_to_pool_unless_the_objective_does(make_model, evaluator, pairs, stated):
    model = make_model("bert-body")
    silent, loud = Objective(dataset=pairs, **SIMILARITY), Objective(dataset=pairs, pooling=stated, **SIMILARITY)
    values = [
        evaluator(model, silent, pooling=stated).measure(model)["o"].value,
        evaluator(model, loud, pooling="last").measure(model)["o"].value,
    ]
    assert values[0] == values[1]
    assert evaluator(model, silent, pooling=stated).fingerprint != evaluator(model, silent, pooling="last").fingerprint


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        (None, "mean"),
        ({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_the_pooling_of_a_checkpoint_is_read(settings, pooling):
    assert stated_pooling(settings) == pooling


@pytest.mark.parametrize(
    "settings", [{"pooling_mode_max_tokens": True}, dict.fromkeys(["pooling_mode_cls_token", "pooling_mode_mean_tokens"], True)]
)
def test_a_pooling_that_is_not_known_is_refused(settings):
    with pytest.raises(EvaluationError, match="The checkpoint pools by"):
        stated_pooling(settings)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_recall_of_a_corpus_equals_that_of_a_plain_loop(make_model, evaluator, tokenizer, queries, corpus, batch_size):
    model, shares = make_model("bert-body"), []
    documents = np.stack([embed(model, tokenizer, text) for text in corpus["text"]])
    for row in queries["search"]:
        first = np.argsort(-(documents @ embed(model, tokenizer, row["text"])))[:5]
        shares.append(len(set(first) & set(row["relevant"])) / len(row["relevant"]))
    fields = {"metric": "recall", "metric_arguments": {"k": 5}, "batch_size": batch_size}
    score = evaluator(model, Objective(dataset=queries, corpus=corpus, **fields, **RETRIEVAL)).measure(model)["o"]
    assert score.outcomes.tolist() == pytest.approx(shares)
    assert 0 < score.value < 1


def test_without_a_corpus_the_targets_are_the_documents(make_model, evaluator, queries, corpus):
    model = make_model("bert-body")
    named = queries.map(lambda row: {"relevant": corpus["text"][row["relevant"][0]]}, remove_columns="relevant")
    texts = sorted(set(named["search"]["relevant"]))
    numbered = named["search"].map(lambda row: {"relevant": texts.index(row["relevant"])}, remove_columns="relevant")
    given = Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    one = Objective(dataset=named, **RETRIEVAL)
    two = Objective(
        dataset=numbered, held_out=numbered.map(lambda row: {"text": "w1 " + row["text"]}), corpus=given, **RETRIEVAL
    )
    values = [evaluator(model, objective).measure(model)["o"].value for objective in (one, two)]
    assert values[0] == pytest.approx(values[1])
    assert 0 < values[0] < 1


def test_a_query_that_is_its_document_finds_it_first(make_model, evaluator, queries):
    same = queries.map(lambda row: {"relevant": row["text"]}, remove_columns="relevant")
    model = make_model("bert-body")
    assert evaluator(model, Objective(dataset=same, **RETRIEVAL)).measure(model)["o"].value == 1


def test_a_corpus_may_be_a_file(make_model, evaluator, queries, corpus, tmp_path):
    corpus.to_json(tmp_path / "corpus.jsonl")
    model = make_model("bert-body")
    values = [
        evaluator(model, Objective(dataset=queries, corpus=given, **RETRIEVAL)).measure(model)["o"].value
        for given in (corpus, tmp_path / "corpus.jsonl")
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda corpus: corpus.select(range(3)), r"relevant documents are not in the corpus, for example"),
        (lambda corpus: corpus.rename_column("text", "body"), "Unknown column of the corpus 'text'"),
        (lambda corpus: corpus.rename_column("id", "number"), "Unknown column of the corpus 'id'"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused(make_model, evaluator, queries, corpus, change, said):
    with pytest.raises(EvaluationError, match=said):
        evaluator(make_model("bert-body"), Objective(dataset=queries, corpus=change(corpus), **RETRIEVAL))


def test_similarities_are_numbers(make_model, evaluator, pairs):
    with pytest.raises(EvaluationError, match="expected a finite number"):
        evaluator(make_model("bert-body"), Objective(dataset=pairs, **{**SIMILARITY, "target": "text"}))
