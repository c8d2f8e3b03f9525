"""A recipe: which models are merged into what, with which method and numbers."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, count
from typing import Any

from hf_merge.errors import RecipeError, unknown
from hf_merge.methods import METHODS
from hf_merge.methods.method import Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.parameters import wrong_number, wrong_parameters
from hf_merge.recipes.tokenizer import TokenizerRequest
from hf_merge.recipes.tokenizer import to_dict as tokenizer_to_dict
from hf_merge.recipes.value import Value, graded, layered, parsed, plain, resolved
from hf_merge.shown import as_printed

DTYPES = ("float32", "bfloat16", "float16")
PRIVATE = ("refuse", "base", "owner", "drop")


@dataclass(frozen=True, kw_only=True)
class RecipeModel:
    """One of a recipe's models, its short `name` and its own parameters (`weight`, `density`; see `Recipe.parameters`).

    The name keys random masks and labels tables; it is the last part of the id unless given, and more of the id where that
    is another model's name too. It keeps a recipe's result the same wherever the model is read from.
    """

    ref: ModelRef
    name: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.ref.name)
        object.__setattr__(self, "parameters", {k: parsed(v) for k, v in self.parameters.items()})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to merge and how. Checks itself; raises `RecipeError` with all that is wrong in it.

    `models` may be given as ids, paths, `ModelRef`s or `RecipeModel`s. `parameters` are shared by all models; a model's own
    come first. Each is a number, a gradient over the layers (a list of numbers, from the first layer to the last; what is not
    in a layer takes the first), or a list of `{"filter": part of a tensor's name, "value": number or gradient}`, of which the
    first that matches holds.

    `layers` makes the result of slices of the models' layers; `models` are then those that a slice takes layers of, in order of
    their first one. `private` is for tensors that not all models have: "refuse" them, or keep the "base"'s, the only "owner"'s,
    or "drop" them. `dtype` is the result's (None keeps each tensor's dtype in the base, or else in the first model). `seed`
    keys the random methods. `tokenizer` asks for another vocabulary than the base's, or for a chat template.
    """

    method: str
    models: tuple[RecipeModel, ...]
    base: ModelRef | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    layers: LayerMap | None = None
    private: str = "refuse"
    dtype: str | None = None
    seed: int = 0
    tokenizer: TokenizerRequest | None = None

    def __post_init__(self) -> None:
        if isinstance(self.models, str):
            raise RecipeError(f"`models` is a list of models, got the text {self.models!r}.")
        models = tuple(m if isinstance(m, RecipeModel) else RecipeModel(ref=ModelRef.parse(m)) for m in self.models)
        models = distinct(models)
        if self.layers is not None:
            used = list(dict.fromkeys(source.model for part in self.layers.slices for source in part.sources))
            models = tuple(sorted((m for m in models if m.name in used), key=lambda m: used.index(m.name)))
        object.__setattr__(self, "models", models)
        object.__setattr__(self, "base", None if self.base is None else ModelRef.parse(self.base))
        object.__setattr__(self, "parameters", {k: parsed(v) for k, v in self.parameters.items()})
        wrong = list(self._problems()) or list(self._conflicts(METHODS[self.method]))
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _problems(self) -> Iterable[str]:
        method = METHODS.get(self.method) if isinstance(self.method, str) else None
        if method is None:
            yield unknown("merge method", self.method, METHODS)
            return
        for models in self._merged_together():
            yield from wrong_number(method, models)
        if method.space == "delta" and self.base is None:
            yield f"{method.name} merges differences from a base model: give `base`."
        if self.private not in PRIVATE:
            yield unknown("policy for `private` tensors", self.private, PRIVATE)
        if self.dtype is not None and self.dtype not in DTYPES:
            yield unknown("dtype", self.dtype, DTYPES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            yield f"`seed` is a whole number, got {self.seed!r}."
        yield from wrong_parameters(method, self.parameters, "the recipe's parameters", per_model=False)
        for model in self.models:
            yield from wrong_parameters(method, model.parameters, f"the parameters of {model.name!r}", per_model=True)
        for ref in self.tokenizer.refs if self.tokenizer else ():
            if ref not in (self.base, *(m.ref for m in self.models)):
                yield f"The tokenizer takes tokens of {ref}, which is not a model of the recipe."
        if self.layers is not None:
            yield from self.layers.problems(m.name for m in self.models)
            for number, part in enumerate(self.layers.slices, 1):
                yield from wrong_parameters(method, part.parameters, f"the parameters of slice {number}", per_model=False)
                for source in part.sources:
                    where = f"the parameters of {source.model!r} in slice {number}"
                    yield from wrong_parameters(method, source.parameters, where, per_model=True)

    def _merged_together(self) -> Iterable[int]:
        """How many models are merged at once, in each part of the result."""
        if self.layers is None:
            return [len(self.models)]
        merged = (part for part in self.layers.slices if not part.copied)
        return sorted({sum(bool(source.model) for source in part.sources) for part in merged} - {0})

    def _conflicts(self, method: Method) -> Iterable[str]:
        """What is wrong between parts that are each right."""
        arguments = self.arguments()
        shares = method.space == "weight" and "weights" in arguments and arguments.get("normalize", True)
        if self.constant and shares and abs(sum(arguments["weights"])) < 1e-9:
            how = " with `normalize`" if "normalize" in arguments else ""
            yield f"{method.name}{how} divides by the sum of the weights, and here that is 0."
        refs = [] if self.layers else [m.ref for m in self.models]
        if method.ordered and self.base in refs[1:] and self.base != refs[0]:
            yield f"{method.name} goes from the first model to the others: put the base {self.base} first, or leave `base` out."

    @property
    def inputs(self) -> tuple[ModelRef, ...]:
        """Every repository or folder that is read, each once: the base first, if there is one; adapters by themselves."""
        refs = ([self.base] if self.base else []) + [m.ref for m in self.models]
        return tuple(dict.fromkeys(part for ref in refs for part in ref.parts))

    @property
    def primary(self) -> ModelRef:
        """The model that lends its config, tokenizer and tensor order: the base, or else the first model."""
        return (self.base or self.models[0].ref).plain

    @property
    def deltas(self) -> bool:
        """Whether differences from the base are merged."""
        return METHODS[self.method].deltas(self.base is not None)

    @property
    def constant(self) -> bool:
        """Whether every tensor is merged with the same numbers."""
        own, shared = self.values()
        return self.layers is None and not any(isinstance(v, tuple) for values in (shared, *own) for v in values.values())

    @property
    def graded(self) -> bool:
        """Whether a number differs between layers."""
        own, shared = self.values()
        return any(graded(value) for values in (shared, *own) for value in values.values())

    def arguments(
        self, tensor: str = "", depth: float = 0.0, part: Slice | None = None, sources: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The method's keyword arguments: lists in the order of `models` for what each model may have of its own.

        They are those for `tensor`, at `depth` in [0, 1] of its layers (0 outside of them). With `part`, lists are in the order
        of its sources. `sources` are the tensor's names in the models, if they differ: filters of per-model numbers mean those.
        """
        own, shared = self.values(part)
        names = sources or [tensor] * len(own)
        found: dict[str, Any] = {}
        for name, parameter in METHODS[self.method].parameters.items():
            if parameter.per_model:
                numbers = (resolved(mine[name], at, depth) for mine, at in zip(own, names, strict=True))
                found["weights" if name == "weight" else name] = list(numbers)
            else:
                found[name] = resolved(shared[name], tensor, depth)
        return found

    def values(self, part: Slice | None = None) -> tuple[list[dict[str, Value]], dict[str, Value]]:
        """The values that hold in the end, in the whole merge or in a `part`: each source's own, and the shared ones.

        The first that is meant for a tensor holds, of the source's, its model's, the slice's, the recipe's and the default.
        """
        parameters = METHODS[self.method].parameters
        shared = [part.parameters, self.parameters] if part else [self.parameters]

        def value(name: str, levels: Iterable[Mapping[str, Value]]) -> Value:
            return layered((level[name] for level in levels if name in level), parameters[name].default)

        own = [[source.parameters, model.parameters, *shared] for model, source in self._sources(part)]
        return (
            [{name: value(name, levels) for name, p in parameters.items() if p.per_model} for levels in own],
            {name: value(name, shared) for name, p in parameters.items() if not p.per_model},
        )

    def _sources(self, part: Slice | None) -> list[tuple[RecipeModel, LayerRange]]:
        if part is None:
            return [(model, LayerRange(model=model.name)) for model in self.models]
        by_name = {model.name: model for model in self.models}
        return [(by_name[source.model], source) for source in part.sources if source.model]

    def pinned(self, commits: Mapping[ModelRef, str | None]) -> "Recipe":
        """The same recipe with every Hub model at the commit that `commits` gives for it."""

        def pin(ref: ModelRef) -> ModelRef:
            found = ref.plain.pinned(commits[ref.plain])
            return replace(found, adapter=pin(ref.adapter)) if ref.adapter else found

        models = tuple(replace(m, ref=pin(m.ref)) for m in self.models)
        tokenizer = self.tokenizer.pinned(pin) if self.tokenizer else None
        return replace(self, models=models, base=pin(self.base) if self.base else None, tokenizer=tokenizer)

    @property
    def digest(self) -> str:
        """16 hex digits that are the same for the same merge: method, models with revisions, effective numbers, dtype.

        Where the method draws random numbers, also what keys them: the models' names and the seed.
        """
        merges = self.layers is None or not all(part.copied for part in self.layers.slices)
        random = METHODS[self.method].random and merges
        first = self.models[0].ref if METHODS[self.method].ordered else None  # as if it were the base
        content = {
            "method": self.method if merges else None,
            "base": str(self.base) if self.base and self.base != first else None,
            "models": [[str(m.ref), m.name if random else None] for m in self.models],
            # A switch that is off is left out, so that a new one changes no digest.
            "arguments": {k: v for k, v in self.arguments().items() if v is not False} if self.constant else self._written(),
            "dtype": self.dtype,
            "seed": self.seed if random else None,
        }
        if self.private != "refuse":
            content["private"] = self.private
        if self.tokenizer is not None:
            content["tokenizer"] = tokenizer_to_dict(self.tokenizer)
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _written(self) -> list[Any]:
        """Every value that holds in the end, slice by slice, as JSON."""
        written: list[Any] = []
        place = {m.name: i for i, m in enumerate(self.models)}
        for part in sorted(self.layers.slices, key=lambda part: part.module) if self.layers else [None]:
            own, shared = ([], {}) if part is not None and part.copied else self.values(part)
            written.append([{name: plain(value) for name, value in values.items()} for values in (*own, shared)])
            if part is not None:
                merged = [(place[s.model], s.start, s.stop) for s in part.sources if s.model]
                bases = [
                    (None, s.start, s.stop)
                    for s in part.sources
                    if not s.model and (not merged or (s.start, s.stop) != merged[0][1:])
                ]
                written.append([part.module, bases, merged])
                # What is as usual is left out, so that new fields change no digest.
                usual = {"copied": False, "residual_scale": 1.0, "depth": None}
                written += [[name, getattr(part, name)] for name, value in usual.items() if getattr(part, name) != value]
        return written

    _repr_pretty_ = as_printed

    def __str__(self) -> str:
        on = f" on {self.base.name}" if self.base else ""
        if not self.constant:
            how = f", {len(self.layers.slices)} slices" if self.layers else ", numbers by tensor"
            return f"{METHODS[self.method].title} of {', '.join(m.name for m in self.models)}{how}{on}"
        numbers = self.arguments()
        own = {k: v for k, v in numbers.items() if isinstance(v, list)}
        models = []
        for i, model in enumerate(self.models):
            mine = ", ".join(f"{k.removesuffix('s')} {v[i]:.3g}" for k, v in own.items())
            models.append(f"{model.name} ({mine})" if mine else model.name)
        usual = {k: p.default for k, p in METHODS[self.method].parameters.items() if isinstance(p.default, bool)}
        shown = {k: v for k, v in numbers.items() if k not in own and usual.get(k) is not v}
        shared = "".join(f", {k} {v if isinstance(v, bool) else format(v, '.3g')}" for k, v in shown.items())
        return f"{METHODS[self.method].title} of {', '.join(models)}{shared}{on}"


def distinct(models: tuple[RecipeModel, ...]) -> tuple[RecipeModel, ...]:
    """A name stands for one model: models with equal names get their long name, and the same model again a number."""
    times = Counter(m.name for m in models)
    taken = {name for name, number in times.items() if number == 1}
    named = []
    for model in models:
        if times[model.name] > 1:
            long = model.ref.long_name
            model = replace(model, name=next(n for n in chain([long], (f"{long}-{i}" for i in count(2))) if n not in taken))
            taken.add(model.name)
        named.append(model)
    return tuple(named)
