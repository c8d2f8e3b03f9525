"""Several LoRA adapters of one base merged into one adapter, from their small factors alone."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_merge.checkpoints.adapter_config import CONFIG, plain_config
from hf_merge.checkpoints.adapter_names import locate
from hf_merge.checkpoints.adapters import WEIGHTS, Adapter, Change
from hf_merge.checkpoints.source import Source, elements
from hf_merge.checkpoints.writer import Shard, ShardFile, TensorSpec
from hf_merge.errors import MergeError, RecipeError

PIECE = 2**22
"""Elements of a full tensor that are merged at once."""


@dataclass(frozen=True)
class MergedModule:
    """The change to one module: the sum of the adapters' ranks, the rank that was kept, and what was lost.

    `norm` is the Frobenius norm of the exact merged change, `lost` that of its difference from the one written.
    """

    exact_rank: int
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """Relative Frobenius error; 0 for an exact change."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class AdapterReport:
    """An adapter that was written: its `folder`, its low-rank `modules`, and the tensors that stand in it in `full`."""

    folder: Path
    modules: Mapping[str, MergedModule]
    full: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative Frobenius error of all low-rank changes together."""
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        return math.hypot(*(module.lost for module in self.modules.values())) / norm if norm else 0.0

    @property
    def exact(self) -> bool:
        """Whether no module was truncated."""
        return all(module.rank == module.exact_rank for module in self.modules.values())

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        whole = f", {len(self.full)} full tensors" if self.full else ""
        if self.exact:
            return f"{self.folder}: one adapter, {len(self.modules)} modules of {shown}{whole}; exactly the weighted sum."
        name, worst = max(self.modules.items(), key=lambda item: item[1].error)
        return (
            f"{self.folder}: one adapter, {len(self.modules)} modules of {shown}{whole}; truncated: relative error "
            f"{self.error:.3g} over all, at most {worst.error:.3g} ({name}, rank {worst.rank} of {worst.exact_rank})."
        )


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    folder: Path,
    *,
    rank: int | None = None,
    scaling: float = 1.0,
    base: Mapping[str, Source] | None = None,
) -> AdapterReport:
    """Write `scaling * sum(weight * adapter)` as one plain LoRA adapter into `folder`: WEIGHTS and CONFIG, float32.

    The factors are concatenated, which is exact and has the sum of the ranks; `rank` truncates what is above it by the SVD of
    the product, computed from the factors alone, the best approximation of that rank (Eckart and Young, 1936). Tensors that an
    adapter holds in full (`modules_to_save`, biases) are merged as differences from the base, whose tensors `base` gives by
    name; it is not needed where the weights of all that hold one sum to 1. An adapter of weight 0 is left out.

    Raises `RecipeError` for weights or a rank that make no sense, `MergeError` for adapters that do not fit each other.
    """
    _check(adapters, weights, rank, scaling)
    used = [(adapter, scaling * weight) for adapter, weight in zip(adapters, weights, strict=True) if scaling * weight != 0]
    _check_fit([adapter for adapter, _ in used])
    changes = {module: None for adapter, _ in used for module in adapter.changes}
    modules = {module: [(a, a.changes[module], weight) for a, weight in used if module in a.changes] for module in changes}
    for module, parts in modules.items():
        if len({_outer_shapes(adapter, change) for adapter, change, _ in parts}) > 1:
            shapes = "; ".join(f"{adapter.label}: {_outer_shapes(adapter, change)}" for adapter, change, _ in parts)
            raise MergeError(f"Module {module!r} has another shape in each adapter: {shapes}. They are of different bases.")
    full = _full_tensors(used, modules, base)
    kept = {module: _kept_rank(parts, rank) for module, parts in modules.items()}
    specs = {key: spec for module, parts in modules.items() for key, spec in _specs(module, parts, kept[module]).items()}
    specs |= {key: TensorSpec(tensor.shape, tensor.dtype) for key, tensor in full.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file, merged = ShardFile(Shard(WEIGHTS, specs), folder), {}
    try:
        for module, parts in modules.items():
            a, b, merged[module] = _merged(parts, kept[module])
            for key, values in zip(_specs(module, parts, kept[module]), (a, b), strict=True):
                file.write(key, 0, values.reshape(-1))
        for key, tensor in full.items():
            for start, values in tensor.pieces():
                file.write(key, start, values)
    except BaseException:
        file.abandon()
        raise
    file.finish()
    alike = all(adapter.changes.keys() == modules.keys() for adapter, _ in used)
    config = plain_config([adapter.config for adapter, _ in used], kept, alike)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return AdapterReport(folder, merged, tuple(full))


_Part = tuple[Adapter, Change, float]
"""One adapter's change to a module, and its weight."""


def _check(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None, scaling: float) -> None:
    if not adapters or len(adapters) != len(weights):
        raise RecipeError(f"Expected one weight for each adapter, got {len(weights)} for {len(adapters)}.")
    if not all(math.isfinite(weight) for weight in (*weights, scaling)):
        raise RecipeError(f"Weights and scaling are finite numbers, got {list(weights)} and {scaling}.")
    if not any(scaling * weight for weight in weights):
        raise RecipeError(f"With the weights {list(weights)} and scaling {scaling} nothing is left of the adapters.")
    if rank is not None and rank < 1:
        raise RecipeError(f"rank is at least 1, got {rank}. None keeps the sum of the ranks, which is exact.")


def _check_fit(adapters: Sequence[Adapter]) -> None:
    bases = {base.rstrip("/"): adapter.label for adapter in adapters if (base := adapter.config.base)}
    if len(bases) > 1:
        listed = "".join(f"\n  - {label}: {base}" for base, label in bases.items())
        raise MergeError(f"The adapters were trained on different bases, and deltas from one mean nothing on another:{listed}")
    for adapter in adapters:
        if adapter.biases or adapter.tokens:
            kind = "trainable_token_indices" if adapter.tokens else "lora_bias"
            raise MergeError(
                f"{adapter.label} was trained with {kind}, which only a full model can take. Merge into one instead."
            )
        if adapter.config.content.get("use_dora"):
            raise MergeError(
                f"{adapter.label} is a DoRA adapter: it rescales the rows of the base, which is no low-rank change, so one "
                "adapter cannot hold it. Merge into a full model instead."
            )


def _outer_shapes(adapter: Adapter, change: Change) -> tuple[bool, tuple[int, ...], int]:
    return change.embedding, adapter.tensors[change.a].shape[1:], adapter.tensors[change.b].shape[0]


def _kept_rank(parts: Sequence[_Part], rank: int | None) -> int:
    total = sum(change.rank for _, change, _ in parts)
    if rank is None or total <= rank:
        return total
    adapter, change, _ = parts[0]
    a, b = adapter.tensors[change.a].shape, adapter.tensors[change.b].shape
    return min(rank, b[0], math.prod(a[1:]))


def _specs(module: str, parts: Sequence[_Part], rank: int) -> dict[str, TensorSpec]:
    """Name and form of a merged module's A and B, in this order."""
    adapter, change, _ = parts[0]
    a, b = adapter.tensors[change.a].shape, adapter.tensors[change.b].shape
    names = ("lora_embedding_A", "lora_embedding_B") if change.embedding else ("lora_A.weight", "lora_B.weight")
    shapes = (rank, *a[1:]), (b[0], rank, *b[2:])
    return {
        f"base_model.model.{module}.{name}": TensorSpec(shape, torch.float32) for name, shape in zip(names, shapes, strict=True)
    }


def _merged(parts: Sequence[_Part], rank: int) -> tuple[Tensor, Tensor, MergedModule]:
    """A (rank, in) and B (out, rank) of the weighted sum, float32, and what became of it."""
    factors = [(adapter.factors(change), weight) for adapter, change, weight in parts]
    a = torch.cat([a for (a, _), _ in factors])
    b = torch.cat([b * weight for (_, b), weight in factors], dim=1)
    total = len(a)
    if rank == total:
        squared = ((a.double() @ a.double().T) * (b.double().T @ b.double())).sum().clamp(min=0)
        return a, b, MergedModule(total, rank, float(squared.sqrt()), 0.0)
    # a.T = qa ra and b = qb rb with orthonormal columns: b @ a has the singular values of the small rb @ ra.T.
    (qa, ra), (qb, rb) = torch.linalg.qr(a.T.double()), torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    report = MergedModule(total, rank, float(s.square().sum().sqrt()), float(s[rank:].square().sum().sqrt()))
    return ((qa @ (vh[:rank].T * root)).T.float().contiguous(), (qb @ (u[:, :rank] * root)).float().contiguous(), report)


@dataclass(frozen=True)
class _Full:
    """A full tensor of the result: a weighted sum of sources, the base's weight being what is missing to 1."""

    parts: tuple[tuple[Source, float], ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].shape

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The start and the values of each piece, flat."""
        count = elements(self.parts[0][0])
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            if len(self.parts) == 1 and self.parts[0][1] == 1:
                yield start, self.parts[0][0].read(start, stop)
            else:
                total = torch.zeros(stop - start)
                for source, weight in self.parts:
                    total += weight * source.read(start, stop).to(torch.float32)
                yield start, total.to(self.dtype)


def _full_tensors(
    used: Sequence[tuple[Adapter, float]], modules: Mapping[str, Any], base: Mapping[str, Source] | None
) -> dict[str, _Full]:
    """The full tensors of the result by name in its file. Raises `MergeError` for one that needs a base that is not there."""
    full = {}
    for name in {name: None for adapter, _ in used for name in adapter.full}:
        holders = [(adapter.saved(name), weight) for adapter, weight in used if name in adapter.full]
        module, _, parameter = name.rpartition(".")
        frozen = parameter == "weight" and module in modules
        key = f"{module}.base_layer.{parameter}" if module in modules else name
        if frozen and any(name in adapter.trained for adapter, _ in used):
            raise MergeError(
                f"{module!r} is trained in full by one adapter and in low rank by another: no adapter can do both."
            )
        if len({source.shape for source, _ in holders}) > 1:
            shapes = "; ".join(f"{source.label}: {list(source.shape)}" for source, _ in holders)
            raise MergeError(f"{name!r} has another shape in each adapter: {shapes}.")
        full[f"base_model.model.{key}"] = _copied(name, holders) if frozen else _weighted(name, holders, base)
    return full


def _copied(name: str, holders: Sequence[tuple[Source, float]]) -> _Full:
    """The copy of a frozen embedding that PEFT saves beside its factors; all that hold one must hold the same."""
    first, *others = [source for source, _ in holders]
    count = elements(first)
    for other in others:
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            if not torch.equal(first.read(start, stop).float(), other.read(start, stop).float()):
                raise MergeError(
                    f"{name!r} is frozen under the factors, and yet {first.label} and {other.label} hold other values: "
                    "they were trained on different bases, or resized it differently."
                )
    return _Full(((first, 1.0),), first.dtype)


def _weighted(name: str, holders: Sequence[tuple[Source, float]], base: Mapping[str, Source] | None) -> _Full:
    rest = 1 - math.fsum(weight for _, weight in holders)
    dtype = holders[0][0].dtype
    if math.isclose(rest, 0, abs_tol=1e-9):
        return _Full(tuple(holders), dtype)
    known = locate(name, base) if base is not None else None
    if base is None or known is None:
        held = ", ".join(f"{source.label} (weight {weight:g})" for source, weight in holders)
        raise MergeError(
            f"{name!r} is saved in full ({held}): to weigh its difference from the base, the base's tensor is needed"
            f"{', and the base has none of that name' if base is not None else ''}. Give the base, or weights that sum to 1 "
            "over the adapters that hold it."
        )
    if base[known].shape != holders[0][0].shape:
        raise MergeError(
            f"{holders[0][0].label} has shape {list(holders[0][0].shape)}, in the base it is {list(base[known].shape)}: "
            "a resized tensor has no difference from it. Give weights that sum to 1 over the adapters that hold it."
        )
    return _Full(((base[known], rest), *holders), dtype)
