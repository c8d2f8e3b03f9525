"""MM-MO: that its acquisition is alive, what a batch is made of, whose turn it is, and that a search resumes exactly."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from torch import Tensor

from hf_merge.search.loop import search
from hf_merge.search.samplers import mmmo as module
from hf_merge.search.samplers.mmmo import MMMOSampler, mmmo, observed, places
from hf_merge.search.samplers.mmmo_encoding import Encoding
from hf_merge.search.samplers.mmmo_proposal import (
    Data,
    Settings,
    Surrogate,
    acquisition,
    design,
    distinct,
    elites,
    offspring,
    propose,
    published_reference,
    reference,
    spread,
)

LIGHT = {"candidates": 3, "batch": 3, "samples": 8, "restarts": 1, "raw_samples": 8, "iterations": 5, "initial": 4}
TARGETS = torch.tensor([[0.2, 0.7, 0.4, 0.5, 0.3, 0.6], [0.8, 0.3, 0.6, 0.5, 0.7, 0.4]], dtype=torch.float64)


def values(x: Tensor) -> Tensor:
    """A merge in miniature: two accuracies in percent and minus the distance from the base, of rows `(n, 6)`."""
    accuracies = 100 * torch.exp(-(x[:, None] - TARGETS).square().sum(2))
    return torch.cat([accuracies, -1e7 * x[:, :3].sum(1, keepdim=True)], 1)


def data(rows: int = 10, objectives: int = 3, pending: int = 0) -> Data:
    x = design(0, rows + pending, 6)
    return Data(x=x[:rows], y=values(x[:rows])[:, :objectives], slack=x.new_zeros(rows, 0), pending=x[rows:])


def alive(surrogate: Surrogate, settings: Settings, corner: Tensor) -> tuple[Tensor, Tensor]:
    """The acquisition at 64 points and the size of its gradient there; for qLogNEHVI that of its exponential."""
    x = design(1, 64, 6)[:, None].requires_grad_()
    value = acquisition(surrogate, settings, corner, 0)(x)
    value = value if settings.acquisition == "qEHVI" else value.exp()
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient.norm(dim=-1)


# The acquisition


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", ["qLogNEHVI", "qEHVI"])
def test_the_acquisition_is_alive(kind: Any, published: bool) -> None:
    surrogate = Surrogate(data())
    value, gradient = alive(surrogate, Settings(acquisition=kind, samples=32), reference(surrogate, published=published))
    assert (value > 1e-6).double().mean() > 0.9
    assert (gradient > 1e-6).double().mean() > 0.9


def test_with_the_released_reference_point_in_raw_units_it_is_dead() -> None:
    surrogate = Surrogate(data())
    value, gradient = alive(surrogate, Settings(acquisition="qEHVI", samples=32), published_reference(surrogate.data.y))
    assert value.abs().max() == 0
    assert gradient.max() == 0


def test_the_reference_point_is_in_the_units_of_the_standardized_values() -> None:
    surrogate = Surrogate(data())
    assert torch.allclose(surrogate.z.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(surrogate.z.std(0), torch.ones(3, dtype=torch.float64))
    assert (reference(surrogate) < surrogate.z.amin(0)).all()
    assert (reference(surrogate) > surrogate.z.amin(0) - 1).all()


def test_a_reference_point_in_the_objectives_units_is_brought_to_the_surrogate_s() -> None:
    surrogate = Surrogate(replace(data(), reference=data().y.mean(0) - data().y.std(0)))
    assert reference(surrogate).tolist() == pytest.approx([-1, -1, -1])


def test_the_surrogate_predicts_what_it_was_shown() -> None:
    surrogate = Surrogate(data(30))
    assert (surrogate.predicted(surrogate.data.x) - surrogate.z).abs().max() < 0.3


def test_a_point_that_is_being_evaluated_is_worth_little_a_second_time() -> None:
    settings, here = Settings(samples=32), design(3, 1, 6)
    free, busy = data(), replace(data(), pending=here)
    corner = reference(Surrogate(free))
    worth = [float(acquisition(Surrogate(d), settings, corner, 0)(here).detach().exp()) for d in (free, busy)]
    assert worth[1] < 0.5 * worth[0]


@pytest.mark.parametrize("kind", ["qLogNEHVI", "qEHVI"])
def test_points_that_break_a_constraint_are_worth_less(kind: Any) -> None:
    free = data(20)
    bound = replace(free, slack=free.x[:, :1] - 0.5)
    x = design(1, 64, 6)[:, None]
    x = x[x[:, 0, 0] > 0.8]
    corner = reference(Surrogate(free))
    settings = Settings(acquisition=kind, samples=32)
    worth = [acquisition(Surrogate(d), settings, corner, 0)(x).detach().mean() for d in (free, bound)]
    assert worth[1] < worth[0]


# A batch


@pytest.mark.parametrize(
    "changes",
    [{}, {"acquisition": "qEHVI"}, {"fisher_order": "high"}, {"fisher_order": None}, {"published": True, "sure": 0}],
    ids=str,
)
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_a_batch_is_of_new_points_in_the_cube(objectives: int, changes: dict[str, Any]) -> None:
    known = data(objectives=objectives, pending=2)
    encoding = Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)})
    rows = propose(known, encoding, Settings(**{**LIGHT, **changes}), seed=0)
    assert rows.shape == (3, 6)
    assert ((rows >= 0) & (rows <= 1)).all()
    assert len(distinct(rows, torch.cat([known.x, known.pending]))) == 3


def test_a_batch_depends_on_its_seed_alone_and_leaves_the_global_generator_as_it_was() -> None:
    encoding = Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = propose(data(), encoding, Settings(**LIGHT), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(propose(data(), encoding, Settings(**LIGHT), seed=0), first)
    assert not torch.equal(propose(data(), encoding, Settings(**LIGHT), seed=1), first)


def test_constant_objectives_are_survived() -> None:
    known = data()
    encoding = Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)})
    rows = propose(replace(known, y=known.y * torch.tensor([1.0, 0.0, 0.0])), encoding, Settings(**LIGHT), seed=0)
    assert rows.isfinite().all()


def test_a_space_with_few_points_is_used_up() -> None:
    encoding = Encoding({"a": IntDistribution(0, 2), "b": CategoricalDistribution(("x", "y"))})
    x = encoding.encode([{"a": a, "b": b} for a, b in ((0, "x"), (1, "x"), (2, "y"))])
    known = Data(x=x, y=x[:, :2], slack=x.new_zeros(3, 0), pending=x[:0])
    found = [encoding.decode(row) for row in propose(known, encoding, Settings(**LIGHT), seed=0)]
    assert sorted((p["a"], p["b"]) for p in found) == [(0, "y"), (1, "y"), (2, "x")]


def test_offspring_take_at_least_one_gene_of_a_mutant_and_the_others_from_the_weak() -> None:
    strong = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    mutants = {(a + 0.5 * (b - c)).clamp(0, 1) for a in strong.T[0] for b in strong.T[0] for c in strong.T[0]}
    weak = torch.full((50, 2), 0.33, dtype=torch.float64)
    children = offspring(weak, strong, torch.arange(2), Settings())
    own = (children - 0.33).abs() < 1e-12
    assert not own.all(1).any()
    assert own.any()
    assert all(min(abs(float(v) - float(m)) for m in mutants) < 1e-6 for v in children[:, 0][~own[:, 0]])


def test_a_choice_s_columns_are_inherited_together() -> None:
    strong = torch.tensor([[0.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    weak = torch.tensor([[1.0, 0.0, 1.0]] * 50, dtype=torch.float64)
    children = offspring(weak, strong, torch.tensor([0, 0, 1]), Settings()).round()
    assert {tuple(row) for row in children[:, :2].tolist()} == {(1.0, 0.0), (0.0, 1.0)}


def test_elites_are_of_the_first_front_and_those_that_contribute_most() -> None:
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.6], [0.61, 0.59], [0.1, 0.1], [0.2, 0.1]], dtype=torch.float64)
    known = Data(x=torch.arange(6.0)[:, None], y=y, slack=y.new_zeros(6, 0), pending=y[:0, :1])
    assert set(elites(known, Settings(elites=3)).flatten().tolist()) >= {0, 1}
    assert elites(known, Settings(elites=5)).flatten().tolist()[-1] == 5


def test_elites_that_break_a_constraint_come_last() -> None:
    y = torch.tensor([[1.0, 1.0], [0.1, 0.2], [0.2, 0.1], [0.0, 0.0]], dtype=torch.float64)
    slack = torch.tensor([[1.0], [0.0], [-1.0], [0.0]], dtype=torch.float64)
    known = Data(x=torch.arange(4.0)[:, None], y=y, slack=slack, pending=y[:0, :1])
    assert set(elites(known, Settings(elites=3)).flatten().tolist()) == {1, 2, 3}


def test_published_elites_have_the_largest_sums_of_the_first_two_objectives() -> None:
    known = data()
    rows = elites(known, Settings(published=True, sure=0, elites=3))
    assert torch.equal(rows, known.x[known.y[:, :2].sum(1).argsort(descending=True)[:3]])


def test_information_is_lowest_far_from_the_data() -> None:
    surrogate = Surrogate(data())
    seen, far = surrogate.information(surrogate.data.x).min(), surrogate.information(torch.ones(1, 6, dtype=torch.float64))
    assert far < seen


def test_near_duplicates_do_not_fill_a_batch() -> None:
    ranked = torch.tensor([[0.5, 0.5], [0.501, 0.5], [0.5, 0.501], [0.9, 0.9]], dtype=torch.float64)
    assert spread(ranked, 2).tolist() == [[0.5, 0.5], [0.9, 0.9]]
    assert spread(ranked, 3).tolist() == [[0.5, 0.5], [0.9, 0.9], [0.501, 0.5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": 2}, "initial is at least 3"),
        ({"batch": 11}, "11 from 2"),
        ({"sure": -1}, "sure is at least 0"),
        ({"acquisition": "ei"}, "qLogNEHVI, qEHVI"),
        ({"fisher_order": "middle"}, "'low', 'high' or None"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmmo(**changes)


# The space

SPACE = {
    "choice": CategoricalDistribution(("ties", None, 3)),
    "float": FloatDistribution(-2, 6),
    "int": IntDistribution(1, 9, step=4),
    "log": FloatDistribution(1e-4, 1, log=True),
    "stepped": FloatDistribution(0, 1, step=0.25),
}


def test_points_are_rows_of_the_unit_cube_and_back() -> None:
    encoding = Encoding(SPACE)
    point = {"choice": 3, "float": 0.0, "int": 5, "log": 1e-2, "stepped": 0.75}
    (row,) = encoding.encode([point])
    assert row.tolist() == pytest.approx([0, 0, 1, 0.25, 0.5, 0.5, 0.75])
    assert encoding.decode(row) == pytest.approx(point)


@pytest.mark.parametrize("seed", range(5))
def test_every_row_decodes_to_a_point_of_the_space(seed: int) -> None:
    encoding = Encoding(SPACE)
    row = encoding.snap(design(seed, 1, encoding.width))[0]
    for name, value in encoding.decode(row).items():
        assert SPACE[name]._contains(SPACE[name].to_internal_repr(value))
    assert torch.allclose(encoding.snap(row), row)


# The sampler


def run(study: optuna.Study, trials: int, *, fail: int | None = None) -> optuna.Study:
    """Asks and tells until the study has `trials` finished trials; the trial numbered `fail` fails."""
    while sum(t.state.is_finished() for t in study.trials) < trials:
        trial = study.ask()
        x = torch.tensor([[trial.suggest_float(f"x{i}", 0, 1) for i in range(6)]], dtype=torch.float64)
        if trial.number == fail:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, values(x)[0].tolist())
    return study


def new(seed: int | None = 0, storage: Any = None, **changes: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="s",
        storage=storage,
        directions=["maximize"] * 3,
        sampler=mmmo(seed=seed, **{**LIGHT, **changes}),
        load_if_exists=True,
    )


def drawn(study: optuna.Study) -> list[list[float]]:
    return [[round(v, 12) for v in t.params.values()] for t in study.trials if t.state == TrialState.COMPLETE]


@pytest.fixture(scope="module")
def whole() -> optuna.Study:
    """Twelve trials, uninterrupted."""
    return run(new(), 12)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    return lambda: JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))


@pytest.mark.parametrize("cut", [2, 4, 5, 7, 9])
def test_resumed_with_another_seed_it_draws_what_an_uninterrupted_search_draws(
    whole: optuna.Study, journal: Any, cut: int
) -> None:
    run(new(storage=journal()), cut)
    resumed = run(new(seed=99, storage=journal()), 12)
    assert drawn(resumed) == drawn(whole)
    assert [t.values for t in resumed.best_trials] == [t.values for t in whole.best_trials]


@pytest.mark.parametrize("cut", [5, 6, 9])
def test_a_trial_that_was_cut_off_and_queued_again_changes_nothing(whole: optuna.Study, cut: int) -> None:
    study = run(new(), cut)
    lost = study.ask({f"x{i}": FloatDistribution(0, 1) for i in range(6)})
    study.enqueue_trial(lost.params)
    study.tell(lost, state=TrialState.FAIL)
    assert drawn(run(study, 13)) == drawn(whole)


RESUME = """
import sys
sys.path.insert(0, sys.argv[2])
from test_mmmo import JournalFileBackend, JournalStorage, new, run
run(new(storage=JournalStorage(JournalFileBackend(sys.argv[1]))), 12)
"""


@pytest.mark.slow
def test_another_process_resumes_it_to_the_same_front(whole: optuna.Study, journal: Any, tmp_path: Path) -> None:
    run(new(storage=journal()), 6)
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path / "study.log"), str(Path(__file__).parent)], check=True)
    resumed = new(storage=journal())
    assert [t.values for t in resumed.best_trials] == [t.values for t in whole.best_trials]


def test_a_batch_is_proposed_once_and_handed_out_to_every_worker(journal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(new(storage=journal()), 4)
    calls = []
    monkeypatch.setattr(module, "propose", lambda *a: calls.append(a) or propose(*a))
    space = {f"x{i}": FloatDistribution(0, 1) for i in range(6)}
    workers = [new(seed=seed, storage=journal()) for seed in range(3)]
    points = {tuple(worker.ask(space).params.values()) for worker in workers}
    assert len(points) == 3
    assert len(calls) == 1


def test_what_others_still_run_is_taken_into_account() -> None:
    study = run(new(), 4)
    space = {f"x{i}": FloatDistribution(0, 1) for i in range(6)}
    running = [study.ask(space) for _ in range(3)]
    known = observed(study.get_trials(), study.directions, Encoding(space))
    assert known.pending.tolist() == [list(t.params.values()) for t in running]
    later = study.ask(space)  # the first of the next batch
    assert all(later.params != t.params for t in running)


def test_failed_trials_are_no_data_and_keep_their_places() -> None:
    study = run(new(), 12, fail=5)
    known = observed(study.get_trials(), study.directions, Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)}))
    assert len(known.x) == 11
    assert list(places(study.get_trials()).values()) == list(range(12))


def test_infinite_scores_are_no_data() -> None:
    study = run(new(), 4)
    trial = study.ask({f"x{i}": FloatDistribution(0, 1) for i in range(6)})
    study.tell(trial, [1.0, float("inf"), 0.0])
    known = observed(study.get_trials(), study.directions, Encoding({f"x{i}": FloatDistribution(0, 1) for i in range(6)}))
    assert len(known.x) == 4


def test_queued_trials_are_data_and_count_in_the_initial_design(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "propose", lambda known, *a: seen.append(known) or propose(known, *a))
    study = new()
    queued = [0.5] * 6
    study.enqueue_trial({f"x{i}": v for i, v in enumerate(queued)})
    run(study, 5)
    assert seen[0].x[0].tolist() == queued
    assert len(seen[0].x) == LIGHT["initial"]


def test_a_minimized_objective_is_turned_around() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}, values=[1, 2]))
    known = observed(study.get_trials(), study.directions, Encoding({"x": FloatDistribution(0, 1)}))
    assert known.y.tolist() == [[1, -2]]


@pytest.mark.parametrize(("given", "expected"), [(None, [0.1, -9.0]), ((0.5, 3.0), [0.5, -3.0])])
def test_the_reference_point_is_the_settings_or_the_study_s(
    given: Any, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "propose", lambda known, *a: seen.append(known) or propose(known, *a))
    sampler = mmmo(seed=0, **{**LIGHT, "reference": given})
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.set_user_attr("reference", {"accuracy": 0.1, "size": 9.0})
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), trial.number), n_trials=5)
    assert seen[0].reference.tolist() == expected


def test_constraints_that_all_trials_carry_are_read() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for extra in ({}, {"other": 1.0}):
        study.add_trial(
            optuna.create_trial(
                params={"x": 0.5},
                distributions={"x": FloatDistribution(0, 1)},
                values=[1, 2],
                constraints={"size": 0.5} | extra,
            )
        )
    known = observed(study.get_trials(), study.directions, Encoding({"x": FloatDistribution(0, 1)}))
    assert known.slack.tolist() == [[0.5], [0.5]]
    assert not known.feasible.any()


def test_the_published_set_up_is_ten_random_points_and_batches_of_five_out_of_ten() -> None:
    settings = mmmo(paper=True).settings
    assert (settings.initial, settings.candidates, settings.batch) == (10, 10, 5)
    assert (settings.samples, settings.restarts, settings.raw_samples, settings.iterations) == (128, 10, 512, 200)
    assert settings.acquisition == "qEHVI"


def test_the_published_set_up_evaluates_thirty(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def cheap(known: Data, encoding: Encoding, settings: Settings, seed: int) -> Tensor:
        sizes.append(len(known.x))
        return design(seed, settings.batch, encoding.width)

    monkeypatch.setattr(module, "propose", cheap)
    study = optuna.create_study(directions=["maximize"] * 3, sampler=mmmo(paper=True, seed=0))
    run(study, 30)
    assert sizes == [10, 15, 20, 25]


def test_it_searches_recipes(problem: Any) -> None:
    found = search(problem, problem.space, problem.directions, trials=10, sampler=mmmo(seed=0, **LIGHT), progress=False)
    assert found.evaluated == 10
    assert np.isfinite(found.front.hypervolume())


@pytest.mark.parametrize("at", [6, 8])
def test_a_search_of_recipes_that_was_interrupted_finds_the_same_front(problem: Any, tmp_path: Path, at: int) -> None:
    def tried(where: Path) -> list[tuple[str, float]]:
        study = search(
            problem,
            problem.space,
            problem.directions,
            trials=10,
            sampler=mmmo(seed=0, **LIGHT),
            storage=where,
            progress=False,
        )
        return [(t.recipe.digest, t.scores["x"].value) for t in study.front]

    def once(recipe: Any, call: int) -> None:
        if call == at:
            raise KeyboardInterrupt

    whole = tried(tmp_path / "whole.log")
    problem.calls.clear()
    problem.before = once
    tried(tmp_path / "cut.log")
    assert len(problem.calls) == at
    assert tried(tmp_path / "cut.log") == whole


def test_one_objective_alone_is_searched_as_well() -> None:
    study = optuna.create_study(direction="minimize", sampler=MMMOSampler(Settings(**LIGHT), seed=0))
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1) - 0.3) ** 2, n_trials=10)
    assert study.best_value < 0.02
