"""Carrying out a plan: read ahead, merge block by block, write shards, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from hf_merge.checkpoints.checkpoint import READERS
from hf_merge.checkpoints.writer import Shard, ShardFile
from hf_merge.errors import MergeError
from hf_merge.merging.plan import MergePlan, TensorJob
from hf_merge.methods.method import BLOCK
from hf_merge.tensors.rng import Draws

IN_FLIGHT = 128 * 2**20
"""Bytes of source tensors read ahead at most; a piece that is larger by itself is read alone."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a job's tensor."""

    job: TensorJob
    start: int
    stop: int

    def nbytes(self, plan: MergePlan) -> int:
        """Bytes to be read for it."""
        width = sum(plan.inputs[i].index.tensors[name].dtype.itemsize for i, name in self.job.sources)
        return (self.stop - self.start) * width


def merge_piece(plan: MergePlan, piece: Piece, sources: Sequence[Tensor], device: torch.device) -> Tensor:
    """Merge one piece: flat `sources` (base first for a delta method) in any dtype to the flat result in the job's dtype.

    A tensor's result is the same whatever pieces it is cut into, as long as they start at multiples of `BLOCK`. Raises
    `MergeError` that names the tensor for values that are not finite and for results that overflow the dtype.
    """
    job, method, recipe = piece.job, plan.method, plan.recipe
    if not job.merged:
        return sources[0].clone()
    arguments = recipe.arguments()
    scaling = arguments.pop("scaling", 1.0)
    base, models = (sources[0], sources[1:]) if method.space == "delta" else (None, sources)
    names, result = [m.name for m in recipe.models], torch.empty(len(sources[0]), dtype=job.spec.dtype)
    buffer = torch.empty(len(models), min(BLOCK, len(result)), device=device)

    def stack(start: int) -> tuple[Tensor, Tensor | None]:
        stop = min(start + BLOCK, len(result))
        block = buffer[:, : stop - start]
        anchor = None if base is None else base[start:stop].to(device, torch.float32)
        for row, model in zip(block, models, strict=True):
            row.copy_(model[start:stop])
            if anchor is not None:
                row -= anchor
        if not torch.isfinite(block).all():
            _blame(plan, piece, sources, start, stop)
        return block, anchor

    starts = range(0, max(len(result), 1), BLOCK)  # an empty tensor is one empty block
    state = method.measured(lambda: (stack(s)[0] for s in starts), len(result), arguments)
    for s in starts:
        block, anchor = stack(s)
        rng = Draws(recipe.seed, names, job.name, (piece.start + s) // BLOCK)
        merged = method.merge_block(block, arguments, rng=rng, measured=state, start=s)
        if anchor is not None:
            merged = anchor + scaling * merged
        result[s : s + BLOCK] = merged
        if job.spec.dtype is torch.float16 and not torch.isfinite(result[s : s + BLOCK]).all():
            raise MergeError(f"Tensor {job.name!r} overflows float16 after {recipe.method}: choose dtype bfloat16 or float32.")
    return result


def _blame(plan: MergePlan, piece: Piece, sources: Sequence[Tensor], start: int, stop: int) -> None:
    for (i, name), source in zip(piece.job.sources, sources, strict=True):
        broken = int((~torch.isfinite(source[start:stop].float())).sum())
        if broken:
            raise MergeError(f"{plan.inputs[i].label}: tensor {name!r} holds {broken} or more values that are NaN or infinite.")
    raise MergeError(f"Tensor {piece.job.name!r}: the difference from the base overflows float32.")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Blocks are too small for torch's own threads, and with one thread sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_ahead(plan: MergePlan, pieces: Iterable[Piece]) -> Generator[tuple[Piece, list[Tensor]], None, None]:
    """The pieces in order with their sources, read by several threads, at most `IN_FLIGHT` bytes ahead of their use."""

    def read(piece: Piece) -> list[Tensor]:
        return [plan.inputs[i].read(name, piece.start, piece.stop) for i, name in piece.job.sources]

    waiting: deque[tuple[Piece, Future[list[Tensor]], int]] = deque()
    todo, flying = iter(pieces), 0
    upcoming = next(todo, None)
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        try:
            while waiting or upcoming is not None:
                while upcoming is not None and (not waiting or flying + upcoming.nbytes(plan) <= IN_FLIGHT):
                    size = upcoming.nbytes(plan)
                    waiting.append((upcoming, pool.submit(read, upcoming), size))
                    flying += size
                    upcoming = next(todo, None)
                piece, future, size = waiting.popleft()
                yield piece, future.result()
                del future
                flying -= size
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def execute(
    plan: MergePlan,
    folder: Path,
    *,
    finished: Callable[[Path], None] = lambda path: None,
    skip: Callable[[Shard], bool] = lambda shard: False,
    progress: bool = True,
) -> None:
    """Merge into shards in `folder`. `finished` gets each shard's path when it is whole; those with `skip(shard)` are left out.

    With several processes (accelerate's `PartialState`) each writes its own part of the shards.
    """
    state = PartialState()
    shards = [s for s in plan.shards[state.process_index :: state.num_processes] if not skip(s)]
    pieces = (Piece(plan.jobs[name], a, b) for shard in shards for name in shard.tensors for a, b in plan.jobs[name].pieces)
    stream = read_ahead(plan, pieces)
    total = sum(shard.nbytes for shard in shards)
    with (
        one_torch_thread(),
        tqdm(
            total=total, unit="B", unit_scale=True, desc="Merging", disable=not progress or not state.is_local_main_process
        ) as bar,
    ):
        for shard in shards:
            file = ShardFile(shard, folder)
            try:
                for _ in range(sum(len(plan.jobs[name].pieces) for name in shard.tensors)):
                    piece, sources = next(stream)
                    result = merge_piece(plan, piece, sources, state.device)
                    file.write(piece.job.name, piece.start, result)
                    bar.update(result.nbytes)
                    del sources, result
            except BaseException:
                file.abandon()
                raise
            finished(file.finish())
    stream.close()
    state.wait_for_everyone()
