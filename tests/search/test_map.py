"""MAP: what its surrogates learn, and the predicted front against what comes."""

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from hf_merge.search.samplers.map import PREDICTED, MAPSampler, prediction_errors
from hf_merge.search.samplers.surrogate import Surrogate

RNG = np.random.default_rng(0)
DESIGN, ELSEWHERE = RNG.random((40, 3)), RNG.random((200, 3))


def quadratic(x: np.ndarray) -> np.ndarray:
    return 1 + x[:, 0] - 2 * (x[:, 1] - 0.4) ** 2 + x[:, 0] * x[:, 2]


LANDSCAPES = {
    "quadratic": quadratic,
    "sigmoid of a quadratic": lambda x: 1 / (1 + np.exp(-3 * quadratic(x) + 3)),
    "softplus of a quadratic": lambda x: np.logaddexp(0, 4 * quadratic(x) - 6),
}


@pytest.mark.parametrize("process", [True, False])
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_a_quadratic_through_a_link_is_learned_from_forty_points(landscape: str, process: bool) -> None:
    truth = LANDSCAPES[landscape]
    model = Surrogate(DESIGN, truth(DESIGN), process=process)
    missed = model.predict(ELSEWHERE) - truth(ELSEWHERE)
    assert np.abs(missed).mean() < 0.03 * np.ptp(truth(ELSEWHERE))


def test_the_process_follows_what_a_quadratic_cannot() -> None:
    def kinked(x: np.ndarray) -> np.ndarray:
        return np.abs(x[:, 0] - 0.3) + np.sin(5 * x[:, 1])

    missed = {
        process: np.abs(Surrogate(DESIGN, kinked(DESIGN), process=process).predict(ELSEWHERE) - kinked(ELSEWHERE)).mean()
        for process in (True, False)
    }
    assert missed[True] < 0.6 * missed[False]


def test_optimism_is_larger_where_nothing_was_seen() -> None:
    values = quadratic(DESIGN) + np.sin(6 * DESIGN[:, 0])
    model = Surrogate(DESIGN, values)
    places = np.concatenate([DESIGN[:5], np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])])
    width = model.predict(places, 1.0) - model.predict(places, 0.0)
    assert (width >= 0).all()
    assert width[5:].min() > width[:5].max()


@pytest.mark.parametrize("process", [True, False])
def test_a_constant_objective_is_predicted_as_it_is(process: bool) -> None:
    model = Surrogate(DESIGN, np.full(40, 0.25), process=process)
    assert model.predict(ELSEWHERE) == pytest.approx(0.25)


def test_predictions_of_a_linked_objective_stay_in_its_range() -> None:
    values = np.clip(quadratic(DESIGN) / 3, 0, 1)
    predicted = Surrogate(DESIGN, values).predict(ELSEWHERE * 3 - 1, 2.0)
    assert np.isfinite(predicted).all()


def searched(trials: int, noise: float = 0.0, **given: Any) -> optuna.Study:
    """Two accuracies of two weights, each best at a corner of its own."""
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=MAPSampler(seed=0, **given))
    rng = np.random.default_rng(1)
    space = {name: FloatDistribution(0, 1) for name in ("a", "b")}
    for _ in range(trials):
        asked = study.ask(space)
        a, b = asked.params["a"], asked.params["b"]
        losses = np.array([(1 - a) ** 2 + b**2, a**2 + (1 - b) ** 2]) + noise * rng.normal(size=2)
        study.tell(asked, np.exp(-losses).tolist())
    return study


def test_the_predicted_front_is_the_front() -> None:
    found = [t for t in searched(30).trials if PREDICTED in t.system_attrs]
    assert len(found) == 10
    away = [abs(t.params["a"] + t.params["b"] - 1) for t in found]
    assert np.median(away) < 0.05


def test_the_front_is_covered_from_end_to_end() -> None:
    front = sorted(t.values[0] for t in searched(45).best_trials)
    assert max(np.diff(front)) < 0.25
    assert front[0] < 0.25
    assert front[-1] > 0.95


def test_prediction_errors_are_those_of_the_trials_that_were_predicted() -> None:
    study = searched(25, noise=0.05)
    told = [t for t in study.trials if PREDICTED in t.system_attrs]
    by_hand = np.mean([[abs(p - v) for p, v in zip(t.system_attrs[PREDICTED], t.values, strict=True)] for t in told], axis=0)
    assert prediction_errors(study) == pytest.approx(by_hand.tolist())
    assert 0 < max(prediction_errors(study)) < 0.2


def test_without_predictions_there_is_no_error() -> None:
    assert all(math.isnan(v) for v in prediction_errors(searched(3)))


def test_the_published_form_searches_as_well() -> None:
    found = [t for t in searched(30, process=False, optimism=0.0).trials if PREDICTED in t.system_attrs]
    assert np.median([abs(t.params["a"] + t.params["b"] - 1) for t in found]) < 0.1


def test_points_that_others_evaluate_are_not_proposed_again() -> None:
    study = searched(25)
    space = {name: FloatDistribution(0, 1) for name in ("a", "b")}
    running = np.array([list(study.ask(space).params.values()) for _ in range(4)])
    gaps = np.abs(running[:, None] - running).max(-1) + np.eye(4)
    assert gaps.min() > 0.01
