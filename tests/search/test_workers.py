"""Several workers on one study: claims, signs of life, what is refused, and a server that goes away."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from postgres import Postgres, programs

from hf_merge.errors import RecipeError
from hf_merge.recipes.recipe import Recipe
from hf_merge.scores import Score
from hf_merge.search import loop, worker
from hf_merge.search.loop import search
from hf_merge.search.study import DEATHS, Study
from hf_merge.search.trial import Front
from hf_merge.search.worker import BEATS, Pulse, code

Problem = Any
SCORES = {"x": Score(value=0.5, examples=1), "y": Score(value=0.5, examples=1)}


@pytest.fixture
def study(problem: Problem) -> Study:
    """A study in memory whose three first recipes have been tried."""
    return search(problem, problem.space, problem.directions, trials=3, storage=InMemoryStorage(), progress=False)


def ask(study: Study, problem: Problem) -> optuna.Trial:
    study.optuna.sampler = RandomSampler()
    return study.optuna.ask(problem.space.distributions)


def started(study: Study, problem: Problem, recipe: Recipe | None = None) -> tuple[optuna.Trial, Recipe]:
    """A trial that a worker has declared."""
    asked = ask(study, problem)
    return asked, study.start(asked, recipe or problem.space.recipe(asked.params), worker="somebody")


# Claims


def test_a_trial_waits_until_the_ones_before_it_have_declared_their_recipes(study: Study, problem: Problem) -> None:
    before = ask(study, problem)
    asked, _recipe = started(study, problem)
    assert study.claim(asked, 10).pending
    study.start(before, problem.space.recipe(before.params))
    assert not study.claim(asked, 10).pending


def test_a_trial_gives_way_to_an_earlier_one_of_the_same_recipe_and_not_the_other_way_round(
    study: Study, problem: Problem
) -> None:
    first, recipe = started(study, problem)
    second, _ = started(study, problem, recipe)
    assert study.claim(first, 10).repeat_of is None
    claim = study.claim(second, 10)
    assert claim.repeat_of == first.number
    assert study.ended(first.number) is None


def test_a_recipe_that_was_tried_is_repeated_with_its_scores(study: Study, problem: Problem) -> None:
    done = study.trials[0]
    asked, _recipe = started(study, problem, done.recipe)
    assert study.claim(asked, 10).repeat_of == done.number
    assert study.ended(done.number) == done


def test_the_budget_holds_while_its_last_recipes_are_running(study: Study, problem: Problem) -> None:
    last, _recipe = started(study, problem)
    more, _other = started(study, problem)
    assert not study.claim(last, 4).over
    assert study.claim(more, 4).over
    assert (study.standing().evaluated, study.standing().claimed) == (3, 5)


def test_a_recipe_that_is_queued_again_keeps_its_place_in_the_budget(study: Study, problem: Problem) -> None:
    lost, recipe = started(study, problem)
    more, _other = started(study, problem)
    study.requeue([lost.number])
    assert study.claim(more, 4).over
    study.drop(more)
    again, same = started(study, problem)
    assert same.digest == recipe.digest
    assert not study.claim(again, 4).over
    assert study.finish(again, scores=SCORES) is not None
    assert study.evaluated == 4


def test_a_recipe_is_queued_again_once_whoever_sees_it(study: Study, problem: Problem) -> None:
    lost, recipe = started(study, problem)
    other = Study(optuna.load_study(study_name="hf_merge", storage=study.optuna._storage))
    for one in (study, other, study):
        one.requeue([lost.number])
    queued = [t for t in study.optuna.trials if t.state == TrialState.WAITING]
    assert [t.user_attrs["digest"] for t in queued] == [recipe.digest]
    assert study.optuna.trials[lost.number].state == TrialState.FAIL


def test_a_worker_that_was_taken_for_dead_cannot_add_its_result(study: Study, problem: Problem) -> None:
    lost, recipe = started(study, problem)
    study.requeue([lost.number])
    assert study.finish(lost, scores=SCORES) is None
    assert study.evaluated == 3
    again, same = started(study, problem)
    assert same.digest == recipe.digest
    assert study.claim(again, 10).repeat_of is None


def test_a_result_that_was_stored_before_its_worker_died_counts(study: Study, problem: Problem) -> None:
    lost, recipe = started(study, problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "_tell", lambda *_: None)
        study.finish(lost, scores=SCORES)
    study.requeue([lost.number])
    assert study.trials[-1].recipe.digest == recipe.digest
    assert study.optuna.trials[lost.number].values == [0.5, 0.5]


def test_a_recipe_of_which_workers_die_is_given_up(problem: Problem) -> None:
    store = InMemoryStorage()
    study = search(problem, problem.space, problem.directions, trials=3, storage=store, progress=False)
    _, recipe = started(study, problem)
    for _ in range(DEATHS):
        study.requeue()
        running = [t for t in study.optuna.trials if t.state == TrialState.WAITING]
        if running[0].user_attrs["deaths"] < DEATHS:
            started(study, problem)
    study = search(problem, problem.space, problem.directions, trials=5, storage=store, progress=False)
    assert [t.error for t in study.trials if t.recipe.digest == recipe.digest] == ["3 processes died while they evaluated it."]
    assert recipe.digest not in problem.calls
    assert len(problem.calls) == 4


def test_handing_a_recipe_back_is_no_death(study: Study, problem: Problem) -> None:
    for _ in range(2 * DEATHS):
        asked, _ = started(study, problem)
        study.requeue([asked.number], died=False)
    assert study.optuna.trials[-1].user_attrs["deaths"] == 0


# Signs of life


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed, for pulses."""
    now = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def watch(study: Study, silence: float = 60.0) -> Pulse:
    return Pulse(study.optuna, silence, lambda trials: None)


def beats(pulse: Pulse, clock: list[float], seconds: float, *others: Pulse) -> None:
    """Time in which `pulse` and others give their signs."""
    for _ in range(round(seconds * BEATS / 60)):
        clock[0] += 60 / BEATS
        for one in (*others, pulse):
            one.beat()


def test_a_silent_worker_s_trial_is_stale_after_a_while(study: Study, problem: Problem, clock: list[float]) -> None:
    asked, _ = started(study, problem)
    pulse = watch(study)
    beats(pulse, clock, 60)
    assert pulse.stale() == set()
    beats(pulse, clock, 20)
    assert pulse.stale() == {asked.number}


def test_a_worker_that_gives_signs_of_life_is_not_stale(study: Study, problem: Problem, clock: list[float]) -> None:
    asked, _ = started(study, problem)
    pulse, other = watch(study), watch(study)
    other.runs(asked)
    beats(pulse, clock, 300, other)
    assert pulse.stale() == set()


def test_a_trial_that_never_declared_its_recipe_is_stale_as_well(study: Study, problem: Problem, clock: list[float]) -> None:
    asked = ask(study, problem)
    pulse = watch(study)
    beats(pulse, clock, 80)
    assert pulse.stale() == {asked.number}
    study.requeue(pulse.stale())
    assert [t.state for t in study.optuna.trials[asked.number :]] == [TrialState.FAIL]


def test_nobody_is_stale_right_after_an_outage(study: Study, problem: Problem, clock: list[float]) -> None:
    asked, _ = started(study, problem)
    pulse, other = watch(study), watch(study)
    other.runs(asked)
    beats(pulse, clock, 60, other)
    clock[0] += 10000
    pulse.beat()  # before the other can
    assert pulse.stale() == set()
    beats(pulse, clock, 60, other)
    assert pulse.stale() == set()


def test_one_s_own_trial_is_never_stale(study: Study, problem: Problem, clock: list[float]) -> None:
    asked, _ = started(study, problem)
    pulse = watch(study)
    pulse.runs(asked)
    beats(pulse, clock, 300)
    assert pulse.stale() == set()


# Searching together


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_workers_share_the_budget_and_no_recipe_is_evaluated_twice(problem: Problem, sampler: str) -> None:
    store, found = InMemoryStorage(), []
    problem.before = lambda recipe, call: time.sleep(0.005)

    def work() -> None:
        found.append(
            search(problem, problem.space, problem.directions, trials=40, sampler=sampler, storage=store, progress=False)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problem.calls) == len(set(problem.calls)) == 40
    assert [study.evaluated for study in found] == [40] * 4
    assert len({t.user_attrs["worker"] for t in found[0].optuna.trials if t.values}) > 1
    assert {t.label for t in found[0].trials} == {"", "x", "y", "uniform average"}


def test_a_lone_worker_finds_what_a_search_alone_finds(problem: Problem) -> None:
    alone = search(problem, problem.space, problem.directions, trials=20, progress=False)
    shared = search(problem, problem.space, problem.directions, trials=20, storage=InMemoryStorage(), progress=False)
    assert [t.recipe for t in shared.trials] == [t.recipe for t in alone.trials]


def test_a_worker_whose_every_recipe_fails_leaves_when_others_do_not_fail(study: Study, problem: Problem) -> None:
    def fail(recipe: Recipe, call: int) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    problem.before = fail
    with pytest.raises(RuntimeError, match="no kernel") as caught:
        search(problem, problem.space, problem.directions, trials=50, storage=study.optuna._storage, progress=False)
    assert caught.value.__notes__ == [
        f"All of the first {loop.MISFIT} recipes that this worker ran failed, and others' did not."
    ]
    assert study.evaluated == 3 + loop.MISFIT


def test_a_worker_with_other_code_is_refused(study: Study, problem: Problem) -> None:
    study.optuna.set_user_attr("code", "0.0.1 (01234567)")
    with pytest.raises(
        RecipeError, match=r"is searched with hf_merge 0\.0\.1 \(01234567\), and this is .*install the same here"
    ):
        search(problem, problem.space, problem.directions, trials=9, storage=study.optuna._storage, progress=False)
    assert len(problem.calls) == 3


def test_the_code_is_named_by_its_version_and_its_content() -> None:
    assert code() == code()
    assert code().startswith(worker.__version__)


def test_a_worker_with_other_data_is_refused(study: Study, problem: Problem) -> None:
    with pytest.raises(RecipeError, match="fingerprint, data: was None, is 'b'"):
        search(
            problem,
            problem.space,
            problem.directions,
            trials=9,
            storage=study.optuna._storage,
            fingerprint={"data": "b"},
            progress=False,
        )
    assert len(problem.calls) == 3


def test_a_study_that_its_maker_left_half_made_is_completed(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_merge.search.opening.CREATION", 0.3)
    store = InMemoryStorage()
    optuna.create_study(study_name="hf_merge", storage=store, directions=["maximize", "maximize"])
    study = search(problem, problem.space, problem.directions, trials=5, storage=store, progress=False)
    assert [t.label for t in study.trials[:3]] == ["x", "y", "uniform average"]


def test_the_progress_bar_counts_the_others_trials(
    problem: Problem, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker runs three recipes while this one runs its first, and takes the last of the budget."""
    store = InMemoryStorage()
    elsewhere = type(problem)()

    def meanwhile(recipe: Recipe, call: int) -> None:
        if call == 4:
            search(elsewhere, problem.space, problem.directions, trials=9, storage=store, progress=False, on_trial=enough)
        time.sleep(0.15)  # a bar is drawn ten times a second at most

    def enough(trial: Any) -> None:
        if len(elsewhere.calls) == 3:
            raise KeyboardInterrupt

    problem.before = meanwhile
    search(problem, problem.space, problem.directions, trials=8, storage=store, progress=True)
    shown = capsys.readouterr().err
    assert "7/8" in shown
    assert "4/8" not in shown
    assert "hypervolume" in shown
    assert (len(problem.calls), len(elsewhere.calls)) == (5, 3)


# Processes

WORKER = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import Specialists
from hf_merge.search.loop import search

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has those in the background ignore it
folder, storage, trials, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
problem = Specialists()

def note(what, recipe):
    with (folder / "calls").open("a") as file:
        file.write(f"{{what}} {{os.getpid()}} {{recipe.digest}}\\n")

def score(recipe):
    note("began", recipe)
    time.sleep(seconds)
    note("ended", recipe)
    return problem(recipe)

search(score, problem.space, problem.directions, trials=trials, storage=storage, silence=5.0, shared=True, progress=False)
"""


class Workers:
    """Worker processes on one study, and the log of what they evaluated."""

    def __init__(self, folder: Path, storage: str, trials: int, seconds: float) -> None:
        self.folder, self.storage, self.trials, self.seconds = folder, storage, trials, seconds
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> "subprocess.Popen[str]":
        code = WORKER.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", code, str(self.folder), self.storage, str(self.trials), str(self.seconds)]
        self.processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return self.processes[-1]

    def log(self, what: str) -> list[tuple[int, str]]:
        """Process and recipe of each evaluation that `began` or `ended`."""
        path = self.folder / "calls"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(int(pid), digest) for kind, pid, digest in lines if kind == what]

    def wait_for(self, ended: int) -> None:
        while len(self.log("ended")) < ended:
            self.check()
            time.sleep(0.02)

    def strike(self, process: "subprocess.Popen[str]", kind: int) -> str:
        """Sends a signal in the middle of an evaluation, and returns the recipe. The process is stopped meanwhile: else the
        evaluation could end in between."""
        while True:
            self.check()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # until then it goes on
            began, ended = (dict(self.log(what)).get(process.pid) for what in ("began", "ended"))
            if began is not None and began != ended:
                process.send_signal(kind)
                process.send_signal(signal.SIGCONT)
                _, err = process.communicate()
                self.processes.remove(process)
                assert kind == signal.SIGKILL or process.returncode == 0, err
                return began
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    def check(self) -> None:
        for process in self.processes:
            assert process.poll() in (None, 0), process.communicate()[1]

    def finish(self) -> None:
        for process in self.processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def together(tmp_path: Path) -> Iterator[Any]:
    made: list[Workers] = []

    def make(storage: str, trials: int, seconds: float) -> Workers:
        made.append(Workers(tmp_path, storage, trials, seconds))
        return made[-1]

    yield make
    for workers in made:
        workers.stop()


unix = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@unix
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_share_a_study_on_one_machine(together: Any, tmp_path: Path, kind: str) -> None:
    storage = str(tmp_path / "study.log") if kind == "journal" else f"sqlite:///{tmp_path}/study.db"
    workers = together(storage, 12, 0.1)
    for _ in range(3):
        workers.start()
    workers.finish()
    assert len(workers.log("ended")) == len({digest for _, digest in workers.log("ended")}) == 12
    assert Study.load(storage).evaluated == 12


@unix
def test_a_worker_that_is_told_to_stop_hands_its_recipe_back(together: Any, tmp_path: Path) -> None:
    workers = together(f"sqlite:///{tmp_path}/study.db", 6, 0.7)
    leaving, _ = workers.start(), workers.start()
    workers.wait_for(1)
    recipe = workers.strike(leaving, signal.SIGINT)
    study = Study.load(workers.storage)
    assert [t.user_attrs["deaths"] for t in study.optuna.trials if t.user_attrs.get("again") is not None] == [0]
    workers.finish()
    assert Counter(digest for _, digest in workers.log("began"))[recipe] == 2
    assert len(workers.log("ended")) == study.evaluated == 6


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


@unix
@pytest.mark.slow
@pytest.mark.skipif(programs() is None, reason="no PostgreSQL server is installed")
def test_a_study_survives_its_workers_and_its_server(together: Any, postgres: Postgres) -> None:
    """Of four workers two are killed in the middle of a trial, one joins late, and the server restarts once."""
    workers = together(postgres.url, 40, 0.4)
    first, second, _ = (workers.start() for _ in range(3))
    workers.wait_for(6)
    killed = [workers.strike(first, signal.SIGKILL)]
    workers.start()
    workers.wait_for(14)
    postgres.stop()
    time.sleep(2)
    postgres.start()
    workers.wait_for(18)
    killed.append(workers.strike(second, signal.SIGKILL))
    workers.finish()

    study = Study.load(postgres.url)
    ended = [digest for _, digest in workers.log("ended")]
    assert study.evaluated == len(study.trials) == 40
    assert Counter(ended) == Counter(t.recipe.digest for t in study.trials)
    began = Counter(digest for _, digest in workers.log("began"))
    assert {digest for digest, times in began.items() if times > 1} == set(killed)
    assert len({pid for pid, _ in workers.log("ended")}) == 4
    assert [t.number for t in study.front] == [t.number for t in Front.of(study.trials, study.directions, study.reference)]
    assert {t.number for t in study.front} <= {t.number for t in study.optuna.best_trials}
    assert not [t for t in study.optuna.trials if not t.state.is_finished()]
    assert sorted(t.label for t in study.trials if t.label) == ["uniform average", "x", "y"]
