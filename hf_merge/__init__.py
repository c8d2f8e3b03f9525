"""Merge fine-tunes of one base model, find the Pareto front of the merges, and publish any point of it.

Names are imported when they are first used, so that `import hf_merge` costs nothing.
"""

from importlib import import_module
from typing import Any

from hf_merge.version import __version__

_HOMES = {
    "auto_merge": "hf_merge.auto",
    "check": "hf_merge.single",
    "merge": "hf_merge.single",
    "merge_adapters": "hf_merge.adapters",
    "MergeResult": "hf_merge.result",
    "Objective": "hf_merge.evaluation.objective",
    "Recipe": "hf_merge.recipes.recipe",
    "RecipeModel": "hf_merge.recipes.recipe",
    "ModelRef": "hf_merge.model_ref",
    "Space": "hf_merge.search.space",
    "Front": "hf_merge.search.trial",
    "Trial": "hf_merge.search.trial",
    "Score": "hf_merge.scores",
    "Method": "hf_merge.methods.method",
    "METHODS": "hf_merge.methods",
    "HfMergeError": "hf_merge.errors",
    "RecipeError": "hf_merge.errors",
    "CheckpointError": "hf_merge.errors",
    "MergeError": "hf_merge.errors",
    "EvaluationError": "hf_merge.errors",
    "PublishError": "hf_merge.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
