"""LoRA repositories (PEFT's format) read as deltas from a base, tensor by tensor."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from hf_merge.checkpoints.adapter_config import CONFIG, FOLD, AdapterConfig
from hf_merge.checkpoints.adapter_names import BIAS, FACTOR, MAGNITUDE, TOKENS, full_name, is_wrapped, locate, of_kind
from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.index import Files, TensorEntry, read_index, some
from hf_merge.checkpoints.low_rank import Adapted, Factors, LowRank, Recent
from hf_merge.checkpoints.rows import RowMap, Rows
from hf_merge.checkpoints.source import Source, Stored, Zeros
from hf_merge.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"

_T = TypeVar("_T")


def is_adapter(files: Files) -> bool:
    """Whether a repository is an adapter and not a full model."""
    return CONFIG in files.sizes


@dataclass(frozen=True)
class Change:
    """The low-rank change to one module's weight: the names of its factors in the file, `B` times `A` times `scale`.

    A is (rank, in, …) and B (out, rank), in the module's own terms; `embedding` weights are stored (in, out).
    """

    module: str
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool
    magnitude: str | None


class Adapter:
    """A LoRA repository. Opening it reads its config and its file's header, and nothing else.

    Raises `CheckpointError` for an adapter that is not LoRA, is broken, or has settings that are not understood.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.label = checkpoint, checkpoint.label
        content = checkpoint.json(CONFIG)
        if content is None:
            raise CheckpointError(f"{self.label} has no {CONFIG}: it is not an adapter.")
        self.config = AdapterConfig(self.label, content)
        if WEIGHTS not in checkpoint.files.sizes:
            raise CheckpointError(f"{self.label} has no {WEIGHTS}. Load it with PEFT and save it again (`save_pretrained`).")
        # A checkpoint looks for a model's file; everything else about it (reads, holding, storing) goes by its index.
        checkpoint.index = read_index(checkpoint.files, WEIGHTS)
        self._recent = Recent()

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the file, under its name there."""
        return self.checkpoint.index.tensors

    @cached_property
    def changes(self) -> Mapping[str, Change]:
        """The low-rank changes by module of the base. Raises `CheckpointError` for factors that do not belong together."""
        factors: dict[str, dict[str, str]] = {}
        for key, found in of_kind(FACTOR, self.tensors).items():
            factors.setdefault(found["module"], {})[found["side"]] = key
        for key, found in of_kind(MAGNITUDE, self.tensors).items():
            factors.setdefault(found["module"], {})["magnitude"] = key
        return {module: self._change(module, keys) for module, keys in factors.items()}

    def _change(self, module: str, keys: Mapping[str, str]) -> Change:
        where = f"{self.label}: the adapter's module {module!r}"
        embedding = "embedding_A" in keys
        a, b = (keys.get(f"embedding_{side}" if embedding else side) for side in "AB")
        if a is None or b is None or len(keys) != 2 + ("magnitude" in keys):
            raise CheckpointError(f"{where} has the factors {sorted(keys)}, expected A and B.")
        if ("magnitude" in keys) != bool(self.config.content.get("use_dora")):
            raise CheckpointError(f"{where} has {'a' if 'magnitude' in keys else 'no'} DoRA magnitude, against {CONFIG}.")
        rank, first, second = self.config.rank(module), self.tensors[a].shape, self.tensors[b].shape
        if first[:1] != (rank,) or len(second) < 2 or second[1] != rank or math.prod(second[2:]) != 1:
            raise CheckpointError(
                f"{where} has A of shape {list(first)} and B of {list(second)}, which are not of the rank {rank} in {CONFIG}."
            )
        return Change(module, a, b, rank, self.config.scale(module), embedding, keys.get("magnitude"))

    @cached_property
    def full(self) -> Mapping[str, str]:
        """Tensors saved in full (`modules_to_save`, trained biases, embeddings): names in the file by tensor of the base.

        Raises `CheckpointError` for tensors of a kind that is not understood.
        """
        full: dict[str, str] = {}
        for key in self.tensors:
            try:
                name = full_name(key)
            except ValueError as error:
                raise CheckpointError(f"{self.label}: tensor {key!r} is of a kind that is not understood. {FOLD}") from error
            # With bias="all" PEFT stores the bias of a module to save twice; the name without a wrapper is the one it loads.
            if name is not None and (name not in full or not is_wrapped(key)):
                full[name] = key
        return full

    @cached_property
    def biases(self) -> Mapping[str, str]:
        """Changes of biases (`lora_bias`), without their modules' scales: names in the file by tensor of the base."""
        return {f"{found['module']}.bias": key for key, found in of_kind(BIAS, self.tensors).items()}

    @cached_property
    def tokens(self) -> Mapping[str, str]:
        """Rows of embeddings that were trained by themselves: names in the file by tensor of the base."""
        return {f"{found['module']}.weight": key for key, found in of_kind(TOKENS, self.tensors).items()}

    @cached_property
    def trained(self) -> frozenset[str]:
        """The names in `full` that belong to `modules_to_save`; other weights there are copies of frozen embeddings."""
        entries = self.config.modules_to_save
        # As PEFT matches them: by the end of a module's name, in the middle of a word too ("norm" is "input_layernorm").
        parents = {name: accumulate(name.split(".")[:-1], "{}.{}".format) for name in self.full}
        return frozenset(name for name, modules in parents.items() if any(module.endswith(entries) for module in modules))

    def saved(self, name: str) -> Source:
        """A tensor in `full`."""
        return Stored(self.checkpoint, self.full[name])

    def sources(
        self,
        names: Iterable[str],
        base: Callable[[str], Source],
        tied: Mapping[str, str] | None = None,
        *,
        private: bool = False,
    ) -> dict[str, Source]:
        """What the adapter makes of each tensor of a base, by name: its delta, or the full tensor that takes the base's place.

        `base` gives a tensor of the base: its shape is used now, its values only for DoRA and for trained rows of an embedding,
        and only when they are read. `tied` maps tied tensors to those they are copies of. With `private`, modules that were
        trained and that the base does not have (a head) are given as well, under their own names. A full tensor (`delta` is
        False) may have another number of rows.
        Raises `CheckpointError` for a tensor of the adapter that the base does not have, or has in another shape.
        """
        names, tied = list(names), tied or {}
        known = {*names, *tied}
        heads = {name for name in self.trained if private and locate(name, known) is None}
        changed = self._located({f"{module}.weight": change for module, change in self.changes.items()}, known)
        full = self._located({name: key for name, key in self.full.items() if name not in heads}, known)
        tokens, biases = self._located(self.tokens, known), self._located(self.biases, known)
        self._check_tied({**full, **changed}, tied)
        originals = {name: Stored(self.checkpoint, full[name]) if name in full else base(name) for name in names}
        for name in full.keys() & originals.keys():
            self._check_columns(name, originals[name].shape, base(name).shape)
        transposed = self._transposed({n: (change, originals[n].shape) for n, change in changed.items() if n in originals})
        sources: dict[str, Source] = {}
        for name, original in originals.items():
            if name in changed and name in tokens:
                raise CheckpointError(f"{self.label}: {name!r} has a low-rank change and trained rows at once. {FOLD}")
            if name in changed:
                sources[name] = self._changed(name, changed[name], original, transposed[name], name in full)
            elif name in tokens:
                sources[name] = self._with_rows(name, tokens[name], original)
            elif name in biases:
                sources[name] = self._biased(name, biases[name], original, name in full)
            elif name in full:
                sources[name] = original
            else:
                sources[name] = Zeros(f"{self.label}: tensor {name!r}", original.shape)
        return sources | {name: self.saved(name) for name in sorted(heads)}

    def _with_rows(self, name: str, key: str, original: Source) -> Source:
        rows = self.config.tokens(of_kind(TOKENS, [key])[key]["module"])
        count, shape = original.shape[0], self.tensors[key].shape
        if shape != (len(rows), *original.shape[1:]) or max(rows, default=0) >= count:
            raise CheckpointError(
                f"{self.label}: the adapter trained the rows {rows} of {name!r} and saved a tensor of shape {list(shape)}, "
                f"the base has {list(original.shape)}."
            )
        source, row = torch.zeros(count, dtype=torch.int64), torch.arange(count)
        source[rows], row[rows] = 1, torch.arange(len(rows))
        return Rows((original, Stored(self.checkpoint, key)), RowMap(torch.arange(count + 1), source, row))

    def _biased(self, name: str, key: str, original: Source, saved: bool) -> Source:
        if self.tensors[key].shape != original.shape:
            raise CheckpointError(
                f"{self.label}: the adapter's change to {name!r} has shape {list(self.tensors[key].shape)}, the base has "
                f"{list(original.shape)}."
            )
        scale = self.config.scale(of_kind(BIAS, [key])[key]["module"])
        delta = LowRank(
            label=f"{self.label}: tensor {name!r}",
            shape=original.shape,
            nbytes=self.tensors[key].nbytes,
            factors=lambda: Factors(self._float(key)[:, None] * scale, torch.ones(1, 1)),
        )
        return Adapted(original, delta, None, False, self._recent) if saved else delta

    def _check_columns(self, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape[1:] != wanted[1:] or len(shape) != len(wanted):
            raise CheckpointError(
                f"{self.label}: the adapter saved {name!r} with shape {list(shape)}, the base has {list(wanted)}. "
                f"It was trained on {self.config.base or 'another model'}."
            )

    def _located(self, own: Mapping[str, _T], known: Collection[str]) -> dict[str, _T]:
        missing = [name for name in own if locate(name, known) is None]
        if missing:
            trained_on = f" It was trained on {self.config.base}." if self.config.base else ""
            raise CheckpointError(
                f"{self.label}: the base has no such tensors as the adapter changes: {some(missing)}.{trained_on}"
            )
        located: dict[str, _T] = {}
        for name, value in own.items():
            place = locate(name, known) or ""
            if place in located:
                raise CheckpointError(
                    f"{self.label}: the adapter changes {place!r} of the base under two names, one is {name!r}."
                )
            located[place] = value
        return located

    def _check_tied(self, touched: Mapping[str, object], tied: Mapping[str, str]) -> None:
        trained = {f"{module}.weight" for module in self.changes} | self.trained
        for copy, source in tied.items():
            both = copy in touched and source in touched
            apart = {copy, source} & {locate(name, {copy, source}) for name in trained}
            if (copy in touched or source in touched) and not (
                both and (self.config.content.get("ensure_weight_tying") or not apart)
            ):
                raise CheckpointError(
                    f"{self.label}: the base ties {copy!r} to {source!r}, and the adapter changes "
                    f"{'each in its own way' if both else 'only one of them'}: one tensor cannot hold both. "
                    "Save the base untied (tie_word_embeddings=False) and merge with that, or train with ensure_weight_tying."
                )

    def _transposed(self, changed: Mapping[str, tuple[Change, tuple[int, ...]]]) -> dict[str, bool]:
        """Whether each weight is stored (in, out). The config's one `fan_in_fan_out` is what PEFT met last, so the shapes
        decide; it stands only for square weights without a rectangular one beside them."""
        ways: dict[str, bool | None] = {}
        for name, (change, shape) in changed.items():
            straight, across = self._shapes(change)
            fits = shape == straight and not change.embedding, shape == across and len(shape) == 2
            if not any(fits):
                given = list(across if change.embedding else straight)
                raise CheckpointError(
                    f"{self.label}: the adapter's change to {name!r} has shape {given}, the base has {list(shape)}. "
                    f"It was trained on {self.config.base or 'another model'}."
                )
            ways[name] = None if all(fits) else fits[1]
        seen = {way for name, way in ways.items() if not changed[name][0].embedding and way is not None}
        square = True in seen if seen else bool(self.config.content.get("fan_in_fan_out"))
        return {name: square if way is None else way for name, way in ways.items()}

    def _shapes(self, change: Change) -> tuple[tuple[int, ...], tuple[int, ...]]:
        a, b = self.tensors[change.a].shape, self.tensors[change.b].shape
        return (b[0], *a[1:]), (*a[1:], b[0])

    def _changed(self, name: str, change: Change, original: Source, transposed: bool, copied: bool) -> Source:
        delta = LowRank(
            label=f"{self.label}: tensor {name!r}",
            shape=original.shape,
            nbytes=self.tensors[change.a].nbytes + self.tensors[change.b].nbytes,
            factors=lambda: self._oriented(change, transposed),
        )
        if change.magnitude is None:
            return Adapted(original, delta, None, transposed, self._recent) if copied else delta
        magnitude, lengths = change.magnitude, delta.shape[1 if transposed else 0]
        if len(delta.shape) != 2 or self.tensors[magnitude].elements != lengths:
            raise CheckpointError(
                f"{self.label}: DoRA on {name!r} has {self.tensors[magnitude].elements} magnitudes for a weight of shape "
                f"{list(delta.shape)}; only matrices with one magnitude per output can be read. {FOLD}"
            )
        return Adapted(original, delta, lambda: self._float(magnitude).reshape(-1), transposed, self._recent)

    def _oriented(self, change: Change, transposed: bool) -> Factors:
        def compute() -> Factors:
            a, b = self.factors(change)
            return Factors(a.T.contiguous(), b.T.contiguous()) if transposed else Factors(b, a)

        found: Factors = self._recent.get((change.module, transposed), compute)
        return found

    def factors(self, change: Change) -> tuple[Tensor, Tensor]:
        """A (rank, in) and scale * B (out, rank) of a change, read now, float32; further dimensions of A are flattened."""
        return self._float(change.a).flatten(1), self._float(change.b).flatten(1) * change.scale

    def _float(self, key: str) -> Tensor:
        return self.checkpoint.read(key).to(torch.float32).reshape(self.tensors[key].shape)
