"""Samplers by name, their seeds, and the seeded first generation."""

import optuna
import pytest
from optuna.samplers import NSGAIISampler, RandomSampler

from hf_merge.errors import RecipeError
from hf_merge.search.samplers.names import SAMPLERS, sampler
from hf_merge.search.samplers.nsga2 import SeededNSGAIIISampler, SeededNSGAIISampler, population


def evolve(with_sampler: optuna.samplers.BaseSampler, trials: int = 12) -> optuna.Study:
    """A study of two objectives that starts with both of their optima in the queue."""
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=with_sampler)
    for x in (0.0, 1.0):
        study.enqueue_trial({"x": x, "y": x})
    for _ in range(trials):
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        study.tell(trial, [x - (x - y) ** 2, 1 - x - (x - y) ** 2])
    return study


@pytest.mark.parametrize("kind", [SeededNSGAIISampler, SeededNSGAIIISampler])
def test_enqueued_trials_are_of_the_first_generation(kind: type[NSGAIISampler]) -> None:
    trials = evolve(kind(population_size=4, seed=0)).trials
    assert [t.system_attrs[f"{kind.__name__}:generation"] for t in trials] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("kind", [SeededNSGAIISampler, SeededNSGAIIISampler])
def test_enqueued_trials_become_parents(kind: type[NSGAIISampler]) -> None:
    study = evolve(kind(population_size=4, seed=0))
    parents = study._storage.get_study_system_attrs(study._study_id)[f"{kind.__name__}:parent:1"]
    assert {0, 1} <= set(parents)


@pytest.mark.parametrize(("trials", "size"), [(1, 8), (40, 8), (60, 12), (100, 20), (1000, 50)])
def test_the_population_grows_with_the_budget(trials: int, size: int) -> None:
    assert population(trials) == size


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_searches_two_objectives(name: str) -> None:
    study = evolve(sampler(name, seed=0, trials=12, existing=0), trials=12)
    assert len(study.trials) == 12
    assert study.best_trials


def test_a_sampler_of_optuna_s_is_taken_as_it_is() -> None:
    own = RandomSampler()
    assert sampler(own, seed=0, trials=10, existing=0) is own


def test_an_unknown_sampler_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'nsga2'"):
        sampler("nsga-2", seed=0, trials=10, existing=0)


def first_draws(seed: int, existing: int) -> list[dict[str, float]]:
    study = optuna.create_study(sampler=sampler("random", seed=seed, trials=10, existing=existing))
    return [study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params for _ in range(3)]


def test_the_same_seed_draws_the_same_points() -> None:
    assert first_draws(3, 20) == first_draws(3, 20)


@pytest.mark.parametrize(("seed", "existing"), [(4, 20), (3, 21)])
def test_another_seed_or_a_resumed_study_draws_other_points(seed: int, existing: int) -> None:
    assert first_draws(3, 20) != first_draws(seed, existing)
