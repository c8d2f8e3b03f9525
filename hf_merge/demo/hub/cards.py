"""Front matter of a README: parsing it, and refusing what the Hub refuses."""

import math
import re
from datetime import date
from typing import Any

import yaml

from hf_merge.demo.hub.names import is_repo_id

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_EMPTY = "empty or missing yaml metadata in repo card"
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_STRINGS = ("license_name", "license_link", "library_name", "pipeline_tag", "pretty_name")
_STRING_LISTS = ("tags", "language", "datasets", "metrics", "base_model", "new_version")
# The identifiers of the Hub's page on licenses.
_LICENSE_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-
permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-
noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_NAMES.split())


class _Loader(yaml.SafeLoader):
    """Safe, and like the Hub's parser it refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"duplicated mapping key: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def front_matter(readme: str) -> dict[str, Any] | None:
    """The metadata of a card as JSON values, None if there is none. Raises ValueError if it is not valid YAML."""
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return None
    try:
        data = yaml.load(match.group(1), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"Invalid YAML metadata in README.md: {error}") from error
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError("Invalid metadata in README.md: YAML metadata must be a mapping")
    clean: dict[str, Any] = _as_json(data)
    return clean


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, date):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def strings(value: Any) -> list[str]:
    """A field that may hold one string or a list of them."""
    return [value] if isinstance(value, str) else [item for item in value or [] if isinstance(item, str)]


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """The errors and warnings of a card, as the Hub's `validate-yaml` words them."""
    try:
        data = front_matter(readme)
    except ValueError as error:
        return [str(error)], []
    if data is None:
        return [], [_EMPTY]
    errors = [f'"{key}" must be a string' for key in _STRINGS if not isinstance(data.get(key, ""), str)]
    for key in _STRING_LISTS:
        value = data.get(key, "")
        if not isinstance(value, str) and not _is_string_list(value):
            errors.append(f'"{key}" must be a string or a list of strings')
    errors += _license_errors(data) + _base_model_errors(data) + _model_index_errors(data.get("model-index", []))
    return errors, []


def _is_string_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _license_errors(data: dict[str, Any]) -> list[str]:
    value = data.get("license", "other")
    if not isinstance(value, str) and not (_is_string_list(value) and value):
        return ['"license" must be a string']
    known = ", ".join(sorted(LICENSES))
    return [f'"license" must be one of [{known}], got "{name}"' for name in strings(value) if name not in LICENSES]


def _base_model_errors(data: dict[str, Any]) -> list[str]:
    errors = [
        f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.'
        for model in strings(data.get("base_model"))
        if not is_repo_id(model) and not is_repo_id(f"canonical/{model}")
    ]
    if data.get("base_model_relation", "merge") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    return errors


def _model_index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        where = f"model-index[{number}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list):
            errors.append(f'"{where}.results" must be an array')
            continue
        for position, result in enumerate(results):
            errors += _result_errors(f"{where}.results[{position}]", result)
    return errors


def _result_errors(where: str, result: Any) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{where}" must be a mapping']
    required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
    errors = [
        f'"{where}.{group}.{key}" is required'
        for group, key in required
        if not isinstance(result.get(group), dict) or not isinstance(result[group].get(key), str)
    ]
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'"{where}.metrics" must hold at least one metric']
    for number, metric in enumerate(metrics):
        for key in ("type", "value"):
            if not isinstance(metric, dict) or metric.get(key) is None:
                errors.append(f'"{where}.metrics[{number}].{key}" is required')
    return errors
