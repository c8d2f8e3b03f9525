"""Merging one tensor, or a piece of one, block by block."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_merge.checkpoints.source import Held, Source
from hf_merge.errors import MergeError
from hf_merge.merging.folding import UNCHANGED
from hf_merge.merging.plan import THREADS, MergePlan, TensorJob
from hf_merge.tensors.precision import mix, narrow, widen
from hf_merge.tensors.rng import Draws

MIXED = 1 << 19
"""Elements of a weighted sum at once: more cost less time between them, until they leave the caches."""
STACKED = 48 * 2**20
"""Bytes of a tensor's stacked deltas up to which they are kept between the passes of a method that measures."""
Stack = tuple[int, Tensor, Tensor | None]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_mallopt: Callable[..., Any] = getattr(_LIBC, "mallopt", lambda *_: None)
_malloc_trim: Callable[..., Any] = getattr(_LIBC, "malloc_trim", lambda *_: None)
_FETCH = ThreadPoolExecutor(8, thread_name_prefix="fetch")


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

        # Several connections: one may be slow by itself.
        far = [source for source in self.job.inputs if not source.near]
        values = _FETCH.map(lambda source: source.read(self.start, self.stop), far)
        there = {id(source): Held(source, read, self.start) for source, read in zip(far, values, strict=True)}

        def near(source: Source) -> Source:
            return there.get(id(source), source)

        job = self.job
        held = replace(job, sources=tuple(map(near, job.sources)), base=None if job.base is None else near(job.base))
        return Piece(held, self.start, self.stop)


class Merger:
    """Merges the tensors of a plan on a `device`. What is measured over the whole model is measured once, when it is needed."""

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
        if job.gain != UNCHANGED:
            wide = replace(job, spec=replace(job.spec, dtype=torch.float32), gain=UNCHANGED)
            self.merge(replace(piece, job=wide), _gained(job, write))
            return
        if job.method is None:
            for near in piece.parts():
                for s in near.starts():
                    write(s, near.job.sources[0].read(s, min(s + job.block, near.stop)).to(job.spec.dtype))
            return
        scaling = arguments.pop("scaling", 1.0)
        stacks = _Stacks(self, piece)
        state = self._state(job, arguments, stacks.blocks)
        factors = job.method.factors(len(job.sources), arguments, state)
        if factors is not None and self.device.type == "cpu" and not any(source.delta for source in job.sources):
            for near in piece.parts():
                for start in range(near.start, max(near.stop, near.start + 1), MIXED):
                    write(start, self._mixed(near.job, start, min(start + MIXED, near.stop), factors, scaling))
            return
        for start, block, anchor in stacks:
            merged = job.method.merge_block(
                block,
                arguments,
                rng=self._draws(job, start // job.block),
                measured=state,
                start=start + (job.offset if job.whole_model else 0),
                shape=job.spec.shape,
            )
            result, finite = narrow(merged, anchor, scaling, job.spec.dtype)
            if not finite:
                _refuse(job, start, start + block.shape[1])
            write(start, result)

    def _mixed(self, job: TensorJob, start: int, stop: int, factors: Sequence[float], scaling: float) -> Tensor:
        """Elements [start, stop) of what is a weighted sum of its sources, which nothing else has to see."""
        base = None if job.base is None else job.base.read(start, stop)
        result, finite = mix([source.read(start, stop) for source in job.sources], factors, base, scaling, job.spec.dtype)
        if not finite:
            _refuse(job, start, stop)
        return result

    def _state(self, job: TensorJob, arguments: dict[str, Any], blocks: Callable[[], Iterator[Tensor]]) -> Any:
        """What the method measures of the tensor, or of the whole model."""
        if job.method is None or job.method.measure is None:
            return None
        if not job.whole_model:
            return job.method.measured(
                blocks,
                job.elements,
                arguments,
                shape=job.spec.shape,
                draws=lambda number: self._draws(job, number),
            )
        with self._lock:
            if not self._model_state:
                merged = [j for j in self.plan.jobs.values() if j.method is not None]
                total = sum(j.elements for j in merged)
                whole = [_Stacks(self, Piece(j, 0, j.elements)) for j in merged]
                blocks = lambda: (block for stacks in whole for block in stacks.blocks())  # noqa: E731
                self._model_state.append(job.method.measured(blocks, total, arguments))
        return self._model_state[0]

    def stack(self, job: TensorJob, start: int) -> tuple[Tensor, Tensor | None]:
        """One block of all sources in float32, less the base's if there is one; and the base's."""
        stop = min(start + job.block, job.elements)
        block = torch.empty(len(job.sources), stop - start, device=self.device)
        anchor = None if job.base is None else job.base.read(start, stop).to(self.device, torch.float32, copy=True)
        finite = [
            widen(source.read(start, stop), None if source.delta else anchor, row)
            for row, source in zip(block, job.sources, strict=True)
        ]
        if not all(finite):
            _blame(job, start, stop)
        return block, anchor

    def _draws(self, job: TensorJob, number: int) -> Draws:
        return Draws(self.plan.recipe.seed, job.models, job.key, number)


class _Stacks:
    """The stacked blocks of a piece, in order: where each starts, the deltas or weights `(models, b)`, and the base's.

    A tensor that is measured first is gone through several times: it is kept if it is small, else read and stacked anew.
    """

    def __init__(self, merger: Merger, piece: Piece) -> None:
        self._merger, self._piece = merger, piece
        job = piece.job
        again = job.measures and (job.method is None or job.method.coefficients is None)
        self._keep = again and 4 * job.elements * len(job.sources) <= STACKED
        self._kept: list[Stack] = []

    def __iter__(self) -> Iterator[Stack]:
        if self._kept:
            yield from self._kept
            return
        seen = []
        for near in self._piece.parts():
            for start in near.starts():
                stack = (start, *self._merger.stack(near.job, start))
                if self._keep:
                    seen.append(stack)
                yield stack
        self._kept = seen

    def blocks(self) -> Iterator[Tensor]:
        """The stacks alone."""
        return (block for _, block, _ in self)


def _gained(job: TensorJob, write: Callable[[int, Tensor], None]) -> Callable[[int, Tensor], None]:
    def gained(start: int, values: Tensor) -> None:
        result = values.mul(job.gain.factor).add_(job.gain.shift).to(job.spec.dtype)
        if not torch.isfinite(result).all():
            _refuse(job, start, start + len(values))
        write(start, result)

    return gained


def _refuse(job: TensorJob, start: int, stop: int) -> NoReturn:
    """Say why a result is not finite."""
    for source in job.inputs:
        if not torch.isfinite(source.read(start, stop)).all():
            _blame(job, start, stop)
    name = "" if job.method is None else job.method.name
    raise MergeError(
        f"Tensor {job.name!r} overflows {str(job.spec.dtype).removeprefix('torch.')} after {name}: "
        "choose dtype bfloat16 or float32, or smaller numbers."
    )


def _blame(job: TensorJob, start: int, stop: int) -> NoReturn:
    for source in job.inputs:
        broken = int((~torch.isfinite(source.read(start, stop).float())).sum())
        if broken:
            raise MergeError(f"{source.label} holds {broken} or more values that are NaN or infinite.")
    raise MergeError(f"Tensor {job.name!r}: the difference from the base overflows float32.")


@contextmanager
def one_torch_thread(*, again: bool = False) -> Iterator[None]:
    """Blocks are too small for torch's own threads, and with one thread sums have one order. And as buffers of a few megabytes
    come and go all the time, the allocator keeps their pages meanwhile: fresh ones cost more than most arithmetic. It keeps
    them afterwards as well if soon the same is done `again`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The thresholds of mallopt(3) from which memory is mapped anew and given back; glibc alone has them.
    _mallopt(_MMAP_THRESHOLD, 2**25)
    _mallopt(_TRIM_THRESHOLD, 2**28)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if not again:
            _mallopt(_MMAP_THRESHOLD, 2**17)
            _mallopt(_TRIM_THRESHOLD, 2**17)
            _malloc_trim(0)


def merge_into(merger: Merger, tensors: Mapping[str, Tensor]) -> None:
    """Merge the jobs of these names into contiguous tensors in memory, on several threads and the largest pieces first."""
    pieces = sorted((p for name in tensors for p in pieces_of(merger.plan.jobs[name])), key=lambda p: p.start - p.stop)
    with (
        one_torch_thread(again=True),
        torch.no_grad(),
        ThreadPoolExecutor(THREADS, "merge", initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        list(pool.map(lambda piece: _merge_piece(merger, piece, tensors[piece.job.name]), pieces))


def _merge_piece(merger: Merger, piece: Piece, tensor: Tensor) -> None:
    flat = tensor.detach().view(-1)

    def write(start: int, values: Tensor) -> None:
        flat[start : start + len(values)].copy_(values)

    merger.merge(piece, write)


def pieces_of(job: TensorJob) -> Iterator[Piece]:
    """A job's pieces: one if it has to be measured first."""
    for start, stop in [(0, job.elements)] if job.measures else job.pieces():
        yield Piece(job, start, stop)
