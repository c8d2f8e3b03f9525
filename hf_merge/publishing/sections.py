"""The parts of a card that speak of scores: tables, and sentences that say no more than the intervals allow."""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

from hf_merge.publishing.facts import CardFacts
from hf_merge.publishing.front_facts import alike, contributions, optimism
from hf_merge.publishing.markdown import Markdown, code, listed, plain, table
from hf_merge.publishing.position import Position, Volume, complete, gap, same, volume
from hf_merge.scores import MAXIMIZE, Score
from hf_merge.search.trial import Front, Trial

NONE = Markdown("–")

IMPORTANT = 4
"""Parameters that are named for each objective."""

ARROWS = {True: "↑", False: "↓"}


class Measured(Protocol):
    """A score, a difference or a volume."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, if there is one."""


def number(value: float, scale: float, *, sign: bool = False) -> str:
    """A number with the digits that suit numbers as large as `scale`: 3 after the point around 1, fewer above, more below."""
    size = math.floor(math.log10(scale)) if scale > 0 and math.isfinite(scale) else 0
    digits = 1 if size >= 2 else 2 if size == 1 else min(8, max(3, 2 - size))
    return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def cell(measured: Measured | None, scale: float, *, sign: bool = False) -> Markdown:
    """`value [low, high]`."""
    if measured is None:
        return NONE
    ends = "" if measured.interval is None else f" [{', '.join(number(v, scale) for v in measured.interval)}]"
    return Markdown(number(measured.value, scale, sign=sign) + ends)


def bold(text: Markdown, when: bool = True) -> Markdown:
    """The text, bold or not."""
    return Markdown(f"**{text}**") if when else text


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Sections:
    """Writes the tables and sentences of one card."""

    def __init__(self, facts: CardFacts) -> None:
        self.facts = facts
        self.directions = facts.directions
        self.on_front = tuple(t for t in facts.front or () if not same(t, facts.trial))
        shown = (facts.trial, *self.on_front, *facts.rivals)
        self.scales = {
            name: max((abs(s[name].value) for t in shown for s in (t.scores, t.held_out) if name in s), default=1.0)
            for name in self.directions
        }

    def _name(self, trial: Trial) -> Markdown:
        kind = "parent " if any(trial is p for p in self.facts.parents) else ""
        return Markdown(f"{kind}{plain(trial.name)}")

    def _header(self, name: str) -> Markdown:
        metric = self.facts.objective(name).get("metric")
        up = ARROWS[self.directions[name] == MAXIMIZE]
        return Markdown(f"{plain(name)} {up} {plain(metric) if metric else ''}".rstrip())

    def _cells(self, scores: Mapping[str, Score], best: Mapping[str, float | None]) -> Iterator[Markdown]:
        for name in self.directions:
            score = scores.get(name)
            yield bold(cell(score, self.scales[name]), score is not None and score.value == best.get(name))

    # Tables

    def held_out(self) -> Markdown:
        """Held-out scores of this model, the parents, the others and the rest of the front; the best of each column is bold."""
        facts = self.facts
        rows = [(bold(Markdown("this model")), facts.trial)]
        on_front = {t.recipe.digest for t in self.on_front}
        rivals = {t.recipe.digest for t in facts.rivals}
        rows += [
            (Markdown(f"{self._name(t)}, on the front") if t.recipe.digest in on_front else self._name(t), t)
            for t in facts.rivals
        ]
        rows += [(Markdown(f"front: {plain(t.name)}"), t) for t in self.on_front if t.recipe.digest not in rivals]
        rows = [(label, t) for label, t in rows if t.held_out]
        best = {}
        for name, direction in self.directions.items():
            values = [t.held_out[name].value for _, t in rows if name in t.held_out]
            best[name] = (max if direction == MAXIMIZE else min)(values, default=None)
        header = [Markdown("model"), *map(self._header, self.directions)]
        return table(header, [[label, *self._cells(t.held_out, best)] for label, t in rows])

    def differences(self) -> Markdown:
        """This model against each parent and other on held-out data, positive where this model is better."""
        rows = []
        for other in complete(self.facts.rivals, self.directions):
            gaps = {name: gap(self.facts.trial, other, name, d) for name, d in self.directions.items()}
            cells = [bold(cell(g, self.scales[name], sign=True), g.clear) for name, g in gaps.items()]
            rows.append([self._name(other), *cells])
        return table(["better than", *map(plain, self.directions)], rows)

    def search_scores(self, front: Front) -> Markdown:
        """Search scores and recipes of the front."""
        adds, whole = contributions(front), front.hypervolume("held_out") if complete(front, front.directions) else 0.0
        rows = []
        for trial in front:
            name = bold(Markdown(f"{plain(trial.name)}, this model")) if same(trial, self.facts.trial) else plain(trial.name)
            share = Markdown(f"{adds[trial.number] / whole:.1%}") if whole and trial.number in adds else NONE
            rows.append([name, code(trial.recipe), *self._cells(trial.scores, {}), share])
        header = ["front", "recipe", *map(self._header, self.directions), "adds to the held-out hypervolume"]
        return table(header, rows, words=2)

    def importances(self) -> Markdown:
        """By objective the parameters that mattered most in the search."""
        found = self.facts.search.importances if self.facts.search else {}
        rows = []
        for name, shares in found.items():
            largest = list(shares.items())[:IMPORTANT]
            rows.append([plain(name), listed(Markdown(f"{code(key)} {share:.0%}") for key, share in largest)])
        return table(["objective", "parameters"], rows, words=2)

    def objectives(self) -> Markdown:
        """What was measured, on which data."""
        header = ["objective", "metric", "direction", "data", "searched on", "held out"]
        return table(header, map(self._objective, self.directions), words=len(header))

    def _objective(self, name: str) -> list[Markdown]:
        known = self.facts.objective(name)
        metric, how = known.get("metric"), known.get("implementation")
        what = [plain(metric)] if metric else []
        what += [code(how)] if how and how != metric else []
        data = []
        for split, rows in (("split", "rows_search"), ("held_out", "rows_held_out")):
            parts = [code(known[split])] if known.get(split) else []
            parts += [Markdown(f"{plain(known[rows])} rows")] if known.get(rows) is not None else []
            parts += [Markdown("smoothed")] if split == "split" and known.get("smoothed") else []
            data.append(Markdown(", ".join(parts)) or NONE)
        dataset = code(known["dataset"]) if known.get("dataset") else NONE
        return [plain(name), Markdown(", ".join(what)) or NONE, plain(self.directions[name]), dataset, *data]

    def hypervolumes(self, front: Front) -> Markdown:
        """Held-out hypervolume of the front and of what it has to beat, with the front's paired gain."""
        whole = volume(complete(front, front.directions), front.directions, front.reference)
        rows = [[bold(Markdown("the front")), cell(whole, whole.value), NONE]]
        for label, found in self._baselines(front):
            gain = whole.minus(found)
            rows.append([label, cell(found, whole.value), bold(cell(gain, whole.value, sign=True), gain.clear)])
        return table(["hypervolume of", "held out", "gain of the front"], rows)

    def _baselines(self, front: Front) -> Iterator[tuple[Markdown, Volume]]:
        parents = complete(self.facts.parents, front.directions)
        if len(parents) > 1:
            yield Markdown("all parents together"), volume(parents, front.directions, front.reference)
        if parents:
            alone = [(t, volume([t], front.directions, front.reference)) for t in parents]
            best, found = max(alone, key=lambda pair: pair[1].value)
            yield Markdown(f"the best parent alone, {plain(best.name)}"), found
        for other in complete(self.facts.others, front.directions):
            yield plain(other.name), volume([other], front.directions, front.reference)

    def reference(self, front: Front) -> Markdown:
        """The hypervolume's reference point."""
        corner = {name: number(front.reference[name], self.scales[name]) for name in front.directions}
        return listed(Markdown(f"{plain(name)} {value}") for name, value in corner.items())

    # Sentences

    def doubts(self, front: Front) -> list[Markdown]:
        """How much the search flatters the front, and which of its points the data cannot tell apart."""
        found = []
        if flattery := {n: g for n, g in optimism(front).items() if not self.facts.objective(n).get("smoothed")}:
            parts = listed(Markdown(f"{cell(g, self.scales[n], sign=True)} in {plain(n)}") for n, g in flattery.items())
            found.append(Markdown(f"On average the front looked better on search data than it is on held-out data by {parts}."))
        if pairs := alike(front):
            count = len(front) * (len(front) - 1) // 2
            mine = [b if same(a, self.facts.trial) else a for a, b in pairs if self.facts.trial.number in (a.number, b.number)]
            own = f", among them this model and {listed(plain(t.name) for t in mine)}" if mine else ""
            some = f"{len(pairs)} of the front's {count} pairs of points"
            found.append(Markdown(f"Held-out data cannot tell {some} apart in any objective{own}."))
        return found

    def position(self, front: Front, found: Position) -> list[Markdown]:
        """Where the model stands: rank, what it wins, what it gives up, its neighbors, the knee."""
        standing = [*self._rank(front, found), *self._wins(found)]
        return [*standing, *self._trades(), *self._neighbors(found), self._knee(front, found)]

    def _rank(self, front: Front, found: Position) -> Iterator[Markdown]:
        search = self.facts.search
        count = f" of {search.evaluated - search.failed}" if search else ""
        if found.on_front:
            share = f"{len(front)} trials share this rank: the front" if len(front) > 1 else "it is the whole front"
            yield Markdown(f"**Rank 1{count}** on search data: no trial dominates it; {share}.")
        else:
            yield Markdown("**Not on the front**: on search data other trials dominate it.")
        if found.rank is None:
            yield Markdown("It has no held-out scores, so nothing more can be said of it.")
        elif found.dominated_by:
            by = listed(self._name(t) for t in found.dominated_by)
            yield Markdown(f"**Dominated on held-out data** by {by}: as good everywhere and better somewhere.")
        else:
            yield Markdown(
                "**Not dominated on held-out data** either: no model below is as good everywhere and better somewhere."
            )

    def _wins(self, found: Position) -> Iterator[Markdown]:
        held_out = self.facts.trial.held_out
        if found.best_in:
            wins = listed(Markdown(f"{plain(n)} ({cell(held_out[n], self.scales[n])})") for n in found.best_in)
            yield Markdown(f"**Best of the front** on held-out data in {wins}.")
        if found.dominates:
            yield Markdown(f"**Dominates** on held-out data, by value: {listed(self._name(t) for t in found.dominates)}.")

    def _trades(self) -> Iterator[Markdown]:
        trial = self.facts.trial
        if not complete([trial], self.directions):
            return
        for parent in complete(self.facts.parents, self.directions):
            gaps = {name: gap(trial, parent, name, d) for name, d in self.directions.items()}
            sure = {name: g for name, g in gaps.items() if g.clear or (g.interval is None and g.value != 0)}
            parts = []
            for verb, sign in (("gains", 1), ("gives up", -1)):
                amounts = {n: g if sign > 0 else g.reversed() for n, g in sure.items() if sign * g.value > 0}
                if amounts:
                    steps = [Markdown(f"{cell(g, self.scales[n])} in {plain(n)}") for n, g in amounts.items()]
                    parts.append(f"{verb} {listed(steps)}")
            if unsure := [plain(n) for n in gaps if n not in sure]:
                parts.append(f"cannot be told apart in {listed(unsure)}")
            yield Markdown(f"Against the {self._name(parent)} it {'; '.join(parts)}.")

    def _neighbors(self, found: Position) -> Iterator[Markdown]:
        for other in {id(t): t for t in found.neighbors.values()}.values():
            better = [n for n, t in found.neighbors.items() if t is other]
            order = [*better, *(n for n in self.directions if n not in better)]
            gaps = {n: gap(other, self.facts.trial, n, self.directions[n]) for n in order}
            steps = [Markdown(f"{cell(g, self.scales[n], sign=True)} in {plain(n)}") for n, g in gaps.items()]
            wins = listed(plain(n) for n in better)
            yield Markdown(f"**Neighbor** on the front, better in {wins}: {self._name(other)}, with {listed(steps)}.")

    def _knee(self, front: Front, found: Position) -> Markdown:
        if found.is_knee:
            return Markdown(
                "**The knee** of the front: nearest to the ideal, by search scores, when all objectives count the same."
            )
        return Markdown(f"Not the knee of the front, which is {self._name(front.choose('knee'))}.")
