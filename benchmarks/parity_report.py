"""The page that parity.py writes."""

import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from parity_random import RandomRow

CAUSES = {
    "tie": """The element's magnitude is, bit for bit, the one at the cut, and not alone there. We keep the lowest index,
mergekit whichever its sort leaves.""",
    "zero": """SLERP with a tensor that is all zeros and has no direction (biases of a fresh model). We interpolate linearly,
(1 - t) a + t b; mergekit takes a right angle: at t = 0.4 it gives 0.588 b.""",
    "norms": """Model Stock where the product of two deltas' norms is below 1e-6: mergekit divides by 1e-6 instead, which draws
small deltas to the base; we divide by the product itself.""",
    "fused": """Under transformers 5 mergekit puts Mixtral's experts into one tensor before it merges; we merge the tensors as
published. Methods that look at a tensor as a whole (angles, norms, cuts) look at other tensors then. With the modules' names
(family Mixtral) both sides see the same ones and agree.""",
    "sampled": """Arcee Fusion on a tensor of more than a million elements: mergekit estimates the quartiles on a million
random ones, ours are exact. Elements between the two thresholds differ.""",
    "rounding": """mergekit's rounding in float32, and in multislerp the `eps` of 1e-8 that it adds to norms: asked to compute
the same recipe in float64 (and with `eps: 1e-30`), mergekit gives our values, to 1e-6. We add up norms, inner products and
softmaxes in float64.""",
}
INTRODUCTION = """# Parity with mergekit

The same recipe files through `mergekit-yaml` {mergekit} and through `hf_merge.merge`, in float32, on one thread. {recipes}
recipes ran on both sides, {clean} of them without any element that differs by more than 1e-6. Of all {elements:,} compared
elements {beyond:,} do ({causes}); {unexplained:,} of these have no known cause. A difference is |ours - theirs| /
max(|theirs|, RMS of theirs over the tensor).

Made by `python benchmarks/parity.py --mergekit …/bin/mergekit-yaml --out benchmarks/PARITY.md`; it took {seconds:.0f} s on
{cores} busy cores (torch {torch}, transformers {ours} here and {transformers} there). mergekit's command runs for all recipes
in one process.

MiniLM (a base and one fine-tune, 22.7 M parameters), rxnfp (a base and two, 6.7 M) and BERT-tiny (the demo's base and three,
4.4 M) are real; Llama, Mixtral, T5 and ViT are generated, a base and three, with odd shapes. mergekit {mergekit} fails on every
`BertModel`, so the encoders of MiniLM and rxnfp became `BertForSequenceClassification` for both sides, with one random head.

## Methods that draw nothing

| family | method | tensors | elements | largest difference | elements > 1e-6 | their causes | tensors on one side |
|---|---|---:|---:|---:|---:|---|---|
"""
RANDOM = """## Random methods

*Given the same masks, the same values*: mergekit's `merge_tensors` merges every tensor of a base and its fine-tunes while
`torch.bernoulli` is recorded; our method then gets these masks in place of its random numbers.

*The masks*: a recipe of one fine-tune at weight 1, without rescaling, goes through both commands. What stays is counted where
the fine-tune differs from the base. z is the largest deviation of a tensor's count from the sum of its chances, in standard
deviations: over 20 to 100 tensors 2 to 3.5 is what chance makes of it. The chances are those that mergekit hands to
`torch.bernoulli`, and ours, which are multiples of 1/65536; they are compared where a magnitude is unique in its row.

| family | method | tensors | elements | largest difference, masks given | elements > 1e-6 | chances differ by at most |
|---|---|---:|---:|---:|---:|---:|
"""
MASKS = """
| family | method | elements counted | chance | kept, mergekit | kept, ours | z, mergekit | z, ours |
|---|---|---:|---:|---:|---:|---:|---:|
"""
DECILES = """
Kept by decile of the chance, which rises with the magnitude's rank in its row:

| family | method | side | deciles |
|---|---|---|---|
"""


def report(rows: Sequence[Any], drawn: Sequence[RandomRow], seconds: float, versions: dict[str, str]) -> str:
    """The page: both tables, what every difference comes from, how it was measured."""
    compared = [row for row in rows if not row.error]
    causes = sum((row.causes for row in compared), Counter[str]()).most_common()
    page = INTRODUCTION.format(
        **versions,
        recipes=len(compared),
        clean=sum(row.beyond == 0 for row in compared),
        elements=sum(row.elements for row in compared),
        causes=", ".join(f"{name} {count:,}" for name, count in causes),
        beyond=sum(row.beyond for row in compared),
        unexplained=sum(row.unexplained for row in compared),
        seconds=seconds,
        cores=os.cpu_count(),
        torch=version("torch"),
        ours=version("transformers"),
    )
    page += "".join(_row(row) for row in compared)
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            failed.setdefault((row.family, row.error.partition(" present in")[0].partition("Tensor")[0]), []).append(row.method)
    for (family, error), methods in failed.items():
        page += f"| {family} | {', '.join(methods)} | – | – | – | – | {_cell(error)} | – |\n"
    page += "\nCauses:\n\n"
    used = {name for row in rows for name in row.causes}
    page += "".join(f"- **{name}**: {_line(why)}\n" for name, why in CAUSES.items() if name in used)
    for family in dict.fromkeys(row.family for row in compared):
        for side, names, why in _one_sided([row for row in compared if row.family == family]):
            page += f"- **{side}**, {family}: {_names(names)}. {why}\n"
    return page + "\n" + _random(drawn)


def _row(row: Any) -> str:
    causes = [f"{name} {count:,}" for name, count in row.causes.items()]
    causes += [f"**unexplained {row.unexplained:,}**"] if row.unexplained else []
    sides = [f"{len(row.surplus)} only in ours"] if row.surplus else []
    sides += [f"{len(row.missing)} only in mergekit's"] if row.missing else []
    cells = [row.family, row.method, f"{row.tensors}", f"{row.elements:,}", f"{row.largest:.1e}", f"{row.beyond:,}"]
    return f"| {' | '.join([*cells, ', '.join(causes) or '–', ', '.join(sides) or '–'])} |\n"


def _one_sided(rows: Sequence[Any]) -> list[tuple[str, list[str], str]]:
    surplus, missing = ({name for row in rows for name in getattr(row, side)} for side in ("surplus", "missing"))
    dropped = (
        "mergekit drops without a word what its definition of the architecture does not list; we merge it or carry it over."
    )
    found = [("only in ours", sorted(surplus), dropped)] if surplus else []
    return found + ([("only in mergekit's", sorted(missing), "")] if missing else [])


def _random(drawn: Sequence[RandomRow]) -> str:
    page = RANDOM
    for row in drawn:
        cells = [row.family, row.method, f"{row.tensors}", f"{row.elements:,}", f"{row.largest:.1e}", f"{row.beyond:,}"]
        page += f"| {' | '.join([*cells, f'{row.chances:.1e}'])} |\n"
    page += MASKS
    for row in drawn:
        if not row.error:
            shares = [f"{row.expected:.4f}", f"{row.kept[0]:.4f}", f"{row.kept[1]:.4f}", f"{row.z[0]:.1f}", f"{row.z[1]:.1f}"]
            page += f"| {' | '.join([row.family, row.method, f'{row.counted:,}', *shares])} |\n"
    page += DECILES
    for row in drawn:
        for side, deciles in zip(("mergekit", "ours"), row.deciles, strict=True):
            if deciles:
                page += f"| {row.family} | {row.method} | {side} | {' '.join(f'{share:.3f}' for share in deciles)} |\n"
    page += "\nDifferences:\n\n"
    for family in dict.fromkeys(row.family for row in drawn):
        own = [row for row in drawn if row.family == family]
        if other := sorted({name for row in own for name in row.other_chances}):
            page += f"- {family}, chances of DELLA: mergekit ranks along the second axis, we along the last: {_names(other)}.\n"
        if raised := sorted({text.partition(":")[0] for row in own for text in row.raised}):
            page += (
                f"- {family}, DELLA: mergekit fails where the second axis has one element, 0/0 for a rank: {_names(raised)}.\n"
            )
        if errors := {row.error for row in own if row.error and not row.raised}:
            page += f"- {family}, masks through the command: mergekit fails: {_cell(min(errors)[:120])}.\n"
    return page


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _line(text: str) -> str:
    return text.replace("\n", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
