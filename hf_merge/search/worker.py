"""One of several workers on a study: its sign of life, its watch over the others', and the code that it runs."""

import hashlib
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hf_merge.version import __version__

BEATS = 6
"""Signs of life that a worker gives in the time after which it is taken for dead without one."""

log = logging.getLogger(__name__)


def worker_name() -> str:
    """A name for this search that no other has: host, process and a random part."""
    return f"{platform.node() or 'host'}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@cache
def code() -> str:
    """The version and a digest of hf_merge's own source: what all workers of a study have in common."""
    content = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return f"{__version__} ({content.hexdigest()[:8]})"


class Pulse:
    """Gives a sign of life for the trial that this worker runs, and says whose has stopped.

    A sign is a number that grows (user attribute `beat` of a running trial), so no clocks are compared: a trial is stale once
    its number has stood still for `silence` seconds of this worker's own clock. That clock stands while the storage cannot be
    reached: after an outage everybody has time to be heard again.
    """

    def __init__(self, study: optuna.Study, silence: float, tell: Callable[[list[FrozenTrial]], None]) -> None:
        self.study = study
        self.silence = silence
        self._tell = tell  # the trials at each beat
        self._interval = silence / BEATS
        self._mine: optuna.Trial | None = None
        self._beats = 0
        self._clock = 0.0
        self._reached = time.monotonic()
        self._heard: dict[int, tuple[object, float]] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_merge worker's pulse", daemon=True)

    def runs(self, trial: optuna.Trial | None) -> None:
        """Says which trial this worker runs, None for none."""
        self._mine = trial

    def stale(self) -> set[int]:
        """The numbers of the running trials that have given no sign of life for too long."""
        with self._lock:
            return {number for number, (_, since) in self._heard.items() if self._clock - since > self.silence}

    def beat(self) -> None:
        """One sign of life, and one look at the others'."""
        mine = self._mine
        self._beats += 1
        if mine is not None:
            with suppress(UpdateFinishedTrialError):  # it ended meanwhile
                mine.set_user_attr("beat", self._beats)
        trials = self.study.get_trials(deepcopy=False)
        now = time.monotonic()
        with self._lock:
            self._clock += min(now - self._reached, 2 * self._interval)
            self._reached = now
            heard = {}
            for trial in trials:
                if trial.state == TrialState.RUNNING and (mine is None or trial.number != mine.number):
                    sign = trial.user_attrs.get("worker"), trial.user_attrs.get("beat")
                    before = self._heard.get(trial.number)
                    heard[trial.number] = before if before and before[0] == sign else (sign, self._clock)
            self._heard = heard
        self._tell(trials)

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            try:
                self.beat()
            except Exception as error:  # a storage that stays away is for the search itself to report
                log.debug("No sign of life could be given: %s", error)

    def __enter__(self) -> "Pulse":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(self._interval)
