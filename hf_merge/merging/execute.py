"""Carrying out a plan: read ahead, merge on several threads, write shards, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import BoundedSemaphore, Condition, Lock

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_merge.checkpoints.checkpoint import READERS
from hf_merge.checkpoints.writer import Shard, ShardFile
from hf_merge.merging.merger import Merger, Piece, one_torch_thread, pieces_of
from hf_merge.merging.plan import HELD, IN_FLIGHT, THREADS, MergePlan
from hf_merge.merging.processes import processes

OPEN_SHARDS = 2
"""Output shards at once between their first tensor and the end of what is done with them when they are whole."""


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
    state = processes()
    shards = [s for s in plan.shards[state.process_index :: state.num_processes] if not skip(s)]
    limit, held = (IN_FLIGHT, HELD) if max_memory is None else (max_memory, max_memory)
    total, shown = sum(shard.nbytes for shard in shards), progress and state.is_local_main_process
    with one_torch_thread(), tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=not shown) as bar:
        stop: list[BaseException] = []
        output = _Output(plan, shards, folder, finished, stop)
        stream = _ReadAhead(_in_order(plan, shards), limit, held)
        _Work(Merger(plan, state.device), stream, output, stop, bar.update).run(THREADS if state.device.type == "cpu" else 2)
    state.wait_for_everyone()


class _Work:
    """The threads that merge: each takes the next piece, merges it and writes it, until there is none or one of them fails."""

    def __init__(
        self,
        merger: Merger,
        stream: _ReadAhead,
        output: _Output,
        stop: list[BaseException],
        told: Callable[[int], object],
    ) -> None:
        self.merger, self.stream, self.output, self.stop, self.told = merger, stream, output, stop, told
        self._lock = Lock()

    def run(self, threads: int) -> None:
        """Do all of it. Raises what the first of the threads that failed raised; nothing unfinished is left then."""
        with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
            running = [pool.submit(self._guarded) for _ in range(threads)]
            try:
                wait(running)
                if self.stop:
                    raise self.stop[0]
            except BaseException as error:
                self.stop.append(error)
                self.stream.close()
                wait(running)
                self.output.abandon()
                raise
            finally:
                self.stream.close()

    def _guarded(self) -> None:
        torch.set_num_threads(1)
        try:
            while not self.stop and self._one():
                pass
        except BaseException as error:
            self.stop.append(error)
            raise

    def _one(self) -> bool:
        """Merge the next piece; false if there is none."""
        with self._lock:
            taken = self.stream.take()
            if taken is None:
                return False
            name = taken[0].job.name
            file = self.output.file(name)

        def write(start: int, values: Tensor) -> None:
            if self.stop:
                raise self.stop[0]
            file.write(name, start, values)
            self.told(values.nbytes)

        piece, future, size = taken
        self.merger.merge(piece if future is None else future.result(), write)
        del taken, piece, future
        self.stream.give_back(size)
        self.output.done(name)
        return True


def _in_order(plan: MergePlan, shards: Sequence[Shard]) -> Iterator[Piece]:
    """The shards' pieces, each shard's largest first so that no thread is left with a large one at the end."""
    for shard in shards:
        for job in sorted((plan.jobs[name] for name in shard.tensors), key=lambda job: -job.elements):
            yield from pieces_of(job)
