"""The entries of mergekit's mapping, read and checked: modules, slices, models, references and parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_merge.errors import RecipeError, unknown
from hf_merge.methods import METHODS
from hf_merge.methods.method import Method
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.mergekit import NO_EFFECT, NO_RECIPE, ONE_FILE, ours, theirs
from hf_merge.recipes.recipe import DTYPES
from hf_merge.recipes.tokenizer import KEYS as TOKENIZER_KEYS
from hf_merge.recipes.value import Value, over, parsed

OWN_SLICE_KEYS = ("copied", "residual_scale", "depth")
"""What a slice has that mergekit's have not; as usual unless given."""
FORMS = ("models", "slices", "modules")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "a recipe": (
        *("merge_method", "base_model", *FORMS, "parameters", "dtype", "out_dtype"),
        *(*TOKENIZER_KEYS, "private", "seed"),
    ),
    "a module": ("models", "slices", "parameters"),
    "a slice": ("sources", "base_model", "parameters", "residual_weight", *OWN_SLICE_KEYS),
    "a model's entry": ("model", "name", "parameters"),
    "a slice's source": ("model", "name", "layer_range", "parameters"),
    "a model's reference": ("model", "lora", "path", "revision", "override_architecture"),
}
_WIDE_DTYPES = ("float64", "int64", "int32", "int16", "int8", "uint8")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's entry, or a source of a slice."""

    ref: ModelRef
    name: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A slice, or all layers of a module."""

    sources: tuple[Source, ...]
    module: str = ""
    base: ModelRef | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


def check_keys(content: Mapping[str, Any], where: str) -> None:
    for key in content:
        if key in _KEYS[where]:
            continue
        if key in NO_RECIPE:
            raise RecipeError(f"{key!r} in {where} {NO_RECIPE[key]}")
        parameters = {name for method in METHODS.values() for p in method.parameters for name in (p, theirs(method, p))}
        homes = {**_KEYS, "'parameters'": parameters}
        places = [place for place, keys in homes.items() if key in keys]
        hint = f" It belongs in {' or '.join(places)}." if places else ""
        raise RecipeError(unknown(f"key in {where}:", key, _KEYS[where]) + hint)


def _mapping(given: Any, where: str, needs: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or needs not in given:
        shown = dict(given) if isinstance(given, Mapping) else given
        raise RecipeError(f"{where[0].upper()}{where[1:]} is a mapping with {needs!r}, got {shown!r}.")
    check_keys(given, where)
    return given


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given, list | tuple) or not given:
        raise RecipeError(f"{what!r} is a list with something in it, got {given!r:.80}.")
    return list(given)


def read_method(given: Any) -> Method:
    if not given:
        raise RecipeError("A recipe needs 'merge_method'.")
    found = METHODS.get(given) if isinstance(given, str) else None
    if found is None:
        raise RecipeError(unknown("merge method", given, METHODS))
    return found


def read_dtype(content: Mapping[str, Any]) -> str | None:
    given = {key: content[key] for key in ("dtype", "out_dtype") if content.get(key) is not None}
    for key, value in given.items():
        value = given[key] = str(value).removeprefix("torch.")
        if value in _WIDE_DTYPES:
            hint = "everything is computed in float32 or better, so leave it out or give the result's dtype"
            raise RecipeError(f"{key!r} is {' or '.join(DTYPES)}, got {value!r}: {hint}.")
        if value not in DTYPES:
            raise RecipeError(unknown(f"{key}", value, DTYPES))
    return given.get("out_dtype", given.get("dtype"))


def read_modules(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    if not content.get("modules"):
        return {"": {key: content.get(key) for key in ("models", "slices")}}
    if not isinstance(content["modules"], Mapping):
        raise RecipeError(f"'modules' is a mapping of names to modules, got {type(content['modules']).__name__}.")
    for name, module in content["modules"].items():
        if not isinstance(module, Mapping):
            raise RecipeError(f"Module {name!r} is a mapping with 'models' or 'slices', got {module!r}.")
        check_keys(module, "a module")
        if bool(module.get("models")) == bool(module.get("slices")):
            raise RecipeError(f"Module {name!r} needs exactly one of 'models' and 'slices'.")
    return {str(name): module for name, module in content["modules"].items()}


def read_parts(module: Mapping[str, Any], name: str, method: Method) -> Iterable[Part]:
    own = read_parameters(module.get("parameters"), f"module {name!r}", method)
    if module.get("models"):
        sources = [_model(entry, method) for entry in _list(module["models"], "models")]
        yield Part(module=name, sources=tuple(sources), parameters=own)
        return
    for number, given in enumerate(_list(module["slices"], "slices"), 1):
        where = f"slice {number}" + (f" of module {name!r}" if name else "")
        given = _mapping(given, "a slice", "sources")
        parameters = read_parameters(given.get("parameters"), where, method)
        yield Part(
            module=name,
            sources=tuple(_source(entry, method, where) for entry in _list(given["sources"], "sources")),
            base=read_ref(given["base_model"]) if given.get("base_model") else None,
            parameters=parameters if given.get("copied") else over(parameters, own),
            own=_own_keys(given, where),
        )


def _own_keys(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    depth = given.get("depth")
    if depth is not None and not isinstance(depth, list | tuple):
        raise RecipeError(f"'depth' of {where} is [first, last], two numbers between 0 and 1, got {depth!r}.")
    return {key: given[key] for key in OWN_SLICE_KEYS if given.get(key) is not None}


def _model(entry: Any, method: Method) -> Source:
    if not isinstance(entry, Mapping):
        return Source(ref=read_ref(entry))
    entry = _mapping(entry, "a model's entry", "model")
    ref = read_ref(entry["model"])
    return Source(ref=ref, name=str(entry.get("name") or ""), parameters=_own(entry.get("parameters"), str(ref), method))


def _source(entry: Any, method: Method, where: str) -> Source:
    entry = _mapping(entry, "a slice's source", "model")
    ref, layers = read_ref(entry["model"]), entry.get("layer_range")
    if not isinstance(layers, list | tuple) or len(layers) != 2:
        raise RecipeError(f"{ref} in {where} needs 'layer_range': [start, stop], got {layers!r}.")
    parameters = _own(entry.get("parameters"), f"{ref} in {where}", method)
    return Source(ref=ref, name=str(entry.get("name") or ""), parameters=parameters, start=layers[0], stop=layers[1])


def read_ref(given: Any) -> ModelRef:
    if isinstance(given, Mapping):
        parts = {key: value for key, value in given.items() if value is not None}
        check_keys(parts, "a model's reference")
        if ("model" in parts) == ("path" in parts):
            raise RecipeError(f"A model's reference needs 'path' (and 'revision'), or 'model' (and 'lora'), got {parts!r}.")
        if "path" in parts:
            return read_ref(ModelRef(str(parts["path"]), parts.get("revision")))
        found = read_ref(parts["model"])
        return replace(found, adapter=read_ref(parts["lora"])) if "lora" in parts else found
    if not isinstance(given, str | ModelRef) or not given:
        raise RecipeError(f"A model is 'namespace/name', 'namespace/name@revision' or a path, got {given!r}.")
    found = ModelRef.parse(given)
    if found.id.endswith(ONE_FILE):
        raise RecipeError(f"{found.id!r} is one file, which mergekit-pytorch merges. Give the folder of a whole model.")
    return found


def read_parameters(given: Any, where: str, method: Method) -> dict[str, Value]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"The parameters of {where} are a mapping of names to numbers, got {type(given).__name__}.")
    found: dict[str, Value] = {}
    for key, value in given.items():
        name = ours(method, str(key))
        if name in found:
            raise RecipeError(f"{where} has both {name!r} and {theirs(method, name)!r}, which mean the same: keep one.")
        if key == "int8_mask" or key in NO_EFFECT.get(method.name, ()):
            continue
        try:
            found[name] = parsed(value)
        except RecipeError as error:
            raise RecipeError(f"{key!r} of {where}: {error}") from error
    if "rescale" in found and "match_l1" in method.parameters:
        found.setdefault("match_l1", found["rescale"])  # what mergekit means by it
    return found


def _own(given: Any, where: str, method: Method) -> dict[str, Value]:
    """The parameters of one model: not those that mergekit would ignore there."""
    found = read_parameters(given, where, method)
    for name in found:
        if name in method.parameters and not method.parameters[name].per_model:
            key = theirs(method, name)
            raise RecipeError(
                f"In the parameters of {where}: {key!r} is one number for the whole merge; move it to the recipe's parameters."
            )
    return found
