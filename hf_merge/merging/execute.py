"""Carrying out a plan: read ahead, merge block by block on several threads, write shards, in bounded memory."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BoundedSemaphore, Condition, Lock
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from hf_merge.checkpoints.checkpoint import READERS
from hf_merge.checkpoints.source import Held, Source
from hf_merge.checkpoints.writer import Shard, ShardFile
from hf_merge.errors import MergeError
from hf_merge.merging.plan import MergePlan, TensorJob
from hf_merge.tensors.rng import Draws

IN_FLIGHT = 128 * 2**20
"""Bytes of source tensors from the network that are in memory at once; a piece that is larger by itself is read alone."""
HELD = 2**30
"""Bytes of one tensor's sources up to which what has to be seen twice is kept and not fetched twice."""
OPEN_SHARDS = 2
"""Output shards on disk at once where they are not kept: one that is written, one that is handed over."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a job's tensor, to be merged by one thread.

    What has to be measured first is one piece: all of the tensor. `job`'s sources may be held in memory.
    """

    job: TensorJob
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes to be fetched for it."""
        share = (self.stop - self.start) / max(1, self.job.elements)
        return int(share * sum(source.nbytes for source in self.job.inputs if not source.near))

    def starts(self) -> range:
        """Where its blocks start; an empty tensor is one empty block."""
        return range(self.start, max(self.stop, self.start + 1), self.job.block)

    def parts(self) -> "Iterator[Piece]":
        """It, in parts of which one at a time is brought near; all of it, if it is near."""
        if self.nbytes == 0:
            yield self
            return
        for start, stop in self.job.pieces():
            if self.start <= start and stop <= self.stop:
                yield Piece(self.job, start, stop).fetched()

    def fetched(self) -> "Piece":
        """The same piece with what is far away brought into memory."""

        def near(source: Source) -> Source:
            return source if source.near else Held(source, source.read(self.start, self.stop), self.start)

        job = self.job
        held = replace(job, sources=tuple(map(near, job.sources)), base=None if job.base is None else near(job.base))
        return Piece(held, self.start, self.stop)


class Merger:
    """Merges the tensors of a plan on a `device`. What is measured over the whole model is measured once, when first asked for."""

    def __init__(self, plan: MergePlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self._model_state: list[Any] = []
        self._lock = Lock()

    def merge(self, piece: Piece, write: Callable[[int, Tensor], None]) -> None:
        """Merge a piece block by block and `write` each block's start and its values in the job's dtype.

        A tensor's values are the same whatever pieces it is cut into. Raises `MergeError` that names the tensor for values
        that are not finite and for results that overflow the dtype.
        """
        job, arguments = piece.job, dict(piece.job.arguments)
        scaling = arguments.pop("scaling", 1.0)
        state = self._state(piece, arguments)
        for near in piece.parts():
            for s in near.starts():
                write(s, self._block(near.job, s, arguments, scaling, state))

    def _block(self, job: TensorJob, start: int, arguments: dict[str, Any], scaling: float, state: Any) -> Tensor:
        if job.method is None:
            return job.sources[0].read(start, min(start + job.block, job.elements)).to(job.spec.dtype)
        block, anchor = self._stack(job, start)
        merged = job.method.merge_block(
            block,
            arguments,
            rng=self._draws(job, start // job.block),
            measured=state,
            start=start + (job.offset if job.whole_model else 0),
            shape=job.spec.shape,
        )
        if anchor is not None:
            merged = merged.mul_(scaling) if scaling != 1 else merged
            merged = merged.add_(anchor)
        result = merged.to("cpu", job.spec.dtype)
        seen = result if job.spec.dtype is torch.float16 else merged
        if not math.isfinite(float(seen.sum())) and not torch.isfinite(seen).all():
            raise MergeError(
                f"Tensor {job.name!r} overflows {str(job.spec.dtype).removeprefix('torch.')} after {job.method.name}: "
                "choose dtype bfloat16 or float32, or smaller numbers."
            )
        return result

    def _state(self, piece: Piece, arguments: dict[str, Any]) -> Any:
        """What the method measures of the tensor, or of the whole model."""
        job = piece.job
        if job.method is None or job.method.measure is None:
            return None
        if not job.whole_model:
            return job.method.measured(
                lambda: self._blocks(job),
                job.elements,
                arguments,
                shape=job.spec.shape,
                draws=lambda number: self._draws(job, number),
            )
        with self._lock:
            if not self._model_state:
                merged = [j for j in self.plan.jobs.values() if j.method is not None]
                total = sum(j.elements for j in merged)
                blocks = lambda: (block for j in merged for block in self._blocks(j))  # noqa: E731
                self._model_state.append(job.method.measured(blocks, total, arguments))
        return self._model_state[0]

    def _blocks(self, job: TensorJob) -> Iterator[Tensor]:
        """The stacked blocks of a whole tensor; what is far away is fetched piece by piece."""
        for near in Piece(job, 0, job.elements).parts():
            for s in near.starts():
                yield self._stack(near.job, s)[0]

    def _stack(self, job: TensorJob, start: int) -> tuple[Tensor, Tensor | None]:
        """One block of all sources in float32, less the base's if there is one; and the base's."""
        stop = min(start + job.block, job.elements)
        block = torch.empty(len(job.sources), stop - start, device=self.device)
        anchor = None if job.base is None else job.base.read(start, stop).to(self.device, torch.float32, copy=True)
        for row, source in zip(block, job.sources, strict=True):
            row.copy_(source.read(start, stop))
            if anchor is not None and not source.delta:
                row -= anchor
        # A sum shows an infinity or NaN in one pass; finite numbers that add up to one are looked at again.
        if not math.isfinite(float(block.sum())) and not torch.isfinite(block).all():
            _blame(job, start, stop)
        return block, anchor

    def _draws(self, job: TensorJob, number: int) -> Draws:
        return Draws(self.plan.recipe.seed, job.models, job.name, number)


def _blame(job: TensorJob, start: int, stop: int) -> None:
    for source in job.inputs:
        broken = int((~torch.isfinite(source.read(start, stop).float())).sum())
        if broken:
            raise MergeError(f"{source.label} holds {broken} or more values that are NaN or infinite.")
    raise MergeError(f"Tensor {job.name!r}: the difference from the base overflows float32.")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Blocks are too small for torch's own threads, and with one thread sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def merge_tensor(merger: Merger, job: TensorJob) -> Tensor:
    """A job's whole tensor in memory."""
    result = torch.empty(job.elements, dtype=job.spec.dtype)

    def write(start: int, values: Tensor) -> None:
        result[start : start + len(values)] = values

    merger.merge(Piece(job, 0, job.elements), write)
    return result.reshape(job.spec.shape)


def pieces_of(job: TensorJob) -> Iterator[Piece]:
    """A job's pieces: one if it has to be measured first."""
    for start, stop in [(0, job.elements)] if job.measures else job.pieces():
        yield Piece(job, start, stop)


class _ReadAhead:
    """Pieces in order, brought near by several threads, at most `limit` bytes of them at once; one that needs more than
    `held` brings its parts near by itself, as often as it needs them."""

    def __init__(self, pieces: Iterable[Piece], limit: int, held: int) -> None:
        self._todo, self._limit, self._held = iter(pieces), limit, held
        self._waiting: deque[tuple[Piece, Future[Piece] | None, int]] = deque()
        self._flying, self._next, self._closed = 0, next(self._todo, None), False
        self._changed = Condition()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    def take(self) -> tuple[Piece, Future[Piece] | None, int] | None:
        """The next piece, itself once it is near, and the bytes to be given back for it; None at the end."""
        with self._changed:
            self._fill()
            while not self._waiting and self._next is not None and not self._closed:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._closed else None

    def give_back(self, size: int) -> None:
        """The bytes of a piece are free."""
        with self._changed:
            self._flying -= size
            self._fill()
            self._changed.notify_all()

    def close(self) -> None:
        """Read no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._next is not None and len(self._waiting) < 4 * READERS and not self._closed:
            size = self._next.nbytes
            if size == 0 or size > self._held:
                self._waiting.append((self._next, None, 0))
            elif self._flying == 0 or self._flying + size <= self._limit:
                self._waiting.append((self._next, self._pool.submit(self._next.fetched), size))
                self._flying += size
            else:
                return
            self._next = next(self._todo, None)


class _Output:
    """The shards that are being written: opened with their first piece, handed over when the last one is in."""

    def __init__(
        self,
        plan: MergePlan,
        shards: Sequence[Shard],
        folder: Path,
        finished: Callable[[Path], None],
        stop: Sequence[BaseException],
    ) -> None:
        self._folder, self._finished, self._stop = folder, finished, stop
        self._shards = {name: shard for shard in shards for name in shard.tensors}
        self._left = {s.name: sum(sum(1 for _ in pieces_of(plan.jobs[name])) for name in s.tensors) for s in shards}
        self._files: dict[str, ShardFile] = {}
        self._lock, self._opening, self._room = Lock(), Lock(), BoundedSemaphore(OPEN_SHARDS)

    def file(self, tensor: str) -> ShardFile:
        """Where a tensor goes. Waits for room if its shard is a new one: pieces come in the shards' order, so those of the
        shards before it are all in work."""
        shard = self._shards[tensor]
        with self._opening:
            if shard.name not in self._files:
                while not self._room.acquire(timeout=0.2):
                    if self._stop:
                        raise self._stop[0]
                self._files[shard.name] = ShardFile(shard, self._folder)
            return self._files[shard.name]

    def done(self, tensor: str) -> None:
        """One more piece is in."""
        name = self._shards[tensor].name
        with self._lock:
            self._left[name] -= 1
            whole = self._files.pop(name) if self._left[name] == 0 else None
        if whole is not None:
            self._finished(whole.finish())
            self._room.release()

    def abandon(self) -> None:
        """Remove what is not whole."""
        for file in self._files.values():
            file.abandon()
        self._files.clear()


def execute(
    plan: MergePlan,
    folder: Path,
    *,
    finished: Callable[[Path], None] = lambda path: None,
    skip: Callable[[Shard], bool] = lambda shard: False,
    max_memory: int | None = None,
    progress: bool = True,
) -> None:
    """Merge into shards in `folder`. `finished` gets each shard's path when it is whole; those with `skip(shard)` are left out.

    `max_memory` bounds the bytes of source tensors that are in memory at once; results do not depend on it. With several
    processes (accelerate's `PartialState`) each writes its own part of the shards.
    """
    state = PartialState()
    shards = [s for s in plan.shards[state.process_index :: state.num_processes] if not skip(s)]
    limit, held = (IN_FLIGHT, HELD) if max_memory is None else (max_memory, max_memory)
    stop: list[BaseException] = []
    output = _Output(plan, shards, folder, finished, stop)
    stream = _ReadAhead(_in_order(plan, shards), limit, held)
    merger, lock = Merger(plan, state.device), Lock()
    total, shown = sum(shard.nbytes for shard in shards), progress and state.is_local_main_process
    with one_torch_thread(), tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=not shown) as bar:

        def work() -> None:
            torch.set_num_threads(1)
            while not stop:
                with lock:
                    taken = stream.take()
                    if taken is None:
                        return
                    file, name = output.file(taken[0].job.name), taken[0].job.name

                def write(start: int, values: Tensor, file: ShardFile = file, name: str = name) -> None:
                    if stop:
                        raise stop[0]
                    file.write(name, start, values)
                    bar.update(values.nbytes)

                piece, future, size = taken
                merger.merge(piece if future is None else future.result(), write)
                del taken, piece, future
                stream.give_back(size)
                output.done(name)

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                stop.append(error)
                raise

        with ThreadPoolExecutor(_workers(state.device), thread_name_prefix="merge") as pool:
            running = [pool.submit(guarded) for _ in range(_workers(state.device))]
            try:
                wait(running)
                if stop:
                    raise stop[0]
            except BaseException as error:
                stop.append(error)
                stream.close()
                wait(running)
                output.abandon()
                raise
            finally:
                stream.close()
    state.wait_for_everyone()


def _in_order(plan: MergePlan, shards: Sequence[Shard]) -> Iterator[Piece]:
    """The shards' pieces, each shard's largest first so that no thread is left with a large one at the end."""
    for shard in shards:
        for job in sorted((plan.jobs[name] for name in shard.tensors), key=lambda job: -job.elements):
            yield from pieces_of(job)


def _workers(device: torch.device) -> int:
    return len(os.sched_getaffinity(0)) if device.type == "cpu" and hasattr(os, "sched_getaffinity") else 2
