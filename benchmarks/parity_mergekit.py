"""mergekit's side of parity.py, which starts it with the Python of mergekit's environment: REQUESTS.json ANSWERS.json

mergekit takes five seconds to start, so many recipes are merged in one process: each by the command `mergekit-yaml` itself.
Masks of random methods come from its public function `merge_tensors`, with `torch.bernoulli` recorded.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mergekit.merge_methods
import torch
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

bernoulli = torch.bernoulli


def merged(file: str, out: str) -> None:
    """mergekit-yaml FILE OUT. Its seed only matters to methods that are random."""
    mergekit_yaml.main([file, out, "--quiet", "--random-seed", "1", "--no-write-model-card"], standalone_mode=False)


def masked(method: str, files: list[str], parameters: dict[str, Any], out: str) -> list[str]:
    """All tensors merged with masks drawn by mergekit; both are saved, and the chances that the masks were drawn with.

    The tensors at which mergekit fails are left out and returned.
    """
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(chances: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = bernoulli(chances, *args, **kwargs)
        drawn.append((chances.clone(), mask.to(torch.uint8)))
        return mask

    torch.manual_seed(1)
    torch.bernoulli = record  # type: ignore[assignment]
    models, found, raised = [load_file(file) for file in files], {}, []
    for name in sorted(set.intersection(*(set(model) for model in models))):
        if not models[0][name].is_floating_point():
            continue
        drawn.clear()
        stack = [model[name].float() for model in models]
        try:
            found[f"{name}|merged"] = mergekit.merge_methods.merge_tensors(stack, method, parameters=parameters, base_index=0)
        except RuntimeError as problem:
            raised.append(f"{name} {list(stack[0].shape)}: {problem}"[:200])
            continue
        assert len(drawn) == len(stack) - 1, "one mask a model"
        for number, (chances, mask) in enumerate(drawn):
            found[f"{name}|chances|{number}"], found[f"{name}|mask|{number}"] = chances.float().contiguous(), mask
    torch.bernoulli = bernoulli
    save_file(found, out)
    return raised


def main(requests: Path, answers: Path) -> None:
    """Carry out all requests; the answer to each is its seconds and what went wrong, if anything."""
    torch.set_num_threads(1)
    found = []
    for number, request in enumerate(json.loads(requests.read_text())):
        started, error, raised = time.perf_counter(), "", None
        try:
            raised = (masked if "method" in request else merged)(**request)
        except Exception as problem:
            torch.bernoulli = bernoulli
            error = f"{type(problem).__name__}: {problem}"
        found.append({"seconds": time.perf_counter() - started, "error": error[:300], "raised": raised})
        print(f"{number}: {request['out']} {found[-1]}", file=sys.stderr, flush=True)
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
