"""Paths through the layers of several models and of their merge: the recipe of a path, and the path of a recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hf_merge.errors import RecipeError
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice
from hf_merge.recipes.recipe import Recipe
from hf_merge.recipes.value import relative

MERGED = "merged"
"""What a path calls the merge of all models."""


def merge_name(number: int) -> str:
    """What a path calls the merge of this `number`, from 0 on, where there are several."""
    return f"{MERGED} {number + 1}" if number else MERGED


@dataclass(frozen=True)
class Step:
    """Layer `layer` of `model` (a model's name as it is, `MERGED`, or "" for the base), its input multiplied by `scale`."""

    model: str
    layer: int
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.model or 'base'}[{self.layer}]" + ("" if self.scale == 1.0 else f"×{self.scale:g}")


Path = tuple[Step, ...]


def along(recipe: Recipe, path: Sequence[Step], depth: int) -> Recipe:
    """The recipe of what `path` runs through: layers of the merge of all of `recipe`'s models, and layers of one as it is.

    `depth` is the merge's number of layers: a gradient has in a merged layer the number that it has there in the whole merge.
    Raises `RecipeError` for a path that has no steps or names unknown models, and for a recipe that has layers of its own.
    """
    if recipe.layers is not None:
        raise RecipeError("A path goes through the merge of whole models: give a recipe without `layers`.")
    if not path:
        raise RecipeError("A path needs steps, got none.")
    names = [model.name for model in recipe.models]
    if MERGED in names:
        raise RecipeError(f"A path calls the merge {MERGED!r}: give the model of that name another one.")
    slices = tuple(_slice(run, names, depth if recipe.graded else None) for run in _runs(path, recipe.graded))
    return replace(recipe, layers=LayerMap(slices))


def path_of(layers: LayerMap, merge: str | None = None) -> Path:
    """The path that a map of layers describes. A merged layer is numbered as in the first of its sources, and called `merge`;
    without that `MERGED`, or by the name of its one model.

    Raises `RecipeError` for slices without an end.
    """
    found: list[Step] = []
    for part in layers.slices:
        first, merged = part.sources[0], [source for source in part.sources if source.model]
        if first.length is None:
            raise RecipeError(f"The layers of {first.model or 'the base'!r} have no end in a slice, so they are no path.")
        name, start = (merged or [first])[0].model, (merged or [first])[0].start
        if merged and not part.copied:
            name = merge or (name if len(merged) == 1 else MERGED)
        found += [Step(name, start + i, part.residual_scale if i == 0 else 1.0) for i in range(first.length)]
    return tuple(found)


def _runs(path: Sequence[Step], graded: bool) -> Iterator[list[Step]]:
    """The path in runs of one model's layers that follow each other. Where numbers are `graded`, merged layers stand alone:
    each has its own depth to the last bit."""
    run: list[Step] = []
    for step in path:
        follows = bool(run) and (step.model, step.layer, step.scale) == (run[-1].model, run[-1].layer + 1, 1.0)
        if run and (not follows or (graded and step.model == MERGED)):
            yield run
            run = []
        run.append(step)
    yield run


def _slice(run: Sequence[Step], names: Sequence[str], depth: int | None) -> Slice:
    model, start, stop, scale = run[0].model, run[0].layer, run[-1].layer + 1, run[0].scale
    if model != MERGED:
        source = LayerRange(model=model, start=start, stop=stop)
        return Slice(sources=(source,), copied=bool(model), residual_scale=scale)
    between = None if depth is None else (relative(start, depth),) * 2
    sources = tuple(LayerRange(model=name, start=start, stop=stop) for name in names)
    return Slice(sources=sources, residual_scale=scale, depth=between)
