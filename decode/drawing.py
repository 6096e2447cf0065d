"""What figures and tables share: colours and names, empty figures, points with intervals, and SVG."""

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
EDGE, GRID, PAPER = "#8a9099", "#e6e8eb", "#ffffff"
WIDTH = 4.6  # inches: narrow, so that text stays legible when a phone scales the figure to 350 px
INK = "#2a2f36"
# What the colours of a figure that is a file of its own become where its reader's scheme is dark; the others suit both.
DARK = {
    INK: "#dfe3e8",
    EDGE: "#7d8794",
    GRID: "#2b3138",
    PAPER: "#15181c",
    COLOURS["exact"]: "#3d8fd1",
    COLOURS["mars"]: "#f0803c",
}
_BAR = 0.34  # inches of a bar with its room, enough for a name of two lines
_NAME = 28  # letters of a name in one line
_SHOWN = 460  # CSS pixels of a figure file's width, where there is room
_MARGIN = 6  # points around it
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
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
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
    """A rule as people read it, with what a relaxed one lets pass, and its draft and batch where they tell it apart."""
    name, verifier, batch = str(NAMES.get(row["rule"], row["rule"])), row.get("verifier"), row.get("batch_size", 1)
    settings = []
    if row["rule"] == "mars" and verifier:
        further = {"rank": verifier.get("rank", 2) > 2, "price": verifier.get("price")}
        settings = [f"{verifier['signal']} {verifier['threshold']:g}"]
        settings += [f"{name} {verifier[name]:g}" for name, there in further.items() if there]
    return ", ".join(filter(None, (name, *settings, row.get("draft"), f"batch {batch}" if batch > 1 else None)))


def interval_text(bounds: Sequence[float] | None, digits: int = 2) -> str:
    return f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}" if bounds else "–"


def inline_svg(figure: Figure, label: str, name: str) -> Markup:
    """A figure as an element for an HTML page: sized by its container, its ids and styles its own."""
    view, body = _drawn(figure)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    alternative = escape(label)
    head = f'<svg viewBox="{view}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{alternative}">'
    return Markup(f"{head}<title>{alternative}</title>{body}")


def svg_file(figure: Figure, title: str, label: str) -> str:
    """A figure as a file of its own, on its own background, light or dark as its reader's scheme is."""
    view, body = _drawn(figure)
    dark = " ".join(f"--{light[1:]}: {colour};" for light, colour in DARK.items())
    width, height = (float(number) + 2 * _MARGIN for number in view.split()[2:])
    body = f'<rect x="{-_MARGIN}" y="{-_MARGIN}" width="100%" height="100%" rx="6" style="fill: {PAPER}"/>{body}'
    body = " ".join(body.split()).replace("> <", "><") + "\n"
    for colour in DARK:
        body = body.replace(colour, f"var(--{colour[1:]}, {colour})")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {width:g} {height:g}" width="{_SHOWN}" height="{_SHOWN * height / width:.0f}" '
        'role="img" aria-labelledby="title words">'
        f'<title id="title">{escape(title)}</title><desc id="words">{escape(label)}</desc>'
        f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }} * {{ stroke-linejoin: round; }}</style>{body}"
    )


def _drawn(figure: Figure) -> tuple[str, str]:
    """The view box of a figure's SVG, and all that is in it, up to the closing tag."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    (view, body), *_ = re.findall(r'<svg[^>]*viewBox="([^"]+)"[^>]*>(.*)', svg, flags=re.DOTALL)
    return view, body.replace("'DejaVu Sans'", "system-ui, sans-serif")


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


def draw_point(
    axes: Axes,
    place: float,
    value: float,
    bounds: Sequence[float] | None,
    colour: str,
    marker: str = "o",
    digits: int = 2,
) -> str:
    """Draw a value with its interval; the same in words."""
    axes.plot(bounds or (value, value), (place, place), color=INK, marker="|", linewidth=1.2)
    axes.plot(value, place, marker, color=colour)
    return f"{value:.{digits}f}, interval {interval_text(bounds, digits)}"


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
