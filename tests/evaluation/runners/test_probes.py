import pytest

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective


def probe(metric):
    return Objective(name="o", task="none", metric=metric)


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_size_counts_parameters_and_tied_ones_once(make_model, evaluator, architecture):
    model = make_model(architecture)
    distinct = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert evaluator(model, probe("size")).measure(model)["o"].value == sum(distinct.values())


@pytest.mark.parametrize("split", ["search", "held_out"])
def test_the_norm_of_the_delta_is_a_fact_of_the_merge(make_model, evaluator, split):
    model = make_model("llama")
    score = evaluator(model, probe("delta_norm")).measure(model, split, facts={"delta_norm": 2.5})["o"]
    assert (score.value, score.examples, score.outcomes, score.replicates) == (2.5, 0, None, None)


def test_a_missing_fact_is_told(make_model, evaluator):
    model = make_model("llama")
    with pytest.raises(EvaluationError, match="Objective 'o': delta_norm is computed while merging"):
        evaluator(model, probe("delta_norm")).measure(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "bert-masked", "t5", "vit"])
def test_latency_is_measured_on_every_kind_of_model_and_changes_nothing(make_model, evaluator, architecture):
    model = make_model(architecture).train()
    settings = model.generation_config.to_dict() if model.can_generate() else None
    assert 0 < evaluator(model, probe("latency"), tokenizer=None).measure(model)["o"].value < 10
    assert model.training
    assert settings is None or model.generation_config.to_dict() == settings


def test_objectives_with_and_without_data_are_measured_together(make_model, evaluator, make_data):
    model = make_model("bert")
    both = evaluator(model, Objective(name="acc", dataset=make_data()), probe("size"))
    assert list(both.measure(model, replicates=5)) == ["acc", "o"]
    assert dict(both.directions) == {"acc": "maximize", "o": "minimize"}
    assert both.describe()[1] == {
        "name": "o",
        "metric": "size",
        "direction": "minimize",
        "implementation": "hf_merge size",
    }


def test_a_fingerprint_tells_objectives_without_data_apart(make_model, evaluator):
    model = make_model("bert")
    assert evaluator(model, probe("size")).fingerprint != evaluator(model, probe("latency")).fingerprint
