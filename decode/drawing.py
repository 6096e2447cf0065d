"""What the report's figures and tables share: colours and names, empty figures, and inline SVG."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Row = dict[str, Any]
    Plot = tuple[Figure, str]  # the figure, and the same in words
    Line = tuple[int, str, Row | None]  # a bar's place, its name, and its row; a heading has none

NAMES = {"autoregressive": "transformers", "engine": "engine", "exact": "exact", "mars": "MARS"}
# Okabe and Ito's palette, told apart without colour vision; lines differ by marker too, bars by hatch.
COLOURS = {"autoregressive": "#9aa0a8", "engine": "#6b7480", "exact": "#0072b2", "mars": "#d55e00"}
SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"
WIDTH = 4.6  # inches: narrow, so that text stays legible when a phone scales the figure to 350 px
INK = "#2a2f36"
_BAR = 0.34  # inches of a bar with its room, enough for a name of two lines
_NAME = 28  # letters of a name in one line
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slipstream",  # the same results give the same bytes
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "figure.constrained_layout.h_pad": 0.07,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a9099",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "text.color": INK,
    "legend.frameon": False,
}


def pooled(results: dict[str, Any]) -> list[Row]:
    """The rows over all categories (task `all`), or all rows where none pools them."""
    return [row for row in results["rows"] if row["task"] == "all"] or results["rows"]


def apart(results: dict[str, Any]) -> list[Row]:
    """The rows of single tasks where others pool them, those of one task together."""
    together = pooled(results)
    rows = [row for row in results["rows"] if row not in together]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: tasks.index(row["task"]))


def rule_name(row: Row) -> str:
    """A rule as people read it, with the threshold of a relaxed one, and its draft and batch where they tell it apart."""
    name, verifier, batch = str(NAMES.get(row["rule"], row["rule"])), row.get("verifier"), row.get("batch_size", 1)
    threshold = f"{verifier['signal']} {verifier['threshold']:g}" if row["rule"] == "mars" and verifier else None
    return ", ".join(filter(None, (name, threshold, row.get("draft"), f"batch {batch}" if batch > 1 else None)))


def interval_text(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}" if bounds else "–"


def inline_svg(figure: Figure, label: str, name: str) -> Markup:
    """A figure as an element for an HTML page: sized by its container, its ids and styles its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    (view, body), *_ = re.findall(r'<svg[^>]*(viewBox="[^"]+")[^>]*>(.*)', svg, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("'DejaVu Sans'", "system-ui, sans-serif")
    alternative = escape(label)
    head = f'<svg {view} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{alternative}">'
    return Markup(f"{head}<title>{alternative}</title>{body}")


def new_figure(height: float) -> Figure:
    """An empty figure of the report's width; inches."""
    from matplotlib.figure import Figure

    return Figure((WIDTH, height), layout="constrained")


def bar_axes(lines: list[Line], label: str) -> tuple[Figure, Axes]:
    """A figure for horizontal bars, the first line on top."""
    figure = new_figure(0.9 + _BAR * len(lines))
    axes = figure.subplots()
    name_lines(axes, lines)
    axes.set_xlabel(label)
    axes.grid(False, axis="y")
    return figure, axes


def name_lines(axes: Axes, lines: list[Line]) -> None:
    """Write the names of lines beside horizontal axes, the first on top, headings in bold, long ones in two lines."""
    axes.set_yticks([place for place, _, _ in lines], [folded(text, _NAME) for _, text, _ in lines])
    for tick, (_, _, row) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axes.set_ylim(len(lines) - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)


def line_height(lines: list[Line]) -> float:
    """Inches that each of the lines needs."""
    return 0.2 if all(len(text) <= _NAME for _, text, _ in lines) else _BAR


def folded(text: str, width: int) -> str:
    """Text in lines of so many letters, broken between words only."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def lines_of(rows: list[Row]) -> list[Line]:
    """Rows with their names, under a heading per task and temperature where there are several."""
    settings = dict.fromkeys(setting_of(row) for row in rows)
    lines: list[tuple[str, Row | None]] = []
    for setting in settings:
        lines += [(setting, None)] if len(settings) > 1 else []
        lines += [(rule_name(row), row) for row in rows if setting_of(row) == setting]
    return [(place, text, row) for place, (text, row) in enumerate(lines)]


def panels(rows: list[Row]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with axes for each task and temperature of the rows, two beside each other."""
    settings = list(dict.fromkeys(setting_of(row) for row in rows))
    across = min(len(settings), 2)
    down = -(-len(settings) // across)
    figure = new_figure(0.6 + (2.4 if across == 1 else 1.6) * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, setting in itertools.zip_longest(grid, settings):
        axes.tick_params(labelbottom=True)
        if setting is None:
            axes.set_axis_off()
        elif len(settings) > 1:
            axes.set_title(setting)
    return figure, dict(zip(settings, figure.axes, strict=False))


def set_legend(figure: Figure) -> None:
    """One legend above all axes, which takes as much height as it needs."""
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if max(map(len, handles)) <= 16 else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, -(-len(handles) // columns) - 2))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)


def setting_of(row: Row) -> str:
    return f"{row['task']}, T = {row['temperature']:g}"


def kind_of(row: Row) -> str:
    """What has a colour of its own: a rule, and a rule with another draft or batch size."""
    return str(row["rule"]) if not row.get("draft") and row.get("batch_size", 1) == 1 else rule_name(row)


def colours_of(rows: list[Row]) -> dict[str, str]:
    """A colour per rule: a fixed one for the usual rules, spare ones in turn for the others."""
    others = dict.fromkeys(kind_of(row) for row in rows if kind_of(row) not in COLOURS)
    return COLOURS | dict(zip(others, itertools.cycle(SPARE_COLOURS), strict=False))
