"""One way to write each merge: what is left of a point's weights and densities, and the method that it then is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_merge.methods import METHODS
from hf_merge.recipes.recipe import RecipeModel
from hf_merge.search.shares import is_one, rounded, shares

ALL_KEPT: Mapping[str, str] = {
    "dare_linear": "task_arithmetic",
    "della_linear": "task_arithmetic",
    "breadcrumbs": "task_arithmetic",
    "dare_ties": "ties",
    "della": "ties",
    "breadcrumbs_ties": "ties",
}
"""What a method is once it drops nothing, at a density of 1."""

SUMS = ("linear", "task_arithmetic")

WHOLE = ("consensus", "pcb", "tsv", "iso_c", "wudi")
"""Methods to which a model matters even at a weight of 0: it votes, or it is counted."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A merge of weighted models: each model's weights, group by group, its density (none if the method has none), and
    the numbers that all share."""

    method: str
    models: Sequence[RecipeModel]
    weights: Sequence[Sequence[float]]
    densities: Sequence[float] = ()
    shared: Mapping[str, float]

    @property
    def groups(self) -> Iterable[Sequence[float]]:
        """The models' weights in each group."""
        return zip(*self.weights, strict=True)

    @property
    def dropping(self) -> dict[str, list[float]]:
        """Each model's density, and as much of a window (`epsilon`) as there is room for beside it."""
        found = {"density": list(self.densities)} if self.densities else {}
        if "epsilon" in self.shared:
            found["epsilon"] = [min(self.shared["epsilon"], d, rounded(1 - d)) for d in self.densities]
        return found


def canonical(given: Weighted, *, proportional: bool) -> Weighted:
    """The same merge as it is always written (see `Space.recipe`); one without models if nothing is left of them.

    `proportional` says that only the weights' proportions matter. An average is "linear" with weights that add up to 1.
    """
    if given.densities:
        given = replace(
            given, weights=[[w * (d != 0) for w in own] for own, d in zip(given.weights, given.densities, strict=True)]
        )
    if proportional:
        even = METHODS[given.method].space != "delta"  # no weight at all is no proportion: all models alike
        rows = [shares(group if any(group) or not even else [1.0] * len(group)) for group in given.groups]
    else:
        rows = [[rounded(w) for w in group] for group in given.groups]
    given = replace(given, weights=list(zip(*rows, strict=True)))
    left = _only(given, [i for i, own in enumerate(given.weights) if any(own)])
    if not left.models or left.shared.get("scaling") == 0:
        return replace(left, models=())
    if left.densities and all(density == 1 for density in left.densities):
        left = _with_method(left, ALL_KEPT.get(left.method, left.method))
    if left.method in SUMS or (proportional and _is_one_model(left)):
        return _sum(left)
    pair = METHODS[given.method].models == (2, 2)
    return given if given.method in WHOLE or pair else left


def _is_one_model(merge: Weighted) -> bool:
    return len(merge.models) == 1 and len(set(merge.weights[0])) == 1 and all(density == 1 for density in merge.densities)


def _sum(merge: Weighted) -> Weighted:
    scaling = merge.shared.get("scaling", 1.0)
    weights = [[rounded(weight * scaling) for weight in own] for own in merge.weights]
    average = all(is_one(sum(group)) for group in zip(*weights, strict=True))
    method = "linear" if average or merge.method == "linear" else "task_arithmetic"
    shared = {} if average or method != "linear" else {"normalize": False}
    return Weighted(method=method, models=merge.models, weights=weights, shared=shared)


def _with_method(merge: Weighted, method: str) -> Weighted:
    known = METHODS[method].parameters
    shared = {name: value for name, value in merge.shared.items() if name in known}
    return replace(merge, method=method, densities=merge.densities if "density" in known else (), shared=shared)


def _only(merge: Weighted, places: Sequence[int]) -> Weighted:
    densities = [merge.densities[i] for i in places] if merge.densities else ()
    models, weights = [merge.models[i] for i in places], [merge.weights[i] for i in places]
    return replace(merge, models=models, weights=weights, densities=densities)
