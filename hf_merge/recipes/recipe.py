"""A recipe: which models are merged into what, with which method and numbers."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, count
from typing import Any

from hf_merge.errors import RecipeError, unknown
from hf_merge.methods import METHODS
from hf_merge.methods.method import Method
from hf_merge.model_ref import ModelRef

Number = float | bool
DTYPES = ("float32", "bfloat16", "float16")
UNIT_INTERVAL = frozenset({"density", "t"})


@dataclass(frozen=True, kw_only=True)
class RecipeModel:
    """One of a recipe's models, its short `name` and its own parameters (`weight`, `density`).

    The name keys random masks and labels tables; it is the last part of the id unless given, and more of the id where that
    is another model's name too. It keeps a recipe's result the same wherever the model is read from.
    """

    ref: ModelRef
    name: str = ""
    parameters: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.ref.name)
        object.__setattr__(self, "parameters", dict(self.parameters))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to merge and how. Checks itself; raises `RecipeError` with all that is wrong in it.

    `models` may be given as ids, paths, `ModelRef`s or `RecipeModel`s. `parameters` are shared by all models; a model's own
    come first. `dtype` is the result's (None keeps each tensor's dtype in the base, or else in the first model). `seed`
    keys the random methods.
    """

    method: str
    models: tuple[RecipeModel, ...]
    base: ModelRef | None = None
    parameters: Mapping[str, Number] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.models, str):
            raise RecipeError(f"`models` is a list of models, got the text {self.models!r}.")
        models = tuple(m if isinstance(m, RecipeModel) else RecipeModel(ref=ModelRef.parse(m)) for m in self.models)
        object.__setattr__(self, "models", _distinct(models))
        object.__setattr__(self, "base", None if self.base is None else ModelRef.parse(self.base))
        object.__setattr__(self, "parameters", dict(self.parameters))
        wrong = list(self._problems()) or list(self._conflicts(METHODS[self.method]))
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _problems(self) -> Iterable[str]:
        method = METHODS.get(self.method) if isinstance(self.method, str) else None
        if method is None:
            yield unknown("merge method", self.method, METHODS)
            return
        least, most = method.models
        if not least <= len(self.models) <= (most or len(self.models)):
            wanted = f"exactly {least}" if least == most else f"at least {least}"
            yield f"{method.name} merges {wanted} models, got {len(self.models)}."
        if method.space == "delta" and self.base is None:
            yield f"{method.name} merges differences from a base model: give `base`."
        if self.dtype is not None and self.dtype not in DTYPES:
            yield unknown("dtype", self.dtype, DTYPES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            yield f"`seed` is a whole number, got {self.seed!r}."
        yield from _wrong_parameters(method, self.parameters, "the recipe's parameters", per_model=False)
        for model in self.models:
            yield from _wrong_parameters(method, model.parameters, f"the parameters of {model.name!r}", per_model=True)

    def _conflicts(self, method: Method) -> Iterable[str]:
        """What is wrong between parts that are each right."""
        arguments = self.arguments()
        shares = method.space == "weight" and "weights" in arguments and arguments.get("normalize", True)
        if shares and abs(sum(arguments["weights"])) < 1e-9:
            how = " with `normalize`" if "normalize" in arguments else ""
            yield f"{method.name}{how} divides by the sum of the weights, and here that is 0."
        if method.ordered and self.base in [m.ref for m in self.models[1:]]:
            yield f"{method.name} goes from the first model to the others: put the base {self.base} first, or leave `base` out."

    @property
    def inputs(self) -> tuple[ModelRef, ...]:
        """Every model that is read, each once: the base first, if the method or the companions need one."""
        refs = ([self.base] if self.base else []) + [m.ref for m in self.models]
        return tuple(dict.fromkeys(refs))

    @property
    def primary(self) -> ModelRef:
        """The model that lends its config, tokenizer and tensor order: the base, or else the first model."""
        return self.base or self.models[0].ref

    def arguments(self) -> dict[str, Any]:
        """The method's keyword arguments: lists in the order of `models` for what each model may have of its own."""
        found: dict[str, Any] = {}
        for name, parameter in METHODS[self.method].parameters.items():
            shared = self.parameters.get(name, parameter.default)
            if parameter.per_model:
                own = [float(m.parameters.get(name, shared)) for m in self.models]
                found["weights" if name == "weight" else name] = own
            else:
                found[name] = shared if isinstance(shared, bool) else float(shared)
        return found

    def pinned(self, commits: Mapping[ModelRef, str | None]) -> "Recipe":
        """The same recipe with every Hub model at the commit that `commits` gives for it."""
        models = tuple(replace(m, ref=m.ref.pinned(commits[m.ref])) for m in self.models)
        return replace(self, models=models, base=self.base.pinned(commits[self.base]) if self.base else None)

    @property
    def digest(self) -> str:
        """16 hex digits that are the same for the same merge: method, models with revisions, effective numbers, dtype.

        Where the method draws random numbers, also what keys them: the models' names and the seed.
        """
        random = METHODS[self.method].random
        content = {
            "method": self.method,
            "base": str(self.base) if self.base else None,
            "models": [[str(m.ref), m.name if random else None] for m in self.models],
            "arguments": self.arguments(),
            "dtype": self.dtype,
            "seed": self.seed if random else None,
        }
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        numbers = self.arguments()
        own = {k: v for k, v in numbers.items() if isinstance(v, list)}
        models = []
        for i, model in enumerate(self.models):
            mine = ", ".join(f"{k.removesuffix('s')} {v[i]:.3g}" for k, v in own.items())
            models.append(f"{model.name} ({mine})" if mine else model.name)
        shared = "".join(f", {k} {v if isinstance(v, bool) else format(v, '.3g')}" for k, v in numbers.items() if k not in own)
        on = f" on {self.base.name}" if self.base else ""
        return f"{METHODS[self.method].title} of {', '.join(models)}{shared}{on}"


def _distinct(models: tuple[RecipeModel, ...]) -> tuple[RecipeModel, ...]:
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


def _wrong_parameters(method: Method, given: Mapping[str, Number], where: str, per_model: bool) -> Iterable[str]:
    for name, value in given.items():
        parameter = method.parameters.get(name)
        if parameter is None:
            yield f"In {where}: {unknown(f'parameter of {method.name}', name, method.parameters)}"
        elif per_model and not parameter.per_model:
            yield f"In {where}: {name!r} is one number for the whole merge; move it to the recipe's parameters."
        elif isinstance(parameter.default, bool):
            if not isinstance(value, bool):
                yield f"In {where}: {name!r} is true or false, got {value!r}."
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"In {where}: {name!r} is a finite number, got {value!r}."
        elif name in UNIT_INTERVAL and not 0 <= value <= 1:
            yield f"In {where}: {name!r} lies between 0 and 1, got {value!r}."
