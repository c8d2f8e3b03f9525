"""Paths with maps that no stock checkpoint holds: saved with a small module of their own, which runs them.

A map of single channels, or of all of them, does not commute with a norm that reads the stream, and some families (OLMo 2)
cannot even take one scale into their weights. What can be folded needs none of this: merge `PathModel.recipe_of(path)`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from torch import Tensor

from hf_merge.checkpoints.checkpoint import hub_api
from hf_merge.checkpoints.index import INDEX
from hf_merge.checkpoints.writer import ShardFile, TensorSpec, index_json, plan_shards
from hf_merge.errors import MergeError
from hf_merge.merging.architecture import auto_class
from hf_merge.merging.path_model import PathModel
from hf_merge.merging.plan import open_inputs, plan
from hf_merge.publishing.card import render
from hf_merge.search.trial import Trial
from hf_merge.single import card_facts, result_files

MODULE = "modeling_aligned.py"
_CODE = Template('''\
"""$model with maps of the stream between its layers, as hf_merge saved it. Needs torch and transformers, nothing else.

Before each layer that `stream_maps` in config.json names, by its place, the stream x becomes x * weight + bias, or
x @ weight + bias where the weight is a matrix. All other weights are those of a plain $model.
"""

import torch
from torch import nn
from transformers import $config, $model


class StreamMap(nn.Module):
    """A map of the stream `(..., d)`, the identity at first: `shape` is `[1]`, `[d]` or `[d, d]`."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(shape[0]) if len(shape) == 2 else torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape[-1]))

    def forward(self, stream):
        return (stream @ self.weight if self.weight.dim() == 2 else stream * self.weight) + self.bias


def _mapped(layer, args, kwargs):
    if args:
        return (layer.stream_map(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.stream_map(kwargs["hidden_states"])}


class AlignedConfig($config):
    model_type = "aligned_$kind"


class AlignedModel($model):
    config_class = AlignedConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        layers = self.get_submodule("$stack")
        for place, shape in config.stream_maps.items():
            layers[int(place)].stream_map = StreamMap(shape)
            layers[int(place)].register_forward_pre_hook(_mapped, with_kwargs=True)
''')


def save_aligned(
    model: PathModel,
    out: Path | str,
    *,
    max_shard_size: int | str = "5GB",
    pickles: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Save what `model` runs, its path with all scales and maps, into the new folder `out`, and return it.

    The folder holds `modeling_aligned.py` beside the weights: `from_pretrained(out, trust_remote_code=True)` runs it, and
    without that transformers refuses the folder instead of leaving out the maps. recipe.yaml has the path without them. Raises
    `MergeError` if there is nothing to map, or something in `out`.
    """
    maps, folder = _maps(model), Path(out).expanduser()
    if not maps:
        raise MergeError("The path has no maps and no scales, so it needs no module: merge its recipe (`recipe_of`).")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MergeError(f"{folder} is not empty. Give another folder.")
    api, recipe = hub_api(token), model.recipe_of([replace(step, scale=1.0) for step in model.path])
    compiled = plan(recipe, open_inputs(recipe, api, pickles=pickles))
    trial = Trial(number=0, recipe=compiled.recipe)
    facts = card_facts(compiled, trial, folder.resolve().name, api, consent=True, maps_before=sorted(maps))
    files = result_files(compiled) | {"README.md": str(render(facts)).encode(), MODULE: _code(model).encode()}
    files["config.json"] = _config(files["config.json"], {str(place): list(m.shape) for place, (m, _) in maps.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under its name there is never a folder without the maps, which would be another model.
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        made = Path(beside) / "made"
        for name, data in files.items():
            (made / name).parent.mkdir(exist_ok=True, parents=True)
            (made / name).write_bytes(data)
        _write(made, _tensors(model, maps), max_shard_size)
        os.replace(made, folder)
    return folder


def _maps(model: PathModel) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight and bias of the map before each place of the path that has one; a scale is a map, too."""
    found = {}
    for place, step in enumerate(model.path):
        seam = model.seams.get(place)
        if seam is not None:
            weight = seam.weight.reshape(-1) if seam.weight.dim() == 0 else seam.weight
            found[place] = step.scale * weight, seam.bias.expand(weight.shape[-1])
        elif step.scale != 1.0:
            weight = Tensor([step.scale])
            found[place] = weight, weight.new_zeros(1)
    dtype = model.model.dtype
    return {place: (weight.to("cpu", dtype), bias.to("cpu", dtype)) for place, (weight, bias) in found.items()}


def _code(model: PathModel) -> str:
    config = model.model.config
    return _CODE.substitute(
        model=type(model.model).__name__, config=type(config).__name__, kind=config.model_type, stack=model.stack
    )


def _tensors(model: PathModel, maps: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """All weights, under transformers' names and not the checkpoint's: what it renames goes by the model type, which is new."""
    tied = dict(getattr(model.model, "all_tied_weights_keys", None) or {})
    found = {name: tensor for name, tensor in model.model.state_dict().items() if name not in tied}
    for place, pair in maps.items():
        found |= zip((f"{model.stack}.{place}.stream_map.{part}" for part in ("weight", "bias")), pair, strict=True)
    return found


def _write(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    shards = plan_shards({name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}, max_shard_size)
    for shard in shards:
        file = ShardFile(shard, folder)
        for name in shard.tensors:
            file.write(name, 0, tensors[name].cpu().flatten())
        file.finish()
    (folder / INDEX).unlink(missing_ok=True)
    if index := index_json(shards):
        (folder / INDEX).write_bytes(index)


def _config(plain: bytes, shapes: Mapping[str, list[int]]) -> bytes:
    """The config with the module's classes. Its model type is unknown to transformers, which would run the layers without their
    maps otherwise."""
    config = json.loads(plain)
    module, loaded_by = MODULE.removesuffix(".py"), auto_class(config)[0]
    config |= {
        "architectures": ["AlignedModel"],
        "auto_map": {"AutoConfig": f"{module}.AlignedConfig", loaded_by: f"{module}.AlignedModel"},
        "model_type": f"aligned_{config['model_type']}",
        "stream_maps": shapes,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
