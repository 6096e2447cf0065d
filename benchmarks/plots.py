"""The studies' figures, each an SVG file that says what it shows in words as well: points with intervals, and curves."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slipstream.decode.drawing import (
    COLOURS,
    INK,
    MARKERS,
    SPARE_COLOURS,
    STYLE,
    draw_point,
    name_lines,
    new_figure,
    set_legend,
    svg_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from study import Stated

PALETTE = (COLOURS["exact"], COLOURS["mars"], *SPARE_COLOURS)
DIGITS = 3  # of values in words


class Part(NamedTuple):
    """Points of one quantity.

    Attributes:
        title: What the quantity is.
        lines: Values with their intervals, by line and by what they are of.
        reference: A value that all are held against.
    """

    title: str
    lines: dict[str, dict[str, Stated]]
    reference: float | None = None


class Panel(NamedTuple):
    """Curves, by name, each the points (x, y) in their order."""

    title: str
    curves: dict[str, list[tuple[float, float]]]


def draw_points(title: str, parts: Sequence[Part]) -> str:
    """Points with 95 % intervals as SVG, a line for each name; parts below each other, each on its own scale."""
    import matplotlib  # an extra, as everywhere in figures

    with matplotlib.rc_context(STYLE):
        looks = _looks(kind for part in parts for values in part.lines.values() for kind in values)
        line = 0.14 + 0.09 * len(looks)  # inches
        heights = [0.5 + line * len(part.lines) for part in parts]
        figure = new_figure(0.25 + sum(heights) + 0.2 * (len(looks) > 1))
        said = []
        grid = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights).flat
        for axes, part in zip(grid, parts, strict=True):
            axes.set_title(part.title, loc="right")  # where long names leave the axes narrow, it reaches over them
            name_lines(axes, [(place, name, {}) for place, name in enumerate(part.lines)])
            axes.grid(False, axis="y")
            if part.reference is not None:
                axes.axvline(part.reference, color=INK, linewidth=1, linestyle="--", zorder=1)
            for place, (name, values) in enumerate(part.lines.items()):
                places = place + (np.arange(len(values)) - (len(values) - 1) / 2) * 0.7 / len(looks)
                for at, (kind, (value, bounds)) in zip(places, values.items(), strict=True):
                    words = draw_point(axes, float(at), value, bounds, *looks[kind], digits=DIGITS)
                    said.append(f"{part.title}, {name} {kind} {words}" if kind else f"{part.title}, {name} {words}")
        if len(looks) > 1:
            for kind, (colour, marker) in looks.items():
                figure.axes[0].plot([], [], marker, color=colour, label=kind)
            set_legend(figure)
        return svg_file(figure, title, "Points with 95 % intervals: " + "; ".join(said))


def draw_curves(title: str, panels: Sequence[Panel], across: str, up: str) -> str:
    """Curves as SVG, with a mark at every point; panels below each other, each on its own scale.

    Args:
        title: Of the figure.
        panels: What is drawn.
        across: What x is.
        up: What y is.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        looks = _looks(name for panel in panels for name in panel.curves)
        figure = new_figure(0.6 + 2.3 * len(panels))
        said = []
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
            axes.set(title=panel.title, ylabel=up)
            axes.margins(0.04, 0.08)
            for name, points in panel.curves.items():
                colour, marker = looks[name]
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, alpha=0.85, label=name)
                pairs = ", ".join(f"{y:.{DIGITS}f} at {x:.4g}" for x, y in points)
                said.append(f"{panel.title}, {name} {pairs}" if panel.title else f"{name} {pairs}")
        figure.axes[-1].set_xlabel(across)
        set_legend(figure)
        return svg_file(figure, title, f"Curves, {up} against {across}: " + "; ".join(said))


def _looks(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each."""
    return dict(zip(dict.fromkeys(kinds), zip(itertools.cycle(PALETTE), itertools.cycle(MARKERS)), strict=False))
