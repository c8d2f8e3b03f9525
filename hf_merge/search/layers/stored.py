"""Trained networks as files: their weights as safetensors, what they are for as JSON."""

import json
from dataclasses import asdict
from pathlib import Path as Folder

import numpy as np
from safetensors.torch import load_file, save_file

from hf_merge.errors import RecipeError
from hf_merge.search.layers.policy import PathNets
from hf_merge.search.layers.pool import Block, Pool

WEIGHTS, ABOUT = "path_nets.safetensors", "path_nets.json"


def save_nets(folder: Folder, nets: PathNets) -> None:
    """Writes both files into `folder`; the JSON comes last, and each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = nets.pool
    about = {
        "blocks": [asdict(block) for block in pool.blocks],
        "statistics": pool.statistics.tolist(),
        "width_in": pool.width_in,
        "width_out": pool.width_out,
        "alternatives": pool.alternatives,
        "shape": nets.shape,
    }
    unfinished = folder / f"{WEIGHTS}.part"
    save_file({name: tensor.contiguous() for name, tensor in nets.state_dict().items()}, unfinished)
    unfinished.replace(folder / WEIGHTS)
    unfinished = folder / f"{ABOUT}.part"
    unfinished.write_text(json.dumps(about, indent=1), encoding="utf-8")
    unfinished.replace(folder / ABOUT)


def load_nets(folder: Folder) -> PathNets:
    """Networks as `save_nets` wrote them. Raises RecipeError if they are not there."""
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise RecipeError(
            f"{folder} has no {ABOUT} and {WEIGHTS}; give the folder that a path search has saved its networks to."
        )
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    pool = Pool(
        blocks=tuple(Block(**block) for block in about["blocks"]),
        statistics=np.array(about["statistics"]),
        width_in=about["width_in"],
        width_out=about["width_out"],
        alternatives=about.get("alternatives", ()),
    )
    nets = PathNets(pool, **about["shape"])
    nets.load_state_dict(load_file(folder / WEIGHTS))
    return nets
