"""MAP: what its surrogates learn, and the predicted front against what comes."""

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from hf_merge.pareto import non_dominated
from hf_merge.scores import Score, smoothed
from hf_merge.search.leads import LEADS, leads
from hf_merge.search.samplers.map import FOLLOWS, PREDICTED, MAPSampler, _Search, prediction_errors
from hf_merge.search.samplers.numbered import Cube, History
from hf_merge.search.samplers.surrogate import MarginSurrogate, Process, Surrogate

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


@pytest.mark.parametrize("unit", [50.0, 1e3, 4e6])
def test_sizes_and_distances_in_their_millions_are_learned(unit: float) -> None:
    values = unit * quadratic(DESIGN).clip(0)
    missed = Surrogate(DESIGN, values).predict(ELSEWHERE) - unit * quadratic(ELSEWHERE).clip(0)
    assert np.abs(missed).mean() < 0.03 * np.ptp(values)


def margins_of(x: np.ndarray, rows: int = 300) -> np.ndarray:
    """By how much right answers lead: every row's own quadratic of the point, so that shares of right ones bend sharply."""
    rng = np.random.default_rng(5)
    terms = np.concatenate([x, x[:, :1] * x[:, 1:2], x**2], axis=1)
    return 0.3 + 0.5 * rng.normal(size=rows) + terms @ rng.normal(size=(terms.shape[1], rows)) * 0.6


def test_what_others_say_of_an_output_is_what_they_say_without_it() -> None:
    outputs = margins_of(DESIGN, 7)
    fit = Process(DESIGN, outputs)
    found, deviations = fit.left_out()
    kept = np.arange(40) != 11
    own = fit.inverse[np.ix_(kept, kept)] - np.outer(fit.inverse[kept, 11], fit.inverse[11, kept]) / fit.inverse[11, 11]
    kernel = np.linalg.inv(fit.inverse)
    assert found[11] == pytest.approx(fit.center + kernel[11, kept] @ own @ (outputs - fit.center)[kept])
    by_hand = kernel[11, 11] - kernel[11, kept] @ own @ kernel[kept, 11]
    assert deviations[11] == pytest.approx(fit.scale * np.sqrt(by_hand), rel=1e-2)


def test_processes_of_one_kernel_are_each_the_process_alone() -> None:
    outputs = np.stack([quadratic(DESIGN), quadratic(DESIGN)], axis=1)
    together, alone = Process(DESIGN, outputs).predict(ELSEWHERE), Process(DESIGN, outputs[:, :1]).predict(ELSEWHERE)
    assert together[0] == pytest.approx(np.repeat(alone[0], 2, axis=1))
    assert together[1] == pytest.approx(alone[1])


def test_margins_tell_more_than_the_values_they_make() -> None:
    few, margins, truth = DESIGN[:20], margins_of(DESIGN[:20]), smoothed(margins_of(ELSEWHERE)).mean(1)
    values = (margins > 0).mean(1)
    model = MarginSurrogate(few, margins, values)
    missed = model.predict(ELSEWHERE) - model.start - model.slope * truth
    plain = Surrogate(few, values).predict(ELSEWHERE) - (margins_of(ELSEWHERE) > 0).mean(1)
    assert np.abs(missed).mean() < 0.5 * np.abs(plain).mean()
    assert model.follows > 0.9


def test_an_error_rate_follows_its_margins_downwards() -> None:
    margins = margins_of(DESIGN)
    model = MarginSurrogate(DESIGN, margins, 1 - smoothed(margins).mean(1))
    assert model.slope == pytest.approx(-1)
    assert model.predict(ELSEWHERE) == pytest.approx(1 - smoothed(margins_of(ELSEWHERE)).mean(1), abs=0.02)


def test_values_that_do_not_follow_their_margins_say_so() -> None:
    assert MarginSurrogate(DESIGN, margins_of(DESIGN), RNG.random(40)).follows < FOLLOWS


def raced(margins: bool, stopped: bool = False) -> _Search:
    """What `map` expects after twenty trials of two accuracies, with margins or without, the best of them stopped or not."""
    sampler = MAPSampler(seed=0)
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    space = {name: FloatDistribution(0, 1) for name in ("a", "b", "c")}
    for _ in range(20):
        asked = study.ask(space)
        point = np.array([list(asked.params.values())])
        scores = [
            Score(value=float((m > 0).mean()), examples=300, margins=m)
            for m in (margins_of(point)[0], margins_of(1 - point)[0])
        ]
        if margins:
            study._storage.set_trial_system_attr(asked._trial_id, LEADS, leads(scores))
        asked.set_user_attr("stopped", stopped and asked.number > 5)
        study.tell(asked, [score.value for score in scores])
    cube = Cube(space)
    return _Search(History.of(study, cube), cube, np.array([-1.0, -1.0]), np.random.default_rng(0), sampler)


def test_trials_with_margins_are_modeled_by_them() -> None:
    assert {type(model) for model in raced(True).models} == {MarginSurrogate}
    assert {type(model) for model in raced(False).models} == {Surrogate}


def test_what_a_race_stopped_is_not_on_the_front_that_counts() -> None:
    some, every = raced(True, stopped=True), raced(True)
    first = every.told[:6]
    assert some.front.tolist() == first[non_dominated(-first)].tolist()
    assert len(every.front) > len(some.front)


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
