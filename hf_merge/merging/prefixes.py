"""Hidden states of paths' prefixes, kept: what one path has run on a batch, the next one that starts alike takes over.

Kept by the batch (all that the model was given, token by token since its cache was empty) and by the prefix of the path, so a
hidden state is that of the same layers in the same order on the same tensors: results are the same bit for bit. With a cache of
keys and values, as in generation, a layer's own entries are kept as well and put into the new cache, for the prompt and for
every token after it, as long as a whole batch goes the same way.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

LIMIT = 2**30
"""Bytes of hidden states, keys and values that are kept unless told otherwise."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """What a layer gave: its output, and the arguments with which it updated the cache."""

    output: Any
    updates: tuple[tuple[Any, ...], ...]
    nbytes: int


@dataclass(eq=False)
class _Pass:
    """One pass of the model: its batch, and the entries of the path's first layers that need not be run."""

    batch: bytes
    cache: Cache | None
    found: list[_Entry | None] = field(default_factory=list)


class Prefixes:
    """Keeps at most `limit` bytes, the latest used.

    `asked` and `done` count layer-evaluations, one for each token that passes one layer: those that the paths needed, and those
    that were run. Passes that ask for attentions or hidden states, and caches that something else has changed (beams), are run
    in full.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.nbytes, self.asked, self.done = limit, 0, 0, 0
        self._paused = False
        self._kept: OrderedDict[tuple[bytes, bytes], _Entry] = OrderedDict()
        self._prefixes: list[bytes] = []
        self._pass: _Pass | None = None
        self._caches: WeakKeyDictionary[Cache, tuple[bytes, object]] = WeakKeyDictionary()

    def watch(self, model: PreTrainedModel) -> None:
        """Take part in every pass of `model`, whose layers run what `shared` gives."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def follow(self, keys: Sequence[Hashable]) -> None:
        """From now on the model's layers are these. Equal keys stand for equal layers with equal weights."""
        self._prefixes, prefix = [], b""
        for key in keys:
            prefix = hashlib.blake2b(prefix + repr(key).encode(), digest_size=16).digest()
            self._prefixes.append(prefix)

    def shared(self, position: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run(hidden_states, …)` of the layer at `position`, run only where its result is not kept."""

        def layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            tokens = hidden_states.shape[:-1].numel()
            self.asked += tokens
            now = self._pass
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            if now is not None and position == 0:
                self._look_up(now, cache)
            if now is not None and position < len(now.found):
                return _taken(now, position, hidden_states)
            self.done += tokens
            if now is None:
                return run(hidden_states, *args, **kwargs)
            with _recorded(cache) as updates:
                output = run(hidden_states, *args, **kwargs)
            self._keep((now.batch, self._prefixes[position]), output, tuple(updates))
            return output

        return layer

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile every layer is run, nothing is kept, nothing is counted."""
        before, counts = self._paused, (self.asked, self.done)
        self._paused = True
        try:
            yield
        finally:
            self._paused, (self.asked, self.done) = before, counts

    def clear(self) -> None:
        """Forget everything but the counts."""
        self._kept.clear()
        self.nbytes = 0

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        history: bytes | None = b""
        if cache is not None and cache.get_seq_length() > 0:
            known, witness = self._caches.get(cache, (None, None))
            history = known if witness is _first_keys(cache) else None
        whole = kwargs.get("output_attentions") or kwargs.get("output_hidden_states")
        if history is None or whole or model.training or self._paused:
            self._pass = None
            return
        self._pass = _Pass(_digest(history, args, kwargs), cache)

    def _look_up(self, now: _Pass, cache: Cache | None) -> None:
        now.cache = cache
        now.batch = hashlib.blake2b(now.batch + type(cache).__name__.encode(), digest_size=16).digest()
        entries = [self._kept.get((now.batch, prefix)) for prefix in self._prefixes]
        if cache is None:  # the last one that is there is all that it takes
            there = [i for i, entry in enumerate(entries) if entry is not None]
            now.found = entries[: there[-1] + 1] if there else []
        else:
            now.found = entries[: next((i for i, entry in enumerate(entries) if entry is None), len(entries))]
        for prefix in self._prefixes[: len(now.found)]:
            if (now.batch, prefix) in self._kept:
                self._kept.move_to_end((now.batch, prefix))

    def _end(self, *_: Any) -> None:
        now, self._pass = self._pass, None
        if now is not None and now.cache is not None and now.cache.layers:
            self._caches[now.cache] = (now.batch, _first_keys(now.cache))

    def _keep(self, key: tuple[bytes, bytes], output: Any, updates: tuple[tuple[Any, ...], ...]) -> None:
        tensors = [value for part in (output, *updates) for value in (part if isinstance(part, tuple) else (part,))]
        nbytes = sum(value.untyped_storage().nbytes() for value in tensors if isinstance(value, Tensor))
        if nbytes > self.limit or key in self._kept:
            return
        self._kept[key] = _Entry(output, updates, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes


def _first_keys(cache: Cache) -> object:
    """The tensor that every update, and whatever else changes the cache, replaces."""
    return getattr(cache.layers[0], "keys", None)


def _taken(now: _Pass, position: int, hidden_states: Tensor) -> Any:
    """What the layer gave before; its entries go into the cache. Ahead of the last kept one any of the right form will do."""
    entry = now.found[position]
    if now.cache is not None and entry is not None:
        for keys, values, *more in entry.updates:
            now.cache.update(keys, values, position, *more)
    if entry is not None:
        return entry.output
    last = now.found[-1]
    return (hidden_states,) if last is not None and isinstance(last.output, tuple) else hidden_states


@contextmanager
def _recorded(cache: Cache | None) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every update of the cache, without the layer's number."""
    updates: list[tuple[Any, ...]] = []
    if cache is None:
        yield updates
        return
    original = cache.update

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        updates.append((keys, values, *args))
        return original(keys, values, layer_idx, *args, **kwargs)

    cache.update = update  # type: ignore[method-assign, assignment]
    try:
        yield updates
    finally:
        del cache.update


def _digest(history: bytes, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """Of all tensors that a pass is given, after those of the passes before it."""
    found = hashlib.blake2b(history, digest_size=16)
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.dim() else str(flat.item()).encode())
    return found.digest()
