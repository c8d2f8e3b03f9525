"""Samplers by name, their seeds, and what they have in common: categories, queued trials, constraints, resuming."""

import itertools
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler

from hf_merge.errors import RecipeError
from hf_merge.search.samplers import evolution, names
from hf_merge.search.samplers.cmaes import GENERATION, CMAESSampler
from hf_merge.search.samplers.map import MAPSampler
from hf_merge.search.samplers.names import SAMPLERS, sampler
from hf_merge.search.samplers.nsga2 import NSGA2Sampler, NSGA3Sampler, sobol
from hf_merge.search.samplers.numbered import Cube, NumberedSampler
from hf_merge.search.samplers.qmc import QMCSampler

QUICK = [name for name in SAMPLERS if name not in ("gp", "mmmo")]

SPACE = {
    "method": CategoricalDistribution(("plain", "good", "bad")),
    "x": FloatDistribution(0, 1),
    "y": FloatDistribution(-1.0, 3.0),
}

WORSE = {"plain": 0.1, "good": 0.0, "bad": 0.3}


def values(params: dict[str, Any]) -> list[float]:
    """Two objectives, one of them maximized: the front is x in [0, 1] with y = x and the good method."""
    x, off = params["x"], (params["y"] - params["x"]) ** 2 + WORSE[params["method"]]
    return [x - off, x**2 + off]


def studied(with_sampler: BaseSampler, trials: int, study: optuna.Study | None = None, queue: bool = True) -> optuna.Study:
    if study is None:
        study = optuna.create_study(directions=["maximize", "minimize"])
        if queue:
            for x in (0.0, 1.0):
                study.enqueue_trial({"method": "plain", "x": x, "y": x})
    study.sampler = with_sampler
    for _ in range(trials):
        asked = study.ask(SPACE)
        study.tell(asked, values(asked.params))
    return study


def made(name: str, trials: int = 30) -> BaseSampler:
    return sampler(name, seed=3, trials=trials, existing=0)


# All of them


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_searches_numbers_and_categories_from_a_queue(name: str) -> None:
    study = studied(made(name), 12)
    assert [t.params["method"] for t in study.trials[:2]] == ["plain", "plain"]
    assert len({tuple(t.params.items()) for t in study.trials}) == 12


@pytest.mark.parametrize("name", QUICK)
def test_the_same_seed_gives_the_same_study(name: str) -> None:
    assert [t.params for t in studied(made(name), 26).trials] == [t.params for t in studied(made(name), 26).trials]


@pytest.mark.parametrize("kind", [NSGA2Sampler, NSGA3Sampler, MAPSampler, CMAESSampler, QMCSampler])
def test_a_new_sampler_goes_on_where_the_old_one_stopped(kind: type[NumberedSampler]) -> None:
    whole = studied(kind(seed=5), 30)
    parts = studied(kind(seed=5), 13, studied(kind(seed=5), 17))
    assert [t.params for t in parts.trials] == [t.params for t in whole.trials]


@pytest.mark.parametrize("kind", [NSGA2Sampler, NSGA3Sampler, MAPSampler, CMAESSampler, QMCSampler])
def test_two_workers_of_one_seed_draw_different_points(kind: type[NumberedSampler]) -> None:
    study = studied(kind(seed=5), 24)
    drawn = []
    for _ in range(4):
        study.sampler = kind(seed=5)
        drawn.append(tuple(study.ask(SPACE).params.items()))
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(("kind", "trials"), [(NSGA2Sampler, 80), (MAPSampler, 48)])
def test_evolution_and_the_surrogate_find_the_good_method(kind: type[NumberedSampler], trials: int) -> None:
    late = studied(kind(seed=1), trials).trials[-min(trials // 2, 40) :]
    assert np.mean([t.params["method"] == "good" for t in late[4:]]) > 0.5


@pytest.mark.parametrize(("kind", "trials"), [(NSGA2Sampler, 80), (NSGA3Sampler, 80), (MAPSampler, 48)])
def test_constraints_move_the_search_to_where_they_hold(kind: type[NumberedSampler], trials: int) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=kind(seed=1))
    for _ in range(trials):
        asked = study.ask(SPACE)
        asked.set_constraint("x is small", asked.params["x"] - 0.3)
        study.tell(asked, values(asked.params))
    assert np.mean([t.params["x"] <= 0.3 for t in study.trials[-trials // 2 + 4 :]]) > 0.5


@pytest.mark.parametrize("kind", [NSGA2Sampler, NSGA3Sampler, MAPSampler, CMAESSampler, QMCSampler])
def test_failed_trials_do_not_stop_a_sampler(kind: type[NumberedSampler]) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=kind(seed=1))
    for i in range(40):
        asked = study.ask(SPACE)
        if i % 3 == 0:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, values(asked.params))
    assert len({tuple(t.params.items()) for t in study.trials}) == 40


@pytest.mark.parametrize("kind", [NSGA2Sampler, NSGA3Sampler, MAPSampler, CMAESSampler])
def test_a_single_objective_is_searched_as_well(kind: type[NumberedSampler]) -> None:
    study = optuna.create_study(direction="minimize", sampler=kind(seed=1))
    for _ in range(50):
        asked = study.ask(SPACE)
        study.tell(asked, values(asked.params)[1])
    assert study.best_value < 0.3


# Names


def test_a_sampler_of_optuna_s_is_taken_as_it_is() -> None:
    own = RandomSampler()
    assert sampler(own, seed=0, trials=10, existing=0) is own


def test_an_unknown_sampler_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'nsga2'"):
        sampler("nsga-2", seed=0, trials=10, existing=0)


@pytest.mark.parametrize(
    ("name", "needed", "told"), [("mmmo", "botorch", r"hf_merge\[bo\]"), ("cmaes", "cmaes", "install cmaes")]
)
def test_a_sampler_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, needed: str, told: str
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {needed!r}", name=needed)

    monkeypatch.setattr(names, "import_module", missing)
    with pytest.raises(RecipeError, match=told):
        sampler(name, seed=0, trials=10, existing=0)


def test_a_mistake_in_a_sampler_s_module_is_not_taken_for_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise ModuleNotFoundError("No module named 'hf_merge.nowhere'", name="hf_merge.nowhere")

    monkeypatch.setattr(names, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        sampler("mmmo", seed=0, trials=10, existing=0)


def first_draws(seed: int, existing: int) -> list[dict[str, float]]:
    study = optuna.create_study(sampler=sampler("random", seed=seed, trials=10, existing=existing))
    return [study.ask({"x": FloatDistribution(0, 1)}).params for _ in range(3)]


def test_the_same_seed_draws_the_same_points() -> None:
    assert first_draws(3, 20) == first_draws(3, 20)


@pytest.mark.parametrize(("seed", "existing"), [(4, 20), (3, 21)])
def test_another_seed_or_a_resumed_study_draws_other_points(seed: int, existing: int) -> None:
    assert first_draws(3, 20) != first_draws(seed, existing)


# The cube


@pytest.mark.parametrize(
    ("distribution", "value", "x"),
    [
        (FloatDistribution(-1, 3), 1.0, 0.5),
        (FloatDistribution(0.01, 100, log=True), 1.0, 0.5),
        (IntDistribution(1, 5), 2, 0.25),
        (CategoricalDistribution(("a", "b")), "b", 0.75),
    ],
)
def test_a_value_has_its_place_in_the_cube_and_comes_back(distribution: Any, value: Any, x: float) -> None:
    cube = Cube({"p": distribution})
    assert cube.encode({"p": value}) == pytest.approx(x)
    assert cube.decode(np.array([x])) == {"p": pytest.approx(value) if not isinstance(value, str) else value}


@pytest.mark.parametrize("x", [-0.2, 0.0, 1.0, 1.3])
def test_a_point_at_or_beyond_the_ends_is_in_the_range(x: float) -> None:
    assert all(
        d._contains(d.to_internal_repr(v))
        for d, v in zip(SPACE.values(), Cube(SPACE).decode(np.full(3, x)).values(), strict=True)
    )


def test_a_float_with_a_step_lies_on_its_grid() -> None:
    assert Cube({"p": FloatDistribution(0, 1, step=0.25)}).decode(np.array([0.6])) == {"p": 0.5}


def test_features_name_categories_one_by_one_and_lead_back() -> None:
    point = np.array([[5 / 6, 0.2, 0.7]])
    features = Cube(SPACE).features(point)
    assert features.tolist() == [[0, 0, 1, 0.2, 0.7]]
    assert Cube(SPACE).from_features(features[0]) == pytest.approx(point[0])


# The pieces of evolution


def test_ranks_peel_fronts_and_put_broken_constraints_last() -> None:
    losses = np.array([[0, 2], [2, 0], [2, 2], [3, 3], [-1, -1]], dtype=float)
    assert evolution.ranks(losses).tolist() == [1, 1, 2, 3, 0]
    assert evolution.ranks(losses, np.array([0, 0, 0.2, 0, 0.1])).tolist() == [0, 0, 3, 1, 2]


def test_crowding_is_the_box_between_neighbors() -> None:
    assert evolution.crowding(np.array([[0.0, 4], [1, 2], [4, 0]])).tolist() == [np.inf, 2.0, np.inf]


def test_whole_ranks_are_not_cut() -> None:
    losses = np.array([[0, 3], [1, 2], [2, 1], [3, 0], [4, 4]], dtype=float)
    assert len(evolution.by_crowding(losses, 2)) == 2
    assert sorted(evolution.by_crowding(losses, 2, whole_ranks=True)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("objectives", "at_least", "count"), [(2, 5, 5), (3, 10, 10), (3, 11, 15), (1, 7, 1)])
def test_directions_are_spread_over_the_simplex(objectives: int, at_least: int, count: int) -> None:
    found = evolution.directions(objectives, at_least)
    assert found.shape == (count, objectives)
    assert found.sum(1) == pytest.approx(1)
    assert len({tuple(row) for row in found.round(6)}) == count


def test_selection_by_direction_takes_one_of_each_crowd() -> None:
    crowds = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    losses = np.array([(x + e, y - e) for (x, y), e in itertools.product(crowds, (0.0, 0.01, -0.01))])
    kept = evolution.by_direction(losses, 3, np.random.default_rng(0))
    assert sorted(kept // 3) == [0, 1, 2]


def test_children_stay_in_the_cube_and_in_their_parents_categories_or_a_mutated_one() -> None:
    rng = np.random.default_rng(0)
    mothers, fathers = rng.random((500, 3)), rng.random((500, 3))
    mothers[:, 0], fathers[:, 0] = 1 / 6, 0.5
    found = evolution.children(mothers, fathers, np.array([3, 0, 0]), rng)
    assert found.min() >= 0
    assert found.max() <= 1
    shares = [np.isclose(found[:, 0], middle).mean() for middle in (1 / 6, 0.5, 5 / 6)]
    assert sum(shares) == 1
    assert shares == pytest.approx([4 / 9, 4 / 9, 1 / 9], abs=0.07)


def test_a_sobol_point_depends_on_its_index_and_seed_alone() -> None:
    assert sobol(3, seed=1, index=5).tolist() == sobol(3, seed=1, index=5).tolist()
    assert len({tuple(sobol(3, seed=s, index=i)) for s in range(3) for i in range(3)}) == 9


def test_qmc_covers_the_cube_more_evenly_than_chance() -> None:
    points = np.array([sobol(2, seed=0, index=i) for i in range(64)])
    counts = np.histogram2d(*points.T, bins=8, range=[[0, 1], [0, 1]])[0]
    assert (counts == 1).all()


# CMA-ES


def test_cmaes_marks_generations_and_leaves_queued_trials_out_of_them() -> None:
    marks = [t.system_attrs.get(GENERATION) for t in studied(CMAESSampler(seed=0), 24).trials]
    size = marks.count(0)
    assert marks[0] is None
    assert [m for m in marks if m is not None] == sorted(m for m in marks if m is not None)
    assert marks.count(1) == size


@pytest.mark.parametrize(("weights", "x"), [((1.0, 0.02), 1.0), ((0.02, 1.0), 0.0)])
def test_cmaes_follows_its_weights(weights: tuple[float, float], x: float) -> None:
    last = studied(CMAESSampler(seed=0, weights=weights), 120, queue=False).trials[-20:]
    assert np.median([abs(t.params["x"] - x) for t in last]) < 0.35
