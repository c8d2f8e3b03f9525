"""The random methods of parity.py: statistics of the masks on both sides, and values where the masks are the same."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from parity_recipes import RANDOM, mask_recipe, recipe
from parity_values import TOLERANCE, deltas, relative, weights
from safetensors.torch import load_file
from torch import Tensor

from hf_merge.merging.plan import TensorJob, open_inputs, plan
from hf_merge.methods.method import row_length
from hf_merge.recipes import yaml as recipes
from hf_merge.single import merge
from hf_merge.tensors.rng import STEPS, Draws


@dataclass
class RandomRow:
    """A random method on one family. `kept` and `z` are mergekit's and ours: the share of elements that stay, and the largest
    deviation of a tensor's count from what its chances say, in standard deviations."""

    family: str
    method: str
    tensors: int = 0
    elements: int = 0
    largest: float = 0.0
    beyond: int = 0
    chances: float = 0.0
    other_chances: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    counted: int = 0
    expected: float = 0.0
    kept: tuple[float, float] = (0.0, 0.0)
    z: tuple[float, float] = (0.0, 0.0)
    deciles: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    error: str = ""


@dataclass(frozen=True)
class Given(Draws):
    """In place of random numbers the masks `(models, n)` of a tensor, whose blocks have `size` elements."""

    masks: Tensor
    size: int

    def uniform(self, model: int, count: int) -> Tensor:
        """Below every chance where the mask says so, else above."""
        return torch.where(self.masks[model, self.block * self.size :][:count].bool(), 0, STEPS).int()


def with_masks(job: TensorJob, stack: Tensor, masks: Tensor, **changed: Any) -> Tensor:
    """The job's method on deltas `(models, n)` with masks `(models, n)`, block by block: `(n,)`; float64 asks for draws."""
    stack = stack.double()
    method, arguments = job.method, {k: v for k, v in job.arguments.items() if k != "scaling"} | changed
    assert method is not None
    starts, merged = range(0, stack.shape[1], job.block), torch.empty_like(stack[0])
    draws = lambda number: Given(0, job.models, job.name, number, masks, job.block)  # noqa: E731
    blocks = lambda: (stack[:, s : s + job.block] for s in starts)  # noqa: E731
    state = method.measured(blocks, stack.shape[1], arguments, shape=job.spec.shape, draws=draws)
    for number, s in enumerate(starts):
        block = stack[:, s : s + job.block]
        merged[s : s + job.block] = method.merge_block(
            block, arguments, rng=draws(number), measured=state, start=s, shape=job.spec.shape
        )
    return merged


def requests(folders: list[Path], work: Path) -> list[dict[str, Any]]:
    """For mergekit: each random method on all tensors of the base and its fine-tunes, its masks recorded."""
    found = []
    for method in RANDOM:
        entries = (recipe(method, folders) or {})["models"]
        parameters = {name: [entry["parameters"][name] for entry in entries] for name in entries[0]["parameters"]}
        found.append(
            {
                "method": method,
                "files": [str(next(folder.glob("*.safetensors"))) for folder in folders],
                "parameters": parameters,
                "out": str(work / f"{method}.safetensors"),
            }
        )
    return found


def table(mergekit: Any, work: Path, inputs: dict[str, list[Path]], methods: Sequence[str]) -> list[RandomRow]:
    """Every random method on every family."""
    asked, rows = [], []
    for family, folders in inputs.items():
        place = work / "runs" / f"{family}-random"
        place.mkdir(parents=True)
        for request in requests(folders, place):
            method = request["method"]
            if method not in methods:
                continue
            single = {"file": str(place / f"{method}-mask.yaml"), "out": str(place / f"{method}-theirs")}
            Path(single["file"]).write_text(yaml.safe_dump(mask_recipe(method, folders), sort_keys=False))
            (place / f"{method}.yaml").write_text(yaml.safe_dump(recipe(method, folders), sort_keys=False))
            asked += [request, single]
            rows.append((RandomRow(family, method), place, folders))
    answers = iter(mergekit(asked))
    for row, place, folders in rows:
        masked, single = next(answers), next(answers)
        row.raised = masked["raised"]
        recorded = load_file(place / f"{row.method}.safetensors")
        chances = _values(row, place, recorded)
        if single["error"]:
            row.error = single["error"]
        else:
            merge(place / f"{row.method}-mask.yaml", place / f"{row.method}-ours", progress=False)
            _masks(row, place, folders, chances)
        print(
            f"{row.family} {row.method}: {row.largest:.1e} {row.beyond}, kept {row.kept}, z {row.z} {row.error}",
            file=sys.stderr,
        )
    return [row for row, _, _ in rows]


def _values(row: RandomRow, place: Path, recorded: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compare the values given mergekit's masks; and the first model's chances, mergekit's and ours, by tensor."""
    given = recipes.load(place / f"{row.method}.yaml")
    jobs, found = plan(given, open_inputs(given)).jobs, {}
    for key, theirs in recorded.items():
        name, _, kind = key.partition("|")
        if kind != "merged":
            continue
        job = jobs[name]
        stack = deltas(job)
        masks = torch.stack([recorded[f"{name}|mask|{k}"].flatten() for k in range(len(stack))])
        base = job.base.read(0, job.elements).float()  # type: ignore[union-attr]
        off = relative(base + with_masks(job, stack, masks), theirs.flatten())
        row.tensors, row.elements = row.tensors + 1, row.elements + len(off)
        row.largest, row.beyond = max(row.largest, float(off.max())), row.beyond + int((off > TOLERANCE).sum())
        its = recorded[f"{name}|chances|0"].flatten().double()
        mine = its.new_full(its.shape, float(job.arguments["density"][0]))
        if row.method.startswith("della"):
            # With everything kept, what the deltas are divided with.
            single = replace(job, arguments=_first(job.arguments))
            ones = torch.ones_like(stack[:1])
            divided = with_masks(single, nonzero(stack[:1]), ones, match_l1=False, rescale=True, weights=[1.0])
            mine = nonzero(stack[:1])[0].double() / divided.double()
        found[name] = (its, mine)
        apart = (its - mine).abs()[alone(stack[0].reshape(-1, row_length(job.spec.shape)))]
        if not len(apart):
            continue
        row.chances = max(row.chances, float(apart.max()))
        if float(apart.max()) > 2 / STEPS:
            row.other_chances.append(f"{name} {list(job.spec.shape)}")
    return found


def alone(rows: Tensor) -> Tensor:
    """Elements of `rows`, flat, whose magnitude is no other one's in the row: those have a rank that nobody can choose."""
    values, places = rows.abs().sort(dim=1)
    same = values[:, 1:] == values[:, :-1]
    edge = torch.zeros(len(rows), 1, dtype=torch.bool)
    shared = torch.cat([edge, same], 1) | torch.cat([same, edge], 1)
    return torch.empty_like(shared).scatter_(1, places, ~shared).flatten()


def _first(arguments: Any) -> dict[str, Any]:
    """Arguments of the first model alone."""
    return {k: v[:1] if isinstance(v, list) else v for k, v in arguments.items()}


def nonzero(stack: Tensor) -> Tensor:
    """The deltas, with a tiny number where they are 0, so that a chance can be read off the quotient."""
    return torch.where(stack == 0, 1e-30, stack)


def _masks(row: RandomRow, place: Path, folders: list[Path], chances: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Count what stays of one model on both sides, among the elements that differ from the base."""
    base, tuned = weights(folders[0]), weights(folders[1])
    sides = [weights(place / f"{row.method}-{side}") for side in ("theirs", "ours")]
    kept, total, expected, z = [0, 0], 0, 0.0, [0.0, 0.0]
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1]
    bins = [torch.zeros(10, 2, dtype=torch.float64) for _ in sides]
    for name, both in chances.items():
        if any(name not in side for side in sides):
            continue
        touched = (tuned[name] != base[name]).flatten()
        total, expected = total + int(touched.sum()), expected + float(both[1][touched].sum())
        for i, (side, chance) in enumerate(zip(sides, both, strict=True)):
            stays = (side[name] != base[name]).flatten()[touched].double()
            p = chance[touched]
            kept[i] += int(stays.sum())
            spread = float((p * (1 - p)).sum()) ** 0.5
            z[i] = max(z[i], abs(float((stays - p).sum())) / spread) if spread > 0 else z[i]
            low, high = float(both[1].min()), float(both[1].max())
            if high - low > 0.1:
                decile = torch.bucketize((both[1][touched] - low) / (high - low), edges)
                bins[i][:, 0].index_add_(0, decile, stays)
                bins[i][:, 1].index_add_(0, decile, torch.ones_like(stays))
    row.counted, row.expected = total, expected / max(1, total)
    row.kept, row.z = (kept[0] / max(1, total), kept[1] / max(1, total)), (z[0], z[1])
    if row.method.startswith("della"):
        theirs, ours = ((b[:, 0] / b[:, 1]).nan_to_num().tolist() for b in bins)
        row.deciles = (theirs, ours)
