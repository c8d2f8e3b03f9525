"""A stock model in memory that runs paths through the layers of several models and of their merge."""

from collections.abc import Hashable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_merge.checkpoints.adapters import is_adapter
from hf_merge.errors import MergeError, RecipeError, unknown
from hf_merge.merging.differences import GROUPS, differences
from hf_merge.merging.layers import Layers, comes_before_layers
from hf_merge.merging.live import LiveModel
from hf_merge.merging.plan import Opened
from hf_merge.merging.pool import depth_of, follow, pool_configs
from hf_merge.merging.prefixes import Prefixes
from hf_merge.merging.seams import Seam
from hf_merge.recipes.path import MERGED, Path, Step, along, merge_name
from hf_merge.recipes.recipe import Recipe, RecipeModel

M = TypeVar("M", bound=nn.Module)


class PathModel:
    """One transformers `model` that is made to run a path: its layers are other models' layers, which share their weights.

    `recipe` names the models and how they are merged (it has no `layers`); `opened` holds them. Every model's layers are in the
    pool, and with models of one depth the layers of their merge, which `load` replaces in place, and of other `merges` of the
    same models: a path takes layers of one merge, for a recipe has one. What stands before the layers
    (embeddings) is that of the first layer's model, what stands after them (norm, head; unless tied to the embeddings) that of
    the last layer's model: as in recipes of slices, so that `recipe_of(path)` is the same model, and the path of all layers of
    one model is that model. With `prefixes`, layers that another path has run on the same tokens are not run again. All
    models are on `device`, and `model` is not to be moved from it.

    Raises `MergeError`, from configs alone, for models whose layers cannot stand in one model.
    """

    def __init__(
        self,
        recipe: Recipe,
        opened: Opened,
        *,
        device: torch.device | None = None,
        prefixes: Prefixes | None = None,
        merges: Sequence[Recipe] = (),
    ) -> None:
        if recipe.layers is not None or recipe.tokenizer is not None:
            given = "layers" if recipe.layers is not None else "a tokenizer"
            raise RecipeError(f"A path goes through whole models of one vocabulary: give a recipe without {given}.")
        names = [merge_name(i) for i in range(1 + len(merges))]
        if taken := [model.name for model in recipe.models if model.name in names]:
            raise RecipeError(f"A path calls the merge {taken[0]!r}: give the model of that name another one.")
        used = {model.name: model for model in recipe.models}
        if recipe.base is not None:
            used = {"": RecipeModel(ref=recipe.base, name="base"), **used}
        of_base = {name: recipe.base is not None and is_adapter(opened[model.ref.plain].files) for name, model in used.items()}
        checkpoints = [opened[recipe.base if of_base[n] and recipe.base else m.ref.plain] for n, m in used.items()]
        configs = dict(zip(used, pool_configs(checkpoints), strict=True))
        self.prefixes = prefixes
        depths = {name: depth_of(config) for name, config in configs.items()}
        self.recipe = recipe = replace(recipe, dtype=recipe.dtype or _dtype([configs[name] for name in used]))
        self.depths: Mapping[str, int] = {model.name: depths[model.name] for model in recipe.models}
        """The number of layers of each model of the pool, in order, the merges' last (`merge_name`); a path may also take the
        base's, as ""."""
        self._configs: dict[str, PreTrainedConfig] = configs
        self._models: dict[str, PreTrainedModel] = {
            name: LiveModel(_alone(recipe, model, of_base[name]), opened, device=device).model for name, model in used.items()
        }
        self._live: dict[str, LiveModel] = {}
        self.recipes: dict[str, Recipe] = {}
        """The recipe of each merge of the pool."""
        if len(set(depths.values())) == 1:
            self._put_merges(dict(zip(names, (recipe, *merges), strict=True)), opened, configs[next(iter(used))], device)
        primary = self._models[next(iter(used))]
        self.stack = _stack(primary)
        """Where `model` keeps its layers, such as "model.layers"."""
        self._blocks = {name: list(model.get_submodule(self.stack).children()) for name, model in self._models.items()}
        self._config = deepcopy(primary.config)
        self.model: PreTrainedModel = _configured(sharing(primary), primary.config, self._config)
        """What runs the path that was taken last; the first model's layers at first."""
        if prefixes is not None:
            prefixes.watch(self.model)
        self.path: Path = ()
        self.seams: dict[int, Seam] = {}
        self.take(self.identity(next(iter(self.depths))))

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """Every (model, layer) of the pool, in the order of `statistics`."""
        return tuple((name, layer) for name, depth in self.depths.items() for layer in range(depth))

    def identity(self, model: str) -> Path:
        """The path that is `model` (a name of `depths`) as it is."""
        if model not in self.depths:
            raise RecipeError(unknown("model of a path", model, self.depths))
        return tuple(Step(model, layer) for layer in range(self.depths[model]))

    def load(self, recipe: Recipe) -> None:
        """Replace the weights of the merge by those of another `recipe` of the same models, in place."""
        if not self._live:
            raise MergeError("Models of several depths have no merge: a path takes their layers as they are.")
        self.recipe = self.recipes[MERGED] = self._mergeable(recipe)
        self._live[MERGED].load(self.recipe)
        self._follow_prefixes()

    def take(self, path: Sequence[Step], seams: Mapping[int, Seam] | None = None) -> PreTrainedModel:
        """Make `model` run `path`, with maps of the residual stream (`seams`, by the position before which they stand).

        Raises `RecipeError` for layers that the pool does not have.
        """
        self._check(path)
        self.path, self.seams = tuple(path), dict(seams or {})
        self._put_outside(path[0].model, path[-1].model)
        layers = nn.ModuleList(self._placed(i, step) for i, step in enumerate(path))
        parent, _, name = self.stack.rpartition(".")
        setattr(self.model.get_submodule(parent), name, layers.eval())
        follow(self._config, [(self._configs[step.model], step.layer) for step in path])
        for module in self.model.modules():  # what transformers hangs on layers, it is to hang on the new ones
            vars(module).pop("_output_capturing_hooks_installed", None)
        self._follow_prefixes()
        return self.model

    def recipe_of(self, path: Sequence[Step], seams: Mapping[int, Seam] | None = None) -> Recipe:
        """The recipe whose merge is the model of `path`: a stock checkpoint, scales folded into its weights.

        Raises `MergeError` for seams that are no scalars: no stock checkpoint holds them.
        """
        self._check(path)
        for place, seam in (seams or {}).items():
            raise MergeError(
                f"The {seam.kind} map before position {place} of the path cannot be stored in a stock checkpoint: maps of "
                "single channels do not commute with a norm that reads the stream. Align with scalars, which a path can have, "
                "or save it with a module that runs the maps: hf_merge.aligned.save_aligned."
            )
        merge = next((step.model for step in path if step.model in self.recipes), MERGED)
        steps = [replace(step, model=MERGED) if step.model == merge else step for step in path]
        return along(self.recipes.get(merge, self.recipe), steps, self.depths.get(merge, 1))

    def statistics(self) -> NDArray[np.float64]:
        """What each block of the pool changed, `(blocks, 6)`: for attention, MLP and norms the logarithm of the norm of the
        difference from the base's same layer, relative to that layer, and the cosine of the difference with it.

        Zeros where there is no base, or no such layer in it.
        """
        found = np.zeros((len(self.blocks), 2 * len(GROUPS)))
        base = self._blocks.get("", [])
        for i, (name, layer) in enumerate(self.blocks):
            if layer < len(base):
                found[i] = differences(self._blocks[name][layer], base[layer])
        return found

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that the model runs now."""
        return list(self.model.get_submodule(self.stack).children())

    def block(self, step: Step) -> nn.Module:
        """The layer of the pool that a step takes."""
        return self._blocks[step.model][step.layer]

    def depth_of(self, model: str) -> int:
        """The number of layers of a model of the pool, the base ("") included."""
        return len(self._blocks[model])

    def _put_merges(
        self, merges: Mapping[str, Recipe], opened: Opened, config: PreTrainedConfig, device: torch.device | None
    ) -> None:
        self.recipes = {name: self._mergeable(recipe) for name, recipe in merges.items()}
        for name, recipe in self.recipes.items():
            self._live[name] = LiveModel(recipe, opened, device=device)
            self.depths = {**self.depths, name: depth_of(config)}
            self._configs[name], self._models[name] = config, self._live[name].model

    def _check(self, path: Sequence[Step]) -> None:
        if not path:
            raise RecipeError("A path needs steps, got none.")
        for step in path:
            if step.model not in self._blocks:
                raise RecipeError(unknown("model of a path", step.model, self._blocks))
            if not 0 <= step.layer < len(self._blocks[step.model]):
                raise RecipeError(f"{step} is no layer: the model has {len(self._blocks[step.model])}.")
            if not 0 < step.scale < float("inf"):
                raise RecipeError(f"The scale of {step} is a positive number.")
        if len(merges := {step.model for step in path} & self.recipes.keys()) > 1:
            raise RecipeError(f"A path takes layers of one merge, for a recipe has one; got {', '.join(sorted(merges))}.")

    def _mergeable(self, recipe: Recipe) -> Recipe:
        # A method that needs no base may have a recipe without one, beside others on the common base.
        bases = {recipe.base, self.recipe.base} - {None}
        if [m.ref for m in recipe.models] != [m.ref for m in self.recipe.models] or len(bases) > 1:
            raise RecipeError("The merge of a pool is one of its own models: give a recipe of the same models and base.")
        return replace(recipe, dtype=recipe.dtype or self.recipe.dtype)

    def _put_outside(self, first: str, last: str) -> None:
        """What is in no layer, from the models that lend it: before the layers it is the `first`'s, after them the `last`'s."""
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        inside = f"{self.stack}."
        for name, _ in [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]:
            if not name.startswith(inside):
                owner = first if comes_before_layers(tied.get(name, name)) else last
                _put(self.model, name, _get(self._models[owner], name))

    def _placed(self, position: int, step: Step) -> nn.Module:
        """A layer that shares its weights with the model's and knows its own place."""
        block = _configured(sharing(self.block(step)), self._configs_of(step), self._config)
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
        run = partial(_run, block, step.scale, self.seams.get(position))
        block.forward = run if self.prefixes is None else self.prefixes.shared(position, run)
        return block

    def _configs_of(self, step: Step) -> PreTrainedConfig:
        found: PreTrainedConfig = self._models[step.model].config
        return found

    def _follow_prefixes(self) -> None:
        if self.prefixes is not None:
            merges = {name: recipe.digest for name, recipe in self.recipes.items()}
            seams = {i: seam.digest for i, seam in self.seams.items()}
            keys: list[Hashable] = [
                (step.model, step.layer, step.scale, merges.get(step.model, ""), seams.get(i))
                for i, step in enumerate(self.path)
            ]
            self.prefixes.follow(keys)


def sharing(module: M) -> M:
    """The same module once more: its own tree of modules and its own attributes, the same tensors."""
    twin = copy(module)
    for name, value in vars(twin).items():
        if isinstance(value, dict):
            vars(twin)[name] = copy(value)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else sharing(child)
    return twin


def _configured(module: M, old: PreTrainedConfig, new: PreTrainedConfig) -> M:
    for part in module.modules():
        if vars(part).get("config") is old:
            part.config = new  # type: ignore[assignment]
    return module


def _run(block: nn.Module, scale: float, seam: Seam | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if scale != 1.0:
        hidden_states = hidden_states * scale
    if seam is not None:
        hidden_states = seam(hidden_states)
    return type(block).forward(block, hidden_states, *args, **kwargs)


def _alone(recipe: Recipe, model: RecipeModel, on_base: bool) -> Recipe:
    own = RecipeModel(ref=model.ref, name=model.name)
    return Recipe(method="linear", models=(own,), base=recipe.base if on_base else None, dtype=recipe.dtype)


def _dtype(configs: Sequence[PreTrainedConfig]) -> str | None:
    """The first model's dtype, if the models have several: one model has one."""
    kinds = [str(config.dtype).removeprefix("torch.") for config in configs]
    return kinds[0] if len(set(kinds)) > 1 else None


def _stack(model: PreTrainedModel) -> str:
    depths = Layers(name for name, _ in model.named_parameters()).depths
    if len(depths) != 1:
        raise MergeError(f"A path goes through one stack of layers, and a {type(model).__name__} has {list(depths) or 'none'}.")
    return next(iter(depths))


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), leaf)
    return found


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]
