"""The only YAML boundary: recipes as mergekit writes them, read and written.

The format and its meaning are mergekit's: precedence (source or model, slice, module, recipe), gradients, filters, slices and
modules; a number that is not given takes mergekit's default and not ours (`density` 1; the weights and `t`, which it
requires, take ours). A file that is written here has every number in it. What differs:

- An unknown or misplaced key, which mergekit ignores, is an error that names the right place.
- `base_model` of a method that merges weights and not deltas (linear, karcher, passthrough) lends config and tokenizer only;
  mergekit averages it in as one more model.
- Everything is computed in float32 or better: `out_dtype`, or else `dtype`, is the result's.
- `override_architecture` (tensors are merged by name, whatever the architecture) and `residual_weight` (mergekit reads it
  and does not use it) have no effect.
- A model's `name`, a slice's `copied`, `residual_scale` and `depth`, and the recipe's `seed` and `private` are ours, and so
  are switches that mergekit's methods do not have; it ignores them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_merge.errors import RecipeError
from hf_merge.methods import METHODS
from hf_merge.methods.method import Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.entries import (
    FORMS,
    OWN_SLICE_KEYS,
    Part,
    Source,
    check_keys,
    read_dtype,
    read_method,
    read_modules,
    read_parameters,
    read_parts,
    read_ref,
)
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.mergekit import DEFAULTS, theirs
from hf_merge.recipes.recipe import Recipe, RecipeModel, distinct
from hf_merge.recipes.tokenizer import from_dict as tokenizer_from_dict
from hf_merge.recipes.tokenizer import to_dict as tokenizer_to_dict
from hf_merge.recipes.value import Value, over, plain


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as mergekit's mapping, every effective number written out, ready for YAML or JSON."""
    found = {
        "merge_method": recipe.method,
        "base_model": str(_anchor(recipe)) if _anchor(recipe) else None,
        **_written_layers(recipe),
        # With both, mergekit too computes in float32.
        "dtype": "float32" if recipe.dtype else None,
        "out_dtype": recipe.dtype,
        **(tokenizer_to_dict(recipe.tokenizer) if recipe.tokenizer else {}),
        "private": recipe.private if recipe.private != "refuse" else None,
        "seed": recipe.seed,
    }
    return {k: v for k, v in found.items() if v is not None}


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from mergekit's mapping. Raises `RecipeError` for a key that is unknown, misplaced or not supported."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"A recipe is a mapping with keys such as merge_method and models, got {type(content).__name__}.")
    check_keys(content, "a recipe")
    method = read_method(content.get("merge_method"))
    forms = [form for form in FORMS if content.get(form)]
    if len(forms) != 1:
        given = f", got {' and '.join(forms)}" if forms else ""
        raise RecipeError(f"A recipe needs exactly one of 'models', 'slices' and 'modules'{given}.")
    parts = [part for name, module in read_modules(content).items() for part in read_parts(module, name, method)]
    base = _base(content, method, parts)
    models, layers = _listed(method, base, parts[0]) if forms == ["models"] else _layered(method, base, parts)
    return Recipe(
        method=method.name,
        models=models,
        base=base,
        parameters=over(read_parameters(content.get("parameters"), "the recipe", method), _defaults(method)),
        layers=layers,
        private=content.get("private", "refuse"),
        dtype=read_dtype(content),
        seed=content.get("seed", 0),
        tokenizer=tokenizer_from_dict(content, read_ref),
    )


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def loads(text: str) -> Recipe:
    """A recipe from YAML text. Raises `RecipeError` for bad YAML or a bad recipe."""
    return from_dict(load_mapping(text))


def load(path: Path | str) -> Recipe:
    """A recipe from a YAML file. Raises `RecipeError`, naming the file."""
    text = read(path)
    try:
        return loads(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def read(path: Path | str) -> str:
    """The text of a YAML file. Raises `RecipeError`, naming the file, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{key!r} is written twice in one mapping, near line {node.start_mark.line + 1}.")
        return super().construct_mapping(node, deep)


def load_mapping(text: str) -> dict[str, Any]:
    """A YAML text whose top is a mapping."""
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        raise RecipeError(f"This is not YAML: {error}") from error
    if len(documents) > 1:
        hint = "a chain of merges, as mergekit-multi runs, is run one recipe after the other, each from a file of its own"
        raise RecipeError(f"Expected one YAML document, got {len(documents)}: {hint}.")
    content = documents[0] if documents else None
    if not isinstance(content, dict):
        raise RecipeError(f"Expected a mapping at the top of the YAML, got {type(content).__name__}.")
    return content


def _defaults(method: Method) -> dict[str, Value]:
    """mergekit's defaults that are not ours."""
    ours = {name: parameter.default for name, parameter in method.parameters.items()}
    return {name: value for name, value in DEFAULTS.get(method.name, {}).items() if name in ours and value != ours[name]}


def _base(content: Mapping[str, Any], method: Method, parts: Iterable[Part]) -> ModelRef | None:
    given = read_ref(content["base_model"]) if content.get("base_model") else None
    others = list(dict.fromkeys(part.base for part in parts if part.base))
    bases = list(dict.fromkeys([given, *others] if given else others))
    if len(bases) > 1 and not method.ordered:
        raise RecipeError(f"A recipe of {method.name} has one base in all slices, got {', '.join(map(str, bases))}.")
    return bases[0] if bases else None


def _listed(method: Method, base: ModelRef | None, part: Part) -> tuple[tuple[RecipeModel, ...], None]:
    """The models of a recipe without slices. mergekit lets the base stand among them, where it has no delta and no effect."""
    sources = part.sources
    if method.deltas(base is not None):
        sources = tuple(source for source in sources if source.ref != base)
    elif method.ordered and base is not None:
        sources = _base_first(sources, base)
        if len(sources) < method.models[0] and base not in [source.ref for source in sources]:
            sources = (Source(ref=base), *sources)
    return tuple(RecipeModel(ref=s.ref, name=s.name, parameters=s.parameters) for s in sources), None


def _base_first(sources: tuple[Source, ...], base: ModelRef | None) -> tuple[Source, ...]:
    return tuple(sorted(sources, key=lambda source: source.ref != base))


def _layered(method: Method, base: ModelRef | None, parts: list[Part]) -> tuple[tuple[RecipeModel, ...], LayerMap]:
    """The models of a recipe of slices, and the slices. A source that is the base of a delta method is no model."""
    deltas = method.deltas(base is not None)
    if method.ordered:
        parts = [replace(part, sources=_base_first(part.sources, part.base or base)) for part in parts]
    sources = [source for part in parts for source in part.sources if not (deltas and source.ref == base)]
    names = {source.ref: source.name for source in reversed(sources) if source.name}
    models: dict[tuple[ModelRef, str], RecipeModel] = {}
    for source in sources:
        key = source.ref, source.name or names.get(source.ref, "")
        models[key] = RecipeModel(ref=key[0], name=key[1])
    final = dict(zip(models, distinct(tuple(models.values())), strict=True))

    def layer_range(source: Source) -> LayerRange:
        model = final.get((source.ref, source.name or names.get(source.ref, "")))
        own = source.parameters if model else {}
        return LayerRange(model=model.name if model else "", start=source.start, stop=source.stop, parameters=own)

    slices = [
        Slice(sources=tuple(map(layer_range, p.sources)), parameters=p.parameters, module=p.module, **p.own) for p in parts
    ]
    return tuple(final.values()), LayerMap(tuple(slices))


def _anchor(recipe: Recipe) -> ModelRef | None:
    """The base, or what mergekit needs one for: the model that a method goes from."""
    return recipe.base or (recipe.models[0].ref if METHODS[recipe.method].ordered else None)


def _written_layers(recipe: Recipe) -> dict[str, Any]:
    """The models, slices or modules, and the parameters."""
    method = METHODS[recipe.method]
    if recipe.layers is None:
        own, shared = recipe.values()
        models = [_entry(method, m, values) for m, values in zip(recipe.models, own, strict=True)]
        return {"models": models, "parameters": _written(method, shared)}
    common = [recipe.values(None if part.copied else part)[1] for part in recipe.layers.slices]
    same = all(shared == common[0] for shared in common)
    modules: dict[str, list[dict[str, Any]]] = {name: [] for name in recipe.layers.modules}
    for part, shared in zip(recipe.layers.slices, common, strict=True):
        parameters = None if same or part.copied else _written(method, shared)
        modules[part.module].append(_slice(recipe, part) | ({"parameters": parameters} if parameters else {}))
    top = {"parameters": _written(method, common[0]) if same else None}
    if list(modules) == [""]:
        return {"slices": modules[""], **top}
    return {"modules": {name: _module(slices) for name, slices in modules.items()}, **top}


def _slice(recipe: Recipe, part: Slice) -> dict[str, Any]:
    """A slice without what its sources share. mergekit wants the base among the sources of a delta method."""
    method, anchor = METHODS[recipe.method], _anchor(recipe)
    models = {model.name: model for model in recipe.models}
    values, merged = iter(recipe.values(part)[0]), [source for source in part.sources if source.model]
    bases = [source for source in part.sources if not source.model] or (merged[:1] if recipe.deltas and not part.copied else [])
    sources: list[dict[str, Any]] = [{"model": str(recipe.base), "layer_range": [s.start, s.stop]} for s in bases]
    for source in merged:
        entry = _entry(method, models[source.model], {} if part.copied else next(values))
        sources.append({"model": entry.pop("model"), "layer_range": [source.start, source.stop]} | entry)
    first = models[merged[0].model].ref if merged else anchor
    usual = Slice(sources=part.sources)
    own = {name: plain(getattr(part, name)) for name in OWN_SLICE_KEYS if getattr(part, name) != getattr(usual, name)}
    other = method.ordered and first != anchor and not part.copied
    return {"sources": sources} | own | ({"base_model": str(first)} if other else {})


def _module(slices: list[dict[str, Any]]) -> dict[str, Any]:
    """A module of slices, or of models where it is all layers of them."""
    whole = all(source["layer_range"] == [0, None] for source in slices[0]["sources"])
    if not whole or len(slices) > 1 or {"base_model", *OWN_SLICE_KEYS} & slices[0].keys():
        return {"slices": slices}
    models = [{k: v for k, v in source.items() if k != "layer_range"} for source in slices[0]["sources"]]
    return {"models": models} | {k: v for k, v in slices[0].items() if k != "sources"}


def _entry(method: Method, model: RecipeModel, values: Mapping[str, Value]) -> dict[str, Any]:
    parameters = _written(method, values)
    return {"model": str(model.ref), "name": model.name} | ({"parameters": parameters} if parameters else {})


def _written(method: Method, values: Mapping[str, Value]) -> dict[str, Any] | None:
    found = {}
    for name, value in values.items():
        default = method.parameters[name].default
        whole = isinstance(value, float) and value.is_integer() and type(default) is int
        found[theirs(method, name)] = int(value) if whole else plain(value)  # type: ignore[arg-type]
    return found or None
