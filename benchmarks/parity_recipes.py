"""The recipes of parity.py: one for each method of mergekit 0.1.5, in its YAML, with typical numbers."""

from pathlib import Path
from typing import Any

WEIGHTS = (0.5, 0.3, 0.4)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # what goes in, numbers of each model, numbers of the merge
    "linear": ("models", {"weight": WEIGHTS}, {}),
    "slerp": ("pair", {}, {"t": 0.4}),
    "nuslerp": ("two", {"weight": WEIGHTS}, {}),
    "multislerp": ("any", {"weight": WEIGHTS}, {}),
    "karcher": ("models", {}, {}),
    "task_arithmetic": ("deltas", {"weight": WEIGHTS}, {"lambda": 0.8}),
    "ties": ("deltas", {"weight": WEIGHTS, "density": 0.31}, {"lambda": 0.8}),
    "breadcrumbs": ("deltas", {"weight": WEIGHTS, "density": 0.417, "gamma": 0.02}, {}),
    "breadcrumbs_ties": ("deltas", {"weight": WEIGHTS, "density": 0.417, "gamma": 0.02}, {}),
    "sce": ("deltas", {}, {"select_topk": 0.47}),
    "ram": ("deltas", {}, {}),
    "ramplus_tl": ("deltas", {}, {}),
    "model_stock": ("deltas", {}, {}),
    "nearswap": ("pair", {}, {"t": 0.001}),
    "arcee_fusion": ("pair", {}, {}),
    "passthrough": ("one", {"scale": 0.9}, {}),
    "dare_linear": ("deltas", {"weight": WEIGHTS, "density": 0.41}, {}),
    "dare_ties": ("deltas", {"weight": WEIGHTS, "density": 0.41}, {}),
    "della": ("deltas", {"weight": WEIGHTS, "density": 0.41, "epsilon": 0.1}, {}),
    "della_linear": ("deltas", {"weight": WEIGHTS, "density": 0.41, "epsilon": 0.1}, {}),
}


def exact(method: str, folders: list[Path]) -> dict[str, Any] | None:
    """The recipe with which mergekit computes in float64, and adds nothing to the norms that multislerp divides by."""
    found = recipe(method, folders)
    if found is not None:
        found["dtype"] = "float64"
        if method == "multislerp":
            found["parameters"] = found.get("parameters", {}) | {"eps": 1e-30}
    return found


def recipe(method: str, folders: list[Path]) -> dict[str, Any] | None:
    """mergekit's YAML of a method for a base and its fine-tunes; None if there are too few of them."""
    kind, own, shared = METHODS[method]
    base, *tuned = folders
    if method == "model_stock" and len(tuned) < 2:
        return None
    alone = len(tuned) == 1
    inputs = {
        "deltas": tuned,
        "any": folders if alone else tuned,
        "models": folders if alone else tuned,
        "two": folders if alone else tuned[:2],
        "pair": [base, tuned[0]],
        "one": tuned[:1],
    }[kind]
    has_base = kind in ("deltas", "pair") or (kind in ("any", "two") and not alone)
    entries: list[dict[str, Any]] = []
    for number, folder in enumerate(inputs):
        values = {name: value[number] if isinstance(value, tuple) else value for name, value in own.items()}
        entries.append({"model": str(folder)} | ({"parameters": values} if values else {}))
    found: dict[str, Any] = {"merge_method": method} | ({"base_model": str(base)} if has_base else {})
    return found | {"models": entries} | ({"parameters": shared} if shared else {}) | {"dtype": "float32"}


def mask_recipe(method: str, folders: list[Path]) -> dict[str, Any]:
    """A recipe of a random method whose result shows the mask: one fine-tune, what is kept of it at full strength."""
    _, own, _ = METHODS[method]
    values = {name: value for name, value in own.items() if name != "weight"} | {"weight": 1.0}
    entry = {"model": str(folders[1]), "parameters": values}
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [entry],
        "parameters": {"rescale": False},
        "dtype": "float32",
    }


def golden(inputs: Path) -> dict[str, dict[str, Any]]:
    """Recipes of the stored results: all methods that draw nothing, and what else a recipe can say; by the name of a file.

    Densities are such that no fraction of an element has to be rounded, which mergekit does downwards; but for `ties-rounding`.
    """
    folders = [inputs / name for name in ("base", "one", "two", "three")]
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        one = recipe(method, folders)
        if method not in RANDOM and one:
            found[method] = one

    def changed(name: str, method: str, own: dict[str, Any] | None = None, **shared: Any) -> None:
        copy = recipe(method, folders) or {}
        for number, entry in enumerate(copy["models"]):
            values = {k: v[number] if isinstance(v, tuple) else v for k, v in (own or {}).items()}
            if values:
                entry["parameters"] = entry.get("parameters", {}) | values
        found[name] = copy | ({"parameters": copy.get("parameters", {}) | shared} if shared else {})

    quarters = {"density": (0.25, 0.5, 0.75)}
    found["ties-rounding"] = found.pop("ties")
    changed("sce", "sce", select_topk=0.5)
    changed("ties", "ties", quarters)
    changed("ties-rescale", "ties", quarters, rescale=True, normalize=False)
    changed("ties-whole", "ties", {"density": 1.0})
    crumbs: dict[str, Any] = quarters | {"gamma": 1 / 12 + 1e-6}
    changed("breadcrumbs", "breadcrumbs", crumbs)
    changed("breadcrumbs-rescale", "breadcrumbs", crumbs, rescale=True, normalize=True)
    changed("breadcrumbs_ties", "breadcrumbs_ties", crumbs)
    changed("linear-sum", "linear", normalize=False)
    changed("nuslerp-rows", "nuslerp", nuslerp_flatten=False)
    changed("nuslerp-columns", "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True)
    changed("model_stock-filter_wise", "model_stock", filter_wise=True)
    changed("karcher-steps", "karcher", max_iter=100, tol=1e-9)
    changed("ram-epsilon", "ram", epsilon=0.002)
    changed("ramplus_tl-epsilon", "ramplus_tl", epsilon=0.002, r=0.5, alpha=0.7)
    changed("task_arithmetic-gradient", "task_arithmetic", {"weight": [0.2, 0.9]})
    changed("dare_ties-whole", "dare_ties", {"density": 1.0}, normalize=True)
    changed("della-whole", "della", {"density": 1.0, "epsilon": 0.15})
    filters = [{"filter": "self_attn", "value": [0.1, 0.6]}, {"filter": "mlp", "value": 0.9}, {"value": 0.3}]
    changed("slerp-filters", "slerp", t=filters)
    ranges = [[("one", 0, 2)], [("two", 1, 2)], [("three", 0, 1)]]
    slices = [{"sources": [{"model": str(inputs / n), "layer_range": [a, b]} for n, a, b in part]} for part in ranges]
    found["passthrough-slices"] = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
    return found
