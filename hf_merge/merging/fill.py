"""Which row of which model stands in each row of a merged vocabulary: the rule that fills what a model lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.checkpoints.rows import RowMap


@dataclass(frozen=True)
class Given:
    """What a recipe says of one row: the `rows` as (model, row) that it is the mean of (none: zeros; None: the usual rule),
    where a model lacks it, or with `force` in every model."""

    rows: tuple[tuple[int, int], ...] | None
    force: bool = False


def row_maps(
    own: Tensor, base: int | None, given: Mapping[int, Given], padding: Tensor, lenders: Sequence[bool] | None = None
) -> tuple[RowMap, ...]:
    """The map of every model's rows (models in `own`'s order; source `len(own) + m` is the one row that is model m's mean).

    `own` (models, rows of the result), int64: a model's own row, or -1 if it has none. What it lacks is filled with the row of
    `base` if that has one, else the only owner's, else the mean of the owners'. If nobody has it, it is zeros, or a model's
    mean row where `padding` (rows of the result) is true: rows that stand for no token, whose scores must not be high. `given`
    comes before the rule, by row. Only `lenders` (None: all) are taken from. The base is filled like any other model, so a
    row that one model alone has is no change in it, and survives the merge as it is.
    """
    models = len(own)
    lent = own.clone()
    if lenders is not None:
        lent[~torch.tensor(lenders)] = -1
    if base is not None:
        has = lent[base] >= 0
        lent[:, has] = torch.where(torch.arange(models)[:, None] == base, lent[:, has], -1)
    keep = own >= 0
    for row, what in given.items():
        if what.rows is not None:
            lent[:, row] = -1
            for model, other in what.rows:
                lent[model, row] = other if lenders is None or lenders[model] else -1
        if what.force:
            keep[:, row] = False
    lonely = padding & (lent < 0).all(0)
    return tuple(_map(m, own[m], keep[m], lent, lonely) for m in range(models))


def _map(model: int, own: Tensor, keep: Tensor, lent: Tensor, lonely: Tensor) -> RowMap:
    """Model `model`'s map: its own rows where `keep`, else those that are `lent`, its mean row where `lonely`."""
    models = len(lent)
    used = lent.clone()
    used[:, keep] = -1
    used[model, keep] = own[keep]
    used = torch.cat([used, torch.where(lonely & ~keep, 0, -1)[None]])
    row, source = (used.T >= 0).nonzero(as_tuple=True)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), (used >= 0).sum(0).cumsum(0)])
    return RowMap(start, torch.where(source == models, models + model, source), used[source, row])
