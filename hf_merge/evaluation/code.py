"""Python that a model wrote, run against tests: a sandboxed run of one program, and pass@k over many."""

import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import datasets
import evaluate

from hf_merge.errors import EvaluationError
from hf_merge.evaluation.metrics.summed import Floats, Share, Values, counted
from hf_merge.evaluation.tasks import NEEDS_LEAVE

SLOT = "{completion}"
"""Where a reference, which is a program, has room for what the model wrote."""

STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif ", "\nassert ", "\n```")
"""Where the completion of a function's body has come to its end: HumanEval's stops and a few more."""

_SANDBOX = Path(__file__).with_name("sandbox.py")
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set does not change from run to run
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_KEPT = 2000  # bytes of a program's output that are kept, from its end
_START = 120.0  # seconds within which even a busy machine starts an interpreter


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use: `seconds` of wall time, `memory` in bytes of address space, bytes of each `file` that it writes
    (what it prints is one)."""

    seconds: float = 10.0
    memory: int = 2**30
    file: int = 2**24

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "file"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise EvaluationError(f"A program's limit {name!r} is a positive number, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended: whether it `passed`; if not, `why` in words; the end of its output; whether files were closed to
    it (see `run_program`)."""

    passed: bool
    why: str = ""
    output: str = field(default="", repr=False)
    files_closed: bool = True


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Runs a Python program in a sandbox. It passed if it came to its last line: an exception, an exit, a signal is a failure.

    A fresh interpreter (with the packages of this one) runs it, in a folder of its own that is deleted, with an environment
    that holds nothing of this process's. The kernel refuses it the network, other processes (it can neither make nor signal
    any, so that nothing outlives it), capabilities, and more memory, CPU time and file size than `limits`; where the kernel
    has Landlock, also every file that is neither in its folder nor Python's. After `seconds` it is killed. Not limited: how
    many files it fills in its folder in that time.

    Raises:
        EvaluationError: this machine cannot shut a program in like that (Linux on x86-64 and 64-bit ARM can). Nothing ran.
    """
    limits = limits or Limits()
    word = secrets.token_hex(16)
    read, write = os.pipe()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="hf_merge-code-", ignore_cleanup_errors=True) as scratch,
            (Path(scratch) / "output").open("w+b") as output,
        ):
            try:
                process = _start(source, word, limits, Path(scratch), output, write)
            finally:
                os.close(write)
            said, in_time = _wait(process, read, limits.seconds)
            output.seek(max(0, output.seek(0, os.SEEK_END) - _KEPT))
            printed = output.read().decode(errors="replace")
    finally:
        os.close(read)
    closed, _, end = said.partition(b"\n")
    if closed not in (b"files", b"open"):
        raise EvaluationError(
            f"No sandbox for programs on this machine, so none was run: {printed.strip()[-500:] or 'no start'}"
        )
    passed = end == word.encode() and in_time
    why = "" if passed else _why(process.returncode, in_time, limits)
    return Outcome(passed=passed, why=why, output=printed, files_closed=closed == b"files")


def _start(source: str, word: str, limits: Limits, scratch: Path, output: IO[bytes], channel: int) -> "subprocess.Popen[bytes]":
    folder, program = scratch / "folder", scratch / "program"
    folder.mkdir()
    program.write_bytes(f"{word}\n{source}".encode(errors="replace"))
    bounds = (int(limits.memory), math.ceil(limits.seconds) + 1, int(limits.file), channel)
    with program.open("rb") as stream:
        # -I would ignore the environment, which here is ours.
        return subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", str(_SANDBOX), *map(str, bounds)],
            stdin=stream,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_ENVIRONMENT,
            pass_fds=(channel,),
            start_new_session=True,
        )


def _wait(process: "subprocess.Popen[bytes]", channel: int, seconds: float) -> tuple[bytes, bool]:
    """What the sandbox said, and whether the program ended in time, counted from its start. Leaves no process behind."""
    try:
        ready, _, _ = select.select([channel], [], [], _START)
        said = os.read(channel, 64) if ready else b""
        try:
            process.wait(seconds if said else 0)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return said + os.read(channel, 256), in_time


def _why(code: int, in_time: bool, limits: Limits) -> str:
    if not in_time:
        return f"was stopped after {limits.seconds:g} s"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended early with exit code {code}"


def completion_of(text: str, stops: Sequence[str] = STOPS) -> str:
    """The code in a model's answer: the first fenced block if there is one, else all before the first of `stops`."""
    if (block := _FENCED.search(text)) is not None:
        return block[1]
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class PassAtK(Share):
    """The chance that at least one of k programs passes, averaged over the problems.

    predictions are each problem's completions, references its program with `{completion}` where they go. Of n completions c
    pass: 1 - C(n-c, k) / C(n, k), the unbiased estimate of Chen et al., "Evaluating Large Language Models Trained on Code",
    2021, equation 1. An outcome is a problem's own estimate. `seconds` and `memory` (bytes) limit each program. Nothing runs
    without `allow_code_execution=True`.
    """

    key = "pass_at_k"
    about = "Chance that one of k programs passes; k, seconds, memory, allow_code_execution."
    parameters = ("k", "seconds", "memory", "allow_code_execution")

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.List(text), "references": text})
        return evaluate.MetricInfo(description=self.about, citation="", inputs_description=self.about, features=features)

    def statistics(self, predictions: Values, references: Values, **arguments: Any) -> Floats:
        refuse_unless(arguments.get("allow_code_execution"))
        k = arguments.get("k", 1)
        limits = Limits(**{name: arguments[name] for name in ("seconds", "memory") if name in arguments})
        if few := [len(each) for each in predictions if len(each) < k]:
            raise EvaluationError(f"pass@{k} needs at least {k} completions of each problem, and there are {few[0]}.")
        programs = [
            [reference.replace(SLOT, completion) for completion in each]
            for each, reference in zip(predictions, references, strict=True)
        ]
        passed = run_programs({program for each in programs for program in each}, limits)
        found = [_estimate(len(each), sum(passed[program] for program in each), k) for each in programs]
        return counted(found)


def refuse_unless(allowed: object) -> None:
    """Raises `EvaluationError` unless `allowed` is True."""
    if allowed is not True:
        raise EvaluationError(NEEDS_LEAVE)


def run_programs(sources: Sequence[str] | set[str], limits: Limits) -> dict[str, bool]:
    """Which programs pass, as many at once as this process has cores. One that ran in this process before is not run again."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1) as pool:
        return dict(zip(sources, pool.map(lambda source: _passes(source, limits), sources), strict=True))


@lru_cache(maxsize=2**14)
def _passes(source: str, limits: Limits) -> bool:
    return run_program(source, limits).passed


def _estimate(completions: int, passed: int, k: int) -> float:
    return 1 - math.comb(completions - passed, k) / math.comb(completions, k)
