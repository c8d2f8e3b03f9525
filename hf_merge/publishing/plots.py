"""The picture of a front: which trade-offs the merges reach, beside the models that they were made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from PIL import Image

from hf_merge import pareto
from hf_merge.publishing.markdown import one_line
from hf_merge.publishing.position import complete, same
from hf_merge.scores import MAXIMIZE
from hf_merge.search.trial import Front, Split, Trial, to_points

DPI = 160
INK, SOFT, GRID = "#1f2430", "#59606b", "#e4e7ec"
# Okabe and Ito's colors, which every kind of color vision tells apart; shapes say the same also.
BLUE, VERMILION, GREEN, GRAY = "#0072B2", "#D55E00", "#007a58", "#6b7280"
SPLITS: Mapping[Split, str] = {"held_out": "held-out data", "search": "search data"}
CLOSE_UP = 0.45
"""The front gets panels of its own if it spans less than this share of all that is shown, in some objective."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one kind of model is drawn; `named` kinds carry their names, the others numbers where there is room."""

    label: str
    marker: str
    color: str
    size: float
    layer: int
    filled: bool = True
    named: bool = True


CHOSEN = Style(label="this model", marker="*", color=VERMILION, size=15, layer=5)
ON_FRONT = Style(label="merged, on the front", marker="o", color=BLUE, size=6.5, layer=4, named=False)
FALLEN = Style(label="merged, dominated here", marker="o", color=BLUE, size=6.5, layer=3, filled=False, named=False)
PARENT = Style(label="parents", marker="s", color=GREEN, size=7, layer=3)
OTHER = Style(label="for comparison", marker="D", color=GRAY, size=6, layer=3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mark:
    """One model in the picture: values `(m,)` and the ends of their intervals `(m, 2)` (the value itself without one)."""

    trial: Trial
    style: Style
    values: pareto.Floats
    ends: pareto.Floats


class Place(NamedTuple):
    """A mark in a panel, and the ends of its bars, as drawn."""

    mark: Mark
    x: float
    y: float
    xs: pareto.Floats
    ys: pareto.Floats


class Spot(NamedTuple):
    """Where a name goes, in points from its mark."""

    right: float
    up: float


def plot_front(
    front: Front,
    parents: Sequence[Trial] = (),
    others: Sequence[Trial] = (),
    chosen: Trial | None = None,
    split: Split = "held_out",
    *,
    metrics: Mapping[str, str] | None = None,
) -> Figure:
    """The front on one split with parents, others, 95 % intervals and the chosen trial.

    One objective gives a line a model, two or three a panel for each pair (and others closer to the front if it is small), more
    of them parallel coordinates. Better is always to the right and up. `metrics` says what each objective measures, for the
    axes. Trials without every score on the split are left out.
    """
    picture = _Picture(front, _marks(front, parents, others, chosen, split), metrics or {})
    figure = _ShownFigure(dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    m = len(front.objectives)
    (picture.lines if m == 1 else picture.panels if m <= 3 else picture.parallel)(figure)
    count = "one model" if len(front) == 1 else f"{len(front)} models"
    title = f"Pareto front of {count}, on {SPLITS[split]}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    picture.finish(figure)
    return figure


class _ShownFigure(Figure):
    """A notebook shows figures of pyplot by itself, and others by this."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """What `save_png` writes."""
    buffer = BytesIO()
    save_png(figure, buffer)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path | str | BinaryIO) -> None:
    """Write the figure as a PNG of at most 256 colors, whose bytes depend on the figure alone."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def shown(text: object) -> str:
    """A name from outside, short and without matplotlib's formulas."""
    line = one_line(text)
    return (line if len(line) <= 28 else f"{line[:27]}…").replace("$", r"\$")


def _marks(front: Front, parents: Sequence[Trial], others: Sequence[Trial], chosen: Trial | None, split: Split) -> list[Mark]:
    # A parent that is on the front itself is drawn once, as a parent.
    known = [*([chosen] if chosen else []), *parents, *others]
    rest = [t for t in front if not any(same(t, other) for other in known)]
    merged = complete([chosen, *rest] if chosen else rest, front.directions, split)
    kept = pareto.non_dominated(to_points(merged, front.directions, split))
    pairs = [(t, CHOSEN if t is chosen else ON_FRONT if keep else FALLEN) for t, keep in zip(merged, kept, strict=True)]
    pairs += [(t, PARENT) for t in complete(parents, front.directions, split)]
    pairs += [(t, OTHER) for t in complete(others, front.directions, split)]
    found = []
    for trial, style in pairs:
        scores = [trial.on(split)[n] for n in front.objectives]
        ends = np.array([s.interval or (s.value, s.value) for s in scores])
        found.append(Mark(trial=trial, style=style, values=np.array([s.value for s in scores]), ends=ends))
    return found


def _signs(front: Front) -> pareto.Floats:
    return np.array([1.0 if d == MAXIMIZE else -1.0 for d in front.directions.values()])


class _Picture:
    """Draws marks in one of three forms, which share the looks, the legend and the placing of names."""

    def __init__(self, front: Front, marks: list[Mark], metrics: Mapping[str, str]) -> None:
        self.marks = marks
        self.merged = [m for m in marks if m.style in (CHOSEN, ON_FRONT, FALLEN)]
        self.labels = [f"{shown(n)}, {shown(metrics[n])}" if n in metrics else shown(n) for n in front.objectives]
        self.signs = _signs(front)
        self._placed: list[tuple[Axes, list[Place], bool]] = []

    # Two or three objectives

    def panels(self, figure: Figure) -> None:
        """A panel for each pair of objectives, and others closer to the front."""
        pairs = list(combinations(range(len(self.signs)), 2))
        views = [self.marks, self.merged] if self._small() else [self.marks]
        rows, columns = (1, len(views)) if len(pairs) == 1 else (len(views), len(pairs))
        figure.set_size_inches(10, {(1, 1): 6.6, (1, 2): 5.6, (1, 3): 4.6}.get((rows, columns), 7.8))
        grid = figure.add_gridspec(rows, columns, wspace=0.06, hspace=0.08)
        for v, view in enumerate(views):
            for p, pair in enumerate(pairs):
                axes = figure.add_subplot(grid[0, v] if len(pairs) == 1 else grid[v, p])
                self._panel(axes, pair, view, numbered=v == len(views) - 1)
                if v == 1:
                    axes.set_title("closer to the front", loc="left", fontsize=10, color=SOFT)
                    _outline(figure.axes[p], axes)

    def _small(self) -> bool:
        if not self.merged or len(self.merged) == len(self.marks):
            return False
        whole, close = (np.ptp(np.concatenate([m.ends for m in part], axis=1), axis=1) for part in (self.marks, self.merged))
        return bool((close < CLOSE_UP * whole).any())

    def _panel(self, axes: Axes, pair: tuple[int, int], view: Sequence[Mark], *, numbered: bool) -> None:
        x, y = pair
        limits = _limits(np.concatenate([m.ends[[x, y]] for m in view], axis=1) if view else np.array([[0.0, 1.0], [0.0, 1.0]]))
        axes.set_xlim(*limits[0][:: int(self.signs[x])])
        axes.set_ylim(*limits[1][:: int(self.signs[y])])
        _look(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        size = 10 if len(self.signs) == 2 else 9
        axes.set_xlabel(f"{self.labels[x]}  → better", fontsize=size, color=INK)
        axes.set_ylabel(f"{self.labels[y]}  → better", fontsize=size, color=INK)
        if len(self.signs) == 2:
            self._staircase(axes)
        places = [Place(m, m.values[x], m.values[y], m.ends[x], m.ends[y]) for m in self.marks]
        inside = [p for p in places if limits[0][0] <= p.x <= limits[0][1] and limits[1][0] <= p.y <= limits[1][1]]
        for place in inside:
            _draw(axes, place)
        self._placed.append((axes, inside, numbered))

    def _staircase(self, axes: Axes) -> None:
        points = np.array([m.values for m in self.marks]).reshape(-1, 2)
        kept = points[pareto.non_dominated(points * self.signs)] if len(points) else points
        if len(kept) == 0:
            return
        kept = kept[np.argsort(kept[:, 0] * self.signs[0])]
        worst_x, worst_y = axes.get_xlim()[0], axes.get_ylim()[0]
        axes.plot(*kept.T, drawstyle="steps-pre", color=BLUE, lw=1.2, alpha=0.5, zorder=1.6)
        xs, ys = np.concatenate([[[worst_x, kept[0, 1]]], kept]).T
        axes.fill_between(xs, ys, worst_y, step="pre", color=BLUE, alpha=0.06, lw=0, zorder=1)

    # One objective

    def lines(self, figure: Figure) -> None:
        """A line for each model with its interval, the best on top."""
        marks = sorted(self.marks, key=lambda m: float(m.values[0] * self.signs[0]))
        figure.set_size_inches(10, 1.8 + 0.36 * len(marks))
        axes = figure.add_subplot()
        for row, mark in enumerate(marks):
            _draw(axes, Place(mark, mark.values[0], row, mark.ends[0], np.array([row, row])))
        axes.set_yticks(range(len(marks)), [shown(m.trial.name) for m in marks])
        axes.set_ylim(-0.6, max(len(marks), 1) - 0.4)
        axes.set_xlabel(f"{self.labels[0]}  → better", fontsize=10, color=INK)
        _look(axes)
        if self.signs[0] < 0:
            axes.invert_xaxis()

    # Four objectives and more

    def parallel(self, figure: Figure) -> None:
        """One vertical axis for each objective, one line for each model."""
        figure.set_size_inches(10, 6.6)
        axes = figure.add_subplot()
        signed = [m.ends * self.signs[:, None] for m in self.marks] or [np.tile([0.0, 1.0], (len(self.signs), 1))]
        low, high = np.concatenate(signed, axis=1).min(1), np.concatenate(signed, axis=1).max(1)
        span = np.where(high > low, high - low, 1.0)
        places = []
        for mark in self.marks:
            heights = (mark.values * self.signs - low) / span
            width, dash = (2.4 if mark.style is CHOSEN else 1.2), ("-" if mark in self.merged else (0, (4, 3)))
            axes.plot(heights, color=mark.style.color, lw=width, ls=dash, alpha=0.75, zorder=mark.style.layer)
            for k, height in enumerate(heights):
                bar = (mark.ends[k] * self.signs[k] - low[k]) / span[k] if mark.style is CHOSEN else heights[[k, k]]
                places.append(Place(mark, k, height, np.array([k, k]), bar))
                _draw(axes, places[-1])
        for k in range(len(self.signs)):
            axes.axvline(k, color=GRID, lw=1.2, zorder=0)
            for height, va in ((-0.04, "top"), (1.04, "bottom")):
                value = self.signs[k] * (low[k] + round(height) * span[k])
                axes.text(k, height, f"{value:.3g}", ha="center", va=va, fontsize=9, color=SOFT)
        axes.set_xticks(range(len(self.signs)), [f"{label}\n↑ better" for label in self.labels], fontsize=9, color=INK)
        axes.set_yticks([])
        axes.set(xlim=(-0.35, len(self.signs) - 0.55), ylim=(-0.12, 1.12))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        self._placed.append((axes, [p for p in places if p.x == len(self.signs) - 1], False))

    # What the forms share

    def finish(self, figure: Figure) -> None:
        """The legend, and names beside marks where they cover nothing."""
        handles = [_key(s) for s in (CHOSEN, ON_FRONT, FALLEN, PARENT, OTHER) if any(m.style is s for m in self.marks)]
        if any((m.ends[:, 0] < m.ends[:, 1]).any() for m in self.marks):
            handles.append(Line2D([], [], color=GRAY, lw=1.2, alpha=0.7, label="95 % interval"))
        style = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handletextpad": 0.3, "columnspacing": 1.6}
        figure.legend(handles=handles, loc="outside lower left", ncols=max(len(handles), 1), **style)
        figure.draw_without_rendering()
        for axes, places, numbered in self._placed:
            taken = [_around(axes, p.x, p.y, p.mark.style.size * DPI / 144) for p in places]
            taken += [
                _around(axes, bar[0], bar[1], 1.5) for p in places for bar in ((p.xs, p.ys * 0 + p.y), (p.xs * 0 + p.x, p.ys))
            ]
            for place in sorted(places, key=lambda p: (not p.mark.style.named, -p.mark.style.layer)):
                if place.mark.style.named or numbered:
                    _name(axes, place, taken)


def _look(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(labelsize=9, color=SOFT, labelcolor=SOFT)


def _limits(ends: pareto.Floats) -> pareto.Floats:
    low, high = ends.min(1), ends.max(1)
    margin = np.where(high > low, 0.08 * (high - low), 0.05 * np.maximum(np.abs(high), 1e-3))
    return np.stack([low - margin, high + margin], axis=1)


def _outline(whole: Axes, close: Axes) -> None:
    (left, right), (low, high) = close.get_xlim(), close.get_ylim()
    whole.add_patch(Rectangle((left, low), right - left, high - low, fill=False, ec=SOFT, lw=0.8, ls=(0, (4, 3)), zorder=2))


def _draw(axes: Axes, place: Place) -> None:
    style = place.mark.style
    bars: dict[str, Any] = {"color": style.color, "lw": 1.0, "alpha": 0.4, "zorder": style.layer - 0.5}
    axes.plot(place.xs, [place.y, place.y], **bars)
    axes.plot([place.x, place.x], place.ys, **bars)
    axes.plot([place.x], [place.y], **_face(style), zorder=style.layer + 0.5)


def _face(style: Style) -> dict[str, Any]:
    fill, edge, width = (style.color, "white", 0.8) if style.filled else ("white", style.color, 1.3)
    return {"ls": "", "marker": style.marker, "ms": style.size, "mfc": fill, "mec": edge, "mew": width}


def _key(style: Style) -> Line2D:
    return Line2D([], [], label=style.label, **_face(style))


def _around(axes: Axes, x: float | pareto.Floats, y: float | pareto.Floats, radius: float) -> Bbox:
    corners = axes.transData.transform(np.column_stack([x, y]))
    (left, low), (right, high) = corners.min(0), corners.max(0)
    return Bbox.from_extents(left - radius, low - radius, right + radius, high + radius)


def _name(axes: Axes, place: Place, taken: list[Bbox]) -> None:
    """Try spots around the mark and take the one that covers least; a number that has to cover something is left out."""
    style = place.mark.style
    text = shown(place.mark.trial.name) if style.named else str(place.mark.trial.number)
    look: dict[str, Any] = {
        "fontsize": 9 if style.named else 8,
        "color": style.color,
        "fontweight": "bold" if style is CHOSEN else "normal",
    }
    halo = [withStroke(linewidth=2.5, foreground="white")]
    note = axes.annotate(text, (place.x, place.y), (0, 0), textcoords="offset points", zorder=8, path_effects=halo, **look)
    note.set_in_layout(False)
    around = [(1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, 1), (0, -1)]
    spots = [Spot(dx * (style.size / 2 + d), dy * (style.size / 2 + d)) for d in (3, 8, 16) for dx, dy in around]
    covered = [_covered(_moved(note, spot), taken, axes.bbox) for spot in spots]
    best = int(np.argmin(np.round(covered, 3)))
    if covered[best] > 0.5 and not style.named:
        note.remove()
    else:
        taken.append(_moved(note, spots[best]))


def _moved(note: Annotation, spot: Spot) -> Bbox:
    note.set_position(spot)
    note.set_horizontalalignment("left" if spot.right > 0 else "right" if spot.right < 0 else "center")
    note.set_verticalalignment("bottom" if spot.up > 0 else "top" if spot.up < 0 else "center")
    return note.get_window_extent()


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Area of `taken` under the box, and three times the area that leaves the panel, in square pixels."""
    others = np.array([other.extents for other in [inside, *taken]])
    widths = np.minimum(box.x1, others[:, 2]) - np.maximum(box.x0, others[:, 0])
    heights = np.minimum(box.y1, others[:, 3]) - np.maximum(box.y0, others[:, 1])
    within, *shared = np.maximum(widths, 0) * np.maximum(heights, 0)
    return float(sum(shared) + 3 * (box.width * box.height - within))
