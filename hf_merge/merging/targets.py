"""What each tensor of the result is made of: names in the models, by alignment or by a map of layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.checkpoints.tensors import tensors
from hf_merge.errors import MergeError
from hf_merge.merging.align import Alignment
from hf_merge.merging.architecture import layer_lists, model_config
from hf_merge.merging.layers import Layers, comes_before_layers
from hf_merge.recipes.layer_map import LayerMap, LayerRange, Slice

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_PARTS = {
    "text_decoder": ("language_model", "text_model", "decoder"),
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "projector", "connector", "merger"),
}
"""Other names that the parts of a model have; a part is otherwise named as in its tensors' names."""
_MAIN_PARTS = ("text_decoder", "decoder", "")


@dataclass(frozen=True)
class Target:
    """One tensor of the result: its name, the (position in the plan's inputs, name) of its `sources` in order, with the names
    of the `models` they are, and of its base; where it stands: its slice and its depth in [0, 1] of the layers.

    A target without `models` is carried over from its only source, which is the model `copied` if that is named.
    """

    name: str
    sources: tuple[tuple[int, str], ...]
    models: tuple[str, ...]
    base: tuple[int, str] | None
    part: Slice | None = None
    depth: float = 0.0
    copied: str = ""


def aligned_targets(alignment: Alignment, models: Mapping[str, int], base: int | None) -> Iterator[Target]:
    """The targets of models that are merged tensor by tensor. `models` gives each model's position in the plan's inputs."""
    layers, names = Layers(alignment.tensors), tuple(models)
    for name, places in alignment.tensors.items():
        depth = layers.depth(name)
        if all(places):
            anchor = None if base is None else (base, places[base])
            yield Target(name, tuple((i, places[i]) for i in models.values()), names, anchor, None, depth)
        else:
            owner = next(i for i, place in enumerate(places) if place)
            yield Target(name, ((owner, places[owner]),), (), None, None, depth)


@dataclass(frozen=True)
class Composition:
    """The targets of a map of layers, and the config of what they make up.

    `scales` are what the residual stream is multiplied by before each layer of the `stack`; empty if nowhere.
    """

    targets: tuple[Target, ...]
    config: dict[str, Any]
    stack: str = ""
    scales: tuple[float, ...] = ()


def composed_targets(
    layers: LayerMap, inputs: Sequence[Checkpoint], models: Mapping[str, int], base: int | None
) -> Composition:
    """The targets of a map of layers. Raises `MergeError` for layers that a model does not have, and unlike tensors."""
    return _Composer(layers, inputs, models, base).compose()


class _Composer:
    def __init__(self, layers: LayerMap, inputs: Sequence[Checkpoint], models: Mapping[str, int], base: int | None) -> None:
        self.map, self.inputs, self.models, self.base = layers, inputs, models, base
        self.layers = [Layers(tensors(checkpoint)) for checkpoint in inputs]
        self.problems: list[str] = []

    def compose(self) -> Composition:
        targets: list[Target] = []
        config, stack, scales = dict(self.inputs[0].config), "", list[float]()
        for module in self.map.modules:
            parts = [self._whole(part, module) for part in self.map.slices if part.module == module]
            if self.problems:
                break
            before, layered, after = (
                self._outside(parts[0], module),
                self._layers(parts, module),
                self._outside(parts[-1], module),
            )
            targets += [t for t in before if comes_before_layers(t.name)]
            targets += layered
            targets += [t for t in after if not comes_before_layers(t.name)]
            config = self._config(config, parts, module)
            if self.map.scaled:
                stack = str(self._stack(0, module))
                scales = [part.residual_scale if i == 0 else 1.0 for part in parts for i in range(part.sources[0].length or 0)]
        if self.map.scaled and len(self.map.modules) > 1:
            self.problems.append("`residual_scale` is for models of one part, and these slices are of several modules.")
        self.problems += self._unlike(targets)
        if self.problems:
            listed = "".join(f"\n  - {problem}" for problem in dict.fromkeys(self.problems))
            raise MergeError(f"The slices do not fit the models:{listed}")
        return Composition(tuple(targets), config, stack, tuple(scales))

    def _stack(self, position: int, module: str) -> str | None:
        """The one stack of layers of a model's part."""
        found = [stack for stack in self.layers[position].depths if self._belongs(f"{stack}.0.", module)]
        return found[0] if len(found) == 1 else None

    def _belongs(self, name: str, module: str) -> bool:
        if not module:
            return True
        parts = set(name.split("."))
        if parts & {module, *_PARTS.get(module, ())}:
            return True
        others = [m for m in self.map.modules if m != module]
        return module in _MAIN_PARTS and not any(parts & {m, *_PARTS.get(m, ())} for m in others)

    def _position(self, source: LayerRange) -> int:
        if source.model:
            return self.models[source.model]
        return 0 if self.base is None else self.base

    def _whole(self, part: Slice, module: str) -> Slice:
        """The slice with every range's end written out, checked against the models' depths."""
        sources = []
        for source in part.sources:
            i = self._position(source)
            stack = self._stack(i, module)
            if stack is None:
                stacks = ", ".join(self.layers[i].depths) or "none"
                where = f" in the part {module!r}" if module else ""
                self.problems.append(
                    f"{self.inputs[i].label} has not one stack of layers{where}: {stacks}. Name it in `modules`."
                )
                continue
            depth = self.layers[i].depths[stack]
            stop = depth if source.stop is None else source.stop
            if stop > depth:
                wanted = f"layers [{source.start}, {stop})"
                self.problems.append(f"{self.inputs[i].label} has {depth} layers, and a slice takes {wanted} of it.")
            sources.append(replace(source, stop=stop))
        if len({source.length for source in sources}) > 1:
            shown = ", ".join(f"{s.model or 'the base'} [{s.start}, {s.stop})" for s in sources)
            self.problems.append(f"The sources of a slice have equally many layers, got {shown}.")
        return replace(part, sources=tuple(sources))

    def _layers(self, parts: Sequence[Slice], module: str) -> Iterator[Target]:
        out = self._stack(0, module)
        number = 0
        for part in parts:
            length = part.sources[0].length or 0
            for i in range(length):
                yield from self._layer(part, i, f"{out}.{number}", part.at(i, length), module)
                number += 1

    def _layer(self, part: Slice, i: int, out: str, depth: float, module: str) -> Iterator[Target]:
        merged = [source for source in part.sources if source.model and not part.copied]
        base = next((source for source in part.sources if not source.model), None)
        first = part.sources[0] if not merged else merged[0]
        model = self._position(first)
        for rest in self.layers[model].rests[str(self._stack(model, module)), first.start + i]:

            def place(source: LayerRange, position: int, rest: str = rest) -> tuple[int, str]:
                return position, f"{self._stack(position, module)}.{source.start + i}.{rest}"

            sources = tuple(place(source, self._position(source)) for source in merged or [first])
            anchor = place(base or first, self.base) if merged and self.base is not None else None
            names = tuple(source.model for source in merged)
            yield Target(f"{out}.{rest}", sources, names, anchor, part, depth, first.model if part.copied else "")

    def _outside(self, part: Slice, module: str) -> Iterator[Target]:
        """What is in no layer, merged as a slice is."""
        merged = [source for source in part.sources if source.model and not part.copied]
        for name in tensors(self.inputs[0]):
            if self.layers[0].place(name) is None and self._belongs(name, module):
                sources = tuple((self._position(source), name) for source in merged or part.sources)
                anchor = (self.base, name) if merged and self.base is not None else None
                names = tuple(source.model for source in merged)
                yield Target(name, sources, names, anchor, part, 0.0, part.sources[0].model if part.copied else "")

    def _unlike(self, targets: Iterable[Target]) -> Iterator[str]:
        for target in targets:
            places = [*target.sources, *([target.base] if target.base else [])]
            shapes = {}
            for i, name in places:
                entry = tensors(self.inputs[i]).get(name)
                if entry is None:
                    yield f"{self.inputs[i].label} has no tensor {name!r}, which {target.name!r} is to be made of."
                else:
                    shapes[f"{self.inputs[i].label} {name}"] = list(entry.shape)
            if len({tuple(shape) for shape in shapes.values()}) > 1:
                yield f"{target.name!r} would be made of tensors of several shapes: {shapes}."

    def _config(self, config: dict[str, Any], parts: Sequence[Slice], module: str) -> dict[str, Any]:
        """The config with as many layers, and with its lists of one entry a layer in the layers' new order."""
        old = self.layers[0].depths[str(self._stack(0, module))]
        picked = [(s.sources[0], s.sources[0].start + i) for s in parts for i in range(s.sources[0].length or 0)]
        key = module if module in ("encoder", "decoder") else ""
        changed, found = dict(config), False
        for name, value in config.items():
            if isinstance(value, dict) and any(k in value for k in _DEPTHS) and self._is_config_of(name, module):
                inner = _Nested(self, name, old, picked)
                changed[name], found = inner.changed(value), True
        if not found:
            changed = _Nested(self, "", old, picked, key).changed(config)
        return changed

    def _is_config_of(self, name: str, module: str) -> bool:
        vision = "vision" in name or "visual" in name
        return vision == (module == "vision_tower") and (name.endswith("_config") or name == module)


class _Nested:
    """The config of one part of a model: the whole of it, or what stands under a key of it."""

    def __init__(
        self, composer: _Composer, key: str, old: int, picked: Sequence[tuple[LayerRange, int]], half: str = ""
    ) -> None:
        self.composer, self.key, self.old, self.picked, self.half = composer, key, old, picked, half

    def changed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(config)
        names = [n for n in (f"{self.half}_layers", f"num_{self.half}_layers") if self.half and config.get(n) == self.old]
        names = names or [n for n in _DEPTHS if config.get(n) == self.old]
        for name in names:
            found[name] = len(self.picked)
        known = dict(config) | self._derived(self.composer.inputs[0])
        for name in layer_lists(known, self.old):
            found[name] = [self._entry(name, source, layer) for source, layer in self.picked]
        return found

    def _derived(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The kinds of the layers, where config.json leaves them to transformers, which goes by their numbers."""
        if "settings" not in checkpoint.kept:
            found = model_config(checkpoint)
            checkpoint.kept["settings"] = {} if found is None else found.to_dict()
        settings = checkpoint.kept["settings"]
        settings = (settings.get(self.key) or {}) if self.key else settings
        return {name: settings[name] for name in ("layer_types", "mlp_layer_types") if isinstance(settings.get(name), list)}

    def _entry(self, name: str, source: LayerRange, layer: int) -> Any:
        checkpoint = self.composer.inputs[self.composer._position(source)]
        config = checkpoint.config
        config = config.get(self.key, {}) if self.key else config
        values = config.get(name) or self._derived(checkpoint).get(name)
        return values[layer] if isinstance(values, list) and layer < len(values) else None
