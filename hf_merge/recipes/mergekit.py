"""mergekit's names and numbers where they differ from ours, and what its YAML may hold that is no recipe, as data."""

from collections.abc import Mapping

from hf_merge.methods.method import Method
from hf_merge.recipes.value import Number

NAMES: Mapping[str, str] = {"lambda": "scaling", "rescale": "match_l1"}
"""Its names of parameters, for methods that have ours and not its."""

_DELTA: Mapping[str, Number] = {"normalize": False, "scaling": 1.0}
_SPARSE = {**_DELTA, "density": 1.0}
_MATCHED = {"rescale": True, "match_l1": True}
_CRUMBS = {**_SPARSE, "gamma": 0.01, "row_wise": False, "match_l1": False, "round_down": True}
DEFAULTS: Mapping[str, Mapping[str, Number]] = {
    "linear": {"normalize": True},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"normalize_weights": True, "steps": 0},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "task_arithmetic": _DELTA,
    "ties": {
        **_SPARSE,
        "normalize": True,
        "match_l1": False,
        "weighted_election": True,
        "whole_model": False,
        "round_down": True,
    },
    "dare_linear": {**_SPARSE, **_MATCHED},
    "dare_ties": {**_SPARSE, **_MATCHED},
    "della": {**_SPARSE, **_MATCHED, "epsilon": 0.15, "normalize": True},
    "della_linear": {**_SPARSE, **_MATCHED, "epsilon": 0.15},
    "breadcrumbs": _CRUMBS,
    "breadcrumbs_ties": _CRUMBS,
    "sce": {"select_topk": 1.0, "uniform_fallback": True, "round_down": True},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    "model_stock": {"filter_wise": False, "clamp": False},
    "passthrough": {"scale": 1.0},
}
"""What its methods do where a number is not given, in our names; those that it requires (`weight`, `t`) are not among them."""

NO_EFFECT: Mapping[str, frozenset[str]] = {
    "task_arithmetic": frozenset({"density", "rescale"}),
    "multislerp": frozenset({"eps"}),  # against divisions by 0, which there are none of here
}
"""Parameters that a method of its accepts and that change nothing; besides `int8_mask`, which saves it memory in any method."""

NO_RECIPE: Mapping[str, str] = {
    **dict.fromkeys(
        ("gate_mode", "experts", "shared_experts", "experts_per_token"),
        "belongs to mergekit-moe, which builds a mixture of experts; that is no merge, and hf_merge does not do it.",
    ),
    **dict.fromkeys(("genome", "tasks"), "belongs to mergekit-evolve, a search: search with `auto_merge` instead."),
    **dict.fromkeys(
        ("name", "out_path"),
        "belongs to mergekit-multi, a chain of merges: run one recipe after the other, each with a folder of its own.",
    ),
    **dict.fromkeys(
        (
            *("allow_crimes", "lazy_unpickle", "low_cpu_memory", "read_to_gpu", "multi_gpu", "cuda", "device", "async_write"),
            *("trust_remote_code", "out_shard_size", "lora_merge_cache", "clone_tensors", "copy_tokenizer", "write_model_card"),
        ),
        "is an option of mergekit's command line, which is no part of a recipe: leave it out.",
    ),
    "random_seed": "is an option of mergekit's command line: the recipe's key is 'seed'.",
}
"""Keys of its other tools and of its command line, with what to do."""

ONE_FILE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""How the names of mergekit-pytorch's models end."""


def ours(method: Method, name: str) -> str:
    """Our name of its parameter."""
    found = NAMES.get(name, name)
    return found if found in method.parameters and name not in method.parameters else name


def theirs(method: Method, name: str) -> str:
    """Its name of our parameter."""
    return next((its for its, our in NAMES.items() if our == name and ours(method, its) == name), name)
