"""The only YAML boundary: recipes as mergekit writes them, read and written.

Our names differ from mergekit's in two places, translated here: `scaling` is its `lambda`, a model's `name` and the recipe's
`seed` it does not have. What this version cannot do (slices, gradients, filters, adapters) is refused by name, never ignored.
A method's defaults are ours: where mergekit's differ (`density` 1, dare_ties without `normalize`), write the number out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_merge.errors import RecipeError, unknown
from hf_merge.methods import METHODS
from hf_merge.model_ref import ModelRef
from hf_merge.recipes.recipe import Number, Recipe, RecipeModel

_TO_MERGEKIT = {"scaling": "lambda"}
_FROM_MERGEKIT = {theirs: ours for ours, theirs in _TO_MERGEKIT.items()}
_RECIPE_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "seed")
_MODEL_KEYS = ("model", "name", "parameters")
_NO_EFFECT = {"int8_mask"}  # saves mergekit memory and leaves its result as it is
_LATER = {"slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "out_dtype", "name"}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as mergekit's mapping, every effective number written out, ready for YAML or JSON."""
    arguments = recipe.arguments()
    per_model = {("weight" if k == "weights" else k): v for k, v in arguments.items() if isinstance(v, list)}
    shared = {_TO_MERGEKIT.get(k, k): v for k, v in arguments.items() if not isinstance(v, list)}
    models = [
        {"model": str(m.ref), "name": m.name} | ({"parameters": {k: v[i] for k, v in per_model.items()}} if per_model else {})
        for i, m in enumerate(recipe.models)
    ]
    found = {
        "merge_method": recipe.method,
        "base_model": str(recipe.base) if recipe.base else None,
        "models": models,
        "parameters": shared or None,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
    }
    return {k: v for k, v in found.items() if v is not None}


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """A recipe from mergekit's mapping. Raises `RecipeError` for a key that is unknown, misplaced or not supported."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"A recipe is a mapping with keys such as merge_method and models, got {type(content).__name__}.")
    _check_keys(content, _RECIPE_KEYS, "a recipe")
    for key in ("merge_method", "models"):
        if not content.get(key):
            raise RecipeError(f"A recipe needs {key!r}.")
    if not isinstance(content["models"], list):
        raise RecipeError(f"'models' is a list, got {type(content['models']).__name__}.")
    base = _ref(content["base_model"]) if content.get("base_model") else None
    models = tuple(_model(entry) for entry in content["models"])
    method = content["merge_method"]
    if method == "slerp" and base is not None:
        models = _base_first(base, models)
    elif method in [m.name for m in METHODS.values() if m.space == "delta"]:
        # mergekit lets the base stand among the models, where it has no delta and hence no effect.
        models = tuple(m for m in models if m.ref != base)
    return Recipe(
        method=method,
        models=models,
        base=base,
        parameters=_parameters(content.get("parameters"), "the recipe"),
        dtype=content.get("dtype"),
        seed=content.get("seed", 0),
    )


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def loads(text: str) -> Recipe:
    """A recipe from YAML text. Raises `RecipeError` for bad YAML or a bad recipe."""
    return from_dict(load_mapping(text))


def load(path: Path | str) -> Recipe:
    """A recipe from a YAML file. Raises `RecipeError`, naming the file."""
    try:
        return loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecipeError) as error:
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
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"This is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"Expected a mapping at the top of the YAML, got {type(content).__name__}.")
    return content


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key in known:
            continue
        if key in _LATER:
            raise RecipeError(f"{key!r} in {where} is mergekit's, and this version of hf_merge cannot do it yet.")
        parameters = {_TO_MERGEKIT.get(name, name) for method in METHODS.values() for name in method.parameters}
        homes = (("a recipe", _RECIPE_KEYS), ("a model's entry", _MODEL_KEYS), ("'parameters'", parameters))
        places = [place for place, keys in homes if key in keys]
        hint = f" It belongs in {places[0]}." if places else ""
        raise RecipeError(unknown(f"key in {where}:", key, known) + hint)


def _ref(given: Any) -> ModelRef:
    if isinstance(given, Mapping):
        parts = {k: v for k, v in given.items() if v is not None}
        if "lora" in parts or "adapter" in parts:
            raise RecipeError(f"Adapters as models are not supported yet: {parts!r}.")
        if "model" in parts:
            _check_keys(parts, ("model",), "a model's reference")
            return _ref(parts["model"])
        _check_keys(parts, ("path", "revision"), "a model's reference")
        if "path" not in parts:
            raise RecipeError(f"A model's reference needs 'path', got {parts!r}.")
        given = "@".join(str(parts[key]) for key in ("path", "revision") if key in parts)
    if not isinstance(given, str) or not given:
        raise RecipeError(f"A model is 'namespace/name', 'namespace/name@revision' or a path, got {given!r}.")
    if "+" in given and not Path(given).is_dir():
        raise RecipeError(f"Adapters as models are not supported yet: {given!r}.")
    return ModelRef.parse(given)


def _model(entry: Any) -> RecipeModel:
    if not isinstance(entry, Mapping):
        return RecipeModel(ref=_ref(entry))
    _check_keys(entry, _MODEL_KEYS, "a model's entry")
    if "model" not in entry:
        raise RecipeError(f"A model's entry needs 'model', got {dict(entry)!r}.")
    ref = _ref(entry["model"])
    return RecipeModel(ref=ref, name=str(entry.get("name") or ""), parameters=_parameters(entry.get("parameters"), str(ref)))


def _parameters(given: Any, where: str) -> dict[str, Number]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"The parameters of {where} are a mapping of names to numbers, got {type(given).__name__}.")
    found: dict[str, Number] = {}
    for key, value in given.items():
        name = str(_FROM_MERGEKIT.get(key, key))
        if isinstance(value, list | Mapping):
            raise RecipeError(f"{key!r} of {where}: gradients and filters are not supported yet, give one number.")
        if name in found:
            raise RecipeError(f"{where} has both {name!r} and {_TO_MERGEKIT[name]!r}, which mean the same: keep one.")
        if key not in _NO_EFFECT:
            found[name] = _number(value)
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a text; whoever writes it means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _base_first(base: ModelRef, models: tuple[RecipeModel, ...]) -> tuple[RecipeModel, ...]:
    """mergekit's SLERP: `t` = 0 is the base, whether or not it stands among the models."""
    others = tuple(m for m in models if m.ref != base)
    return tuple(m for m in models if m.ref == base) + others if len(models) == 2 else (RecipeModel(ref=base), *others)
