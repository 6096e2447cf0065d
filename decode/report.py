"""Results for people: the terminal's table, a model card's table, and one self-contained HTML page.

All three read `results.json`. Its optional parts (policy, frontier, training, distributions, samples, limits) are left
out of the page where they are absent; a row without a required key is a KeyError.
"""

from __future__ import annotations

import datetime
import io
import itertools
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from slipstream.configs.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Row = dict[str, Any]
    Plot = tuple[Figure, str]  # the figure, and the same in words
    Line = tuple[int, str, Row | None]  # a bar's place, its name, and its row; a heading has none

NAMES = {"autoregressive": "transformers", "engine": "engine", "exact": "exact", "mars": "MARS"}
SUBJECTS = {"exact": "Exact decoding", "mars": "MARS"}
BASELINES = ("autoregressive", "engine")
# Okabe and Ito's palette, told apart without colour vision; lines differ by marker too, bars by hatch.
COLOURS = {"autoregressive": "#9aa0a8", "engine": "#6b7480", "exact": "#0072b2", "mars": "#d55e00"}
SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"
TIME_PARTS = {"target": ("#0072b2", ""), "draft": ("#e69f00", "////"), "rest": ("#c3c7cc", "....")}
# Each signal's axis label, and whether a rule on it relaxes above its threshold (else below).
SIGNALS = {"ratio": ("ratio z2 / z1", True), "margin": ("margin z1 - z2 (nats)", False), "odds": ("odds p2 / p1", True)}
WORDS = ("task", "rule", "output")  # the columns that hold words, not numbers
TAGS = ("exact", "relaxed", "bonus")
WIDTH = 4.6  # inches: narrow, so that text stays legible when a phone scales the figure to 350 px
INK = "#2a2f36"
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


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write a self-contained HTML page, without network or scripts; `time_split` is seconds over all tokens of a row.

    Raises:
        KeyError: If a row lacks a required key.
        ValueError: If a sample's token has an unknown tag.
    """
    for token in itertools.chain.from_iterable(sample["tokens"] for sample in results.get("samples") or []):
        if token["tag"] not in TAGS:
            raise ValueError(f"token {token['text']!r} is tagged {token['tag']!r}; the tags are {', '.join(TAGS)}")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "name": _name}
    source = resources.files("slipstream.decode").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        results=results,
        date=results.get("date") or datetime.date.today().isoformat(),
        headline=headline(results),
        tables=_grouped_cells(results["rows"]),
        figures=_figures(results),
        tags=TAGS,
    )
    write_atomic(path, page)


def results_table(results: dict[str, Any]) -> Table:
    """The table the terminal shows: one line per row, the relaxed rules below a rule of their own."""
    columns = {"task": "Task", "rule": "Rule", "temperature": "T", "rate": "tok/s", "speedup": "Speed-up"}
    columns |= {"interval": "95 %", "tau": "tau", "regret": "Regret", "length": "Length", "output": "Output"}
    title = Text(f"{results['target']} with {results['draft']}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for key, header in columns.items():
        table.add_column(header, justify="left" if key in WORDS else "right", no_wrap=key not in WORDS)
    for _, group in _grouped_cells(results["rows"]):
        for cells in group:
            table.add_row(*(Text(cells[key]) for key in columns))
        table.add_section()
    return table


def markdown_table(results: dict[str, Any]) -> str:
    """Tables for a model card; relaxed rules stand apart from the lossless ones."""
    columns = {"task": "Task", "rule": "Rule", "temperature": "T", "rate": "Tokens/s", "speedup": "Speed-up"}
    columns |= {"interval": "95 % interval", "tau": "Acceptance length", "length": "Answer length"}
    blocks = []
    for title, group in _grouped_cells(results["rows"]):
        lossy = {"relaxed": "Relaxed tokens", "regret": "Regret (nats/token)"} if title.startswith("Relaxed") else {}
        shown = columns | lossy | {"output": "Output"}
        lines = [f"**{title}**", "", _markdown_line(shown.values())]
        lines.append("|" + "|".join("---" if key in WORDS else "--:" for key in shown) + "|")
        lines += [_markdown_line(cells[key] for key in shown) for cells in group]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def headline(results: dict[str, Any]) -> str:
    """What the rows say, in one plain sentence."""
    rules: dict[str, list[Row]] = {}
    for row in results["rows"]:
        if row["rule"] not in BASELINES:
            rules.setdefault(row["rule"], []).append(row)
    if not rules:
        return "Only the baselines were measured; nothing was drafted."
    plain = [row for row in results["rows"] if row["rule"] == "autoregressive"]
    lengths = {(row["task"], row["temperature"]): row["mean_output_tokens"] for row in plain}
    clauses = [
        f"{SUBJECTS.get(rule, rule)} is {_speed(rows)} {_fidelity(rows, lengths)}" for rule, rows in rules.items()
    ]
    return "; ".join(clauses).replace("× as fast", "× as fast as transformers’ generate", 1) + "."


def _speed(rows: list[Row]) -> str:
    """The speed-up of one rule in words, over one row or several."""
    speeds, interval = [row["speedup"] for row in rows], rows[0]["speedup_ci95"]
    if len(rows) > 1:
        return f"{min(speeds):.2f}× to {max(speeds):.2f}× as fast over {len(rows)} settings"
    if not interval:
        return f"{speeds[0]:.2f}× as fast"
    unclear = ", no clear difference" if interval[0] <= 1 <= interval[1] else ""
    return f"{speeds[0]:.2f}× as fast (95 % interval {interval[0]:.2f} to {interval[1]:.2f}{unclear})"


def _fidelity(rows: list[Row], lengths: dict[tuple[str, float], float]) -> str:
    """What one rule does to the output, in words; `lengths` are the target's own answer lengths."""
    if all(row["lossless"] for row in rows):
        outputs = {_output(row) for row in rows}
        if "differs" in outputs:
            return "but did not give the same tokens in every answer"
        if "unchecked" in outputs:
            return "(its tokens were not compared with the target’s)"
        return "and keeps the target’s distribution" if "sampled" in outputs else "and gives the same tokens"
    up = "up to " if len(rows) > 1 else ""
    regrets = [row["mean_regret_nats"] for row in rows]
    text = "at a regret that was not measured"
    if None not in regrets:
        text = f"at a mean regret of {up}{max(regrets):.3f} nats per token"
    pairs = [(row["mean_output_tokens"], lengths.get((row["task"], row["temperature"]))) for row in rows]
    longer = max((own / plain - 1 for own, plain in pairs if own and plain), default=0.0)
    return text + (f", with answers {up}{longer:.0%} longer" if longer > 0.1 else "")


def _grouped_cells(rows: list[Row]) -> list[tuple[str, list[dict[str, str]]]]:
    """Rows as text, lossless rules first; a lossy row never stands in the lossless table."""
    titles = {True: "Lossless: the target’s own output", False: "Relaxed: the output may differ from the target’s"}
    tables = {title: [_cells(row) for row in rows if row["lossless"] is kind] for kind, title in titles.items()}
    return [(title, cells) for title, cells in tables.items() if cells]


def _cells(row: Row) -> dict[str, str]:
    """One row as text, a dash for what does not apply."""
    return {
        "task": row["task"],
        "rule": _name(row),
        "temperature": f"{row['temperature']:g}",
        "rate": _number(row["tokens_per_second"], 1),
        "speedup": _number(row["speedup"], 2, "×"),
        "interval": "–" if row["rule"] == "autoregressive" else _interval(row["speedup_ci95"]),
        "engine": _number(row["speedup_engine"], 2, "×"),
        "tau": _number(row["acceptance_length"], 2),
        "relaxed": "–" if row["relaxed_share"] is None else f"{row['relaxed_share']:.1%}",
        "regret": _number(row["mean_regret_nats"], 3),
        "length": _number(row["mean_output_tokens"], 0),
        "prompts": f"{row['prompts']}",
        "tokens": f"{row['tokens']:,}",
        "output": _output(row),
    }


def _figures(results: dict[str, Any]) -> dict[str, Markup | None]:
    """Every figure as inline SVG, None where its data are absent."""
    rows = results["rows"]
    with matplotlib.rc_context(STYLE):
        plots: dict[str, Plot | None] = {
            "speedup": _plot_speedup(rows),
            "acceptance": _plot_acceptance(rows),
            "time": _plot_time(rows),
            "frontier": _plot_frontier(results.get("frontier") or []),
            "training": _plot_training(results.get("training") or {}),
            "distributions": _plot_distributions(results.get("distributions") or {}, results.get("policy") or {}),
        }
        return {name: None if plot is None else _svg(*plot, name) for name, plot in plots.items()}


def _svg(figure: Figure, label: str, name: str) -> Markup:
    """A figure as an element for an HTML page: sized by its container, its ids and styles its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    (view, body), *_ = re.findall(r'<svg[^>]*(viewBox="[^"]+")[^>]*>(.*)', svg, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("'DejaVu Sans'", "system-ui, sans-serif")
    alternative = escape(label)
    head = f'<svg {view} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{alternative}">'
    return Markup(f"{head}<title>{alternative}</title>{body}")


def _plot_speedup(rows: list[Row]) -> Plot | None:
    lines = _lines([row for row in rows if row["rule"] != "autoregressive"])
    if not lines:
        return None
    figure, axes = _bars(lines, "speed-up over transformers generate")
    colours, reach, said = _colours(rows), 1.0, []
    for place, _, row in lines:
        if row is None:
            continue
        speed, hatch = row["speedup"], "" if row["lossless"] else "////"
        low, high = row["speedup_ci95"] or (speed, speed)
        axes.barh(place, speed, 0.62, color=colours[row["rule"]], alpha=0.85, hatch=hatch, edgecolor="white")
        axes.plot((low, high), (place, place), color=INK, marker="|", linewidth=1.2)
        axes.annotate(f"{speed:.2f}×", (max(high, speed), place), (6, 0), textcoords="offset points", va="center")
        reach = max(reach, speed, high)
        said.append(f"{row['task']} {_name(row)} {speed:.2f}, interval {_interval(row['speedup_ci95'])}")
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.18 * reach)
    return figure, "Bars, speed-up over transformers generate: " + "; ".join(said)


def _plot_acceptance(rows: list[Row]) -> Plot | None:
    rows = [row for row in rows if row.get("acceptance_by_position")]
    if not rows:
        return None
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    across = min(len(settings), 2)
    down = -(-len(settings) // across)
    figure = Figure((WIDTH, 0.6 + (2.4 if across == 1 else 1.6) * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    colours, panels, said = _colours(rows), list(grid.flat), []
    for axes, setting in zip(panels, settings, strict=False):
        for row in (row for row in rows if _setting(row) == setting):
            shares = row["acceptance_by_position"]
            said.append(f"{row['task']} {_name(row)} " + ", ".join(f"{share:.0%}" for share in shares))
            marker = MARKERS[list(colours).index(row["rule"]) % len(MARKERS)]
            axes.plot(range(1, len(shares) + 1), shares, marker=marker, color=colours[row["rule"]], label=_name(row))
        axes.set(title=setting if len(settings) > 1 else "", ylim=(0, 1.02))
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    figure.supxlabel("draft position", fontsize=9)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)
    return figure, "Lines, acceptance at draft positions 1, 2, 3 and on: " + "; ".join(said)


def _plot_time(rows: list[Row]) -> Plot | None:
    lines = _lines([row for row in rows if row.get("time_split") and row["tokens"]])
    if not lines:
        return None
    figure, axes = _bars(lines, "milliseconds per token")
    shown = [(place, row) for place, _, row in lines if row is not None]
    places, left = [place for place, _ in shown], np.zeros(len(shown))
    for part, (colour, hatch) in TIME_PARTS.items():
        widths = np.array([1000 * row["time_split"][part] / row["tokens"] for _, row in shown])
        axes.barh(places, widths, 0.62, left, label=part, color=colour, hatch=hatch, edgecolor="white")
        left = left + widths
    said = []
    for (place, row), total in zip(shown, left, strict=True):
        axes.annotate(f"{total:.1f}", (total, place), (4, 0), textcoords="offset points", va="center")
        shares = (f"{part} {1000 * row['time_split'][part] / row['tokens']:.1f}" for part in TIME_PARTS)
        said.append(f"{row['task']} {_name(row)} {', '.join(shares)}")
    axes.set_xlim(0, 1.15 * left.max() or 1)
    figure.legend(loc="outside upper left", ncols=3)
    return figure, "Stacked bars, milliseconds per token: " + "; ".join(said)


def _plot_frontier(points: list[Row]) -> Plot | None:
    points = [point for point in points if point["mean_regret_nats"] is not None]
    if not points:
        return None
    points.sort(key=lambda point: (point["mean_regret_nats"], -point["tokens_per_second"]))
    figure = Figure((WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    regrets = np.array([point["mean_regret_nats"] for point in points])
    rates = np.array([point["tokens_per_second"] for point in points])
    axes.step(regrets, np.maximum.accumulate(rates), where="post", color="#8a9099", linewidth=1, zorder=1)
    lossless, chosen = (np.array([point[key] for point in points]) for key in ("lossless", "chosen"))
    looks: dict[str, tuple[Any, dict[str, Any]]] = {
        "lossless": (lossless, {"s": 30, "marker": "s", "color": COLOURS["exact"]}),
        "relaxed": (~lossless, {"s": 30, "marker": "o", "color": COLOURS["mars"]}),
        "chosen": (chosen, {"s": 130, "facecolor": "none", "edgecolor": INK}),
    }
    for label, (some, look) in looks.items():
        if some.any():
            axes.scatter(regrets[some], rates[some], label=label, zorder=3, **look)
    axes.margins(0.1, 0.14)
    axes.set(xlabel="mean regret (nats per token)", ylabel="tokens per second")
    figure.legend(loc="outside upper left", ncols=3)
    said = (f"{p['label']} {p['tokens_per_second']:.1f} at {p['mean_regret_nats']:.3f}" for p in points)
    return figure, "Points, tokens per second against mean regret in nats per token: " + "; ".join(said)


def _plot_training(training: Row) -> Plot | None:
    curve = training.get("curve") or []
    if not curve:
        return None
    figure = Figure((WIDTH, 5.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    losses, simulated = _recorded(curve, "loss"), _recorded(curve, "simulated_acceptance_length")
    top.plot(*losses, color=COLOURS["engine"])
    top.set_title("training loss")
    accuracy = [(point["step"], point["accuracy"]) for point in curve if point.get("accuracy")]
    depth = max((len(shares) for _, shares in accuracy), default=0)
    for position in range(depth):
        steps, shares = [step for step, _ in accuracy], [shares[position] for _, shares in accuracy]
        middle.plot(steps, shares, color=COLOURS["exact"], alpha=1 - 0.75 * position / depth)
        if position in (0, depth - 1):
            middle.annotate(f"{position + 1}", (steps[-1], shares[-1]), (4, 0), textcoords="offset points", va="center")
    middle.set_title(f"draft accuracy at unrolled steps 1 to {depth}" if depth else "draft accuracy: not recorded")
    middle.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bottom.plot(*simulated, color=COLOURS["mars"], marker=".", label="simulated")
    measured = training.get("measured_chain_acceptance_length")
    if measured is not None:
        bottom.axhline(measured, color=INK, linewidth=1.1, linestyle="--", label="measured with a chain")
    bottom.legend(loc="lower right")
    bottom.set(title="acceptance length", xlabel="step")
    named = {"loss": losses[1], "simulated acceptance length": simulated[1]}
    said = [f"{name} from {values[0]:.2f} to {values[-1]:.2f}" for name, values in named.items() if values]
    return figure, f"Curves over {curve[-1]['step']} steps: {', '.join(said)}"


def _recorded(curve: list[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a quantity, where it was recorded."""
    points = [(point["step"], point[key]) for point in curve if point.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _plot_distributions(distributions: Row, policy: Row) -> Plot | None:
    everything = {name: np.asarray(distributions[name], float) for name in SIGNALS if distributions.get(name)}
    shown = {name: values for name, values in everything.items() if np.isfinite(values).any()}
    if not shown:
        return None
    figure = Figure((WIDTH, 0.2 + 1.55 * len(shown)), layout="constrained")
    said = []
    for axes, (name, values) in zip(figure.subplots(len(shown), 1, squeeze=False).flat, shown.items(), strict=True):
        text, above = SIGNALS[name]
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, (0.005, 0.995))
        threshold = _threshold(policy, name)
        if threshold is not None:
            low, high = min(low, threshold), max(high, threshold)
            share = np.mean(values >= threshold if above else values <= threshold)
            side = (threshold, high) if above else (low, threshold)
            axes.axvline(threshold, color=COLOURS["mars"], zorder=4)
            axes.axvspan(*side, color=COLOURS["mars"], alpha=0.22, zorder=3)
            text += f", threshold {threshold:g}: {share:.0%} on the relaxed side"
        if len(finite) < len(values):
            text += f" ({len(values) - len(finite)} not finite, not drawn)"
        axes.hist(finite, bins=40, range=(low, high) if high > low else None, color=COLOURS["engine"])
        axes.set(title=text, yticks=[])
        axes.spines["left"].set_visible(False)
        said.append(f"{text}, median {np.median(finite):.2f} over {len(values)} positions")
    return figure, "Histograms at verified positions: " + "; ".join(said)


def _threshold(policy: Row, signal: str) -> float | None:
    """The policy's threshold on a signal, if its verification rule uses that signal; MARS without one is the ratio."""
    verify = policy.get("verify", policy)
    if not isinstance(verify, dict) or verify.get("threshold") is None:
        return None
    used = verify.get("signal", verify.get("rule"))
    return float(verify["threshold"]) if signal == ("ratio" if used == "mars" else used) else None


def _bars(lines: list[Line], label: str) -> tuple[Figure, Axes]:
    """A figure for horizontal bars, the first line on top."""
    figure = Figure((WIDTH, 0.9 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks([place for place, _, _ in lines], [text for _, text, _ in lines])
    for tick, (_, _, row) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axes.set(xlabel=label, ylim=(len(lines) - 0.5, -0.6))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _lines(rows: list[Row]) -> list[Line]:
    """Rows with their names, under a heading per task and temperature where there are several."""
    settings = dict.fromkeys(_setting(row) for row in rows)
    lines: list[tuple[str, Row | None]] = []
    for setting in settings:
        lines += [(setting, None)] if len(settings) > 1 else []
        lines += [(_name(row), row) for row in rows if _setting(row) == setting]
    return [(place, text, row) for place, (text, row) in enumerate(lines)]


def _name(row: Row) -> str:
    """A rule as people read it."""
    return str(NAMES.get(row["rule"], row["rule"]))


def _setting(row: Row) -> str:
    return f"{row['task']}, T = {row['temperature']:g}"


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour per rule: a fixed one for the usual rules, spare ones in turn for the others."""
    others = dict.fromkeys(row["rule"] for row in rows if row["rule"] not in COLOURS)
    return COLOURS | dict(zip(others, itertools.cycle(SPARE_COLOURS), strict=False))


def _output(row: Row) -> str:
    """How a row's output relates to the target's own."""
    if not row["lossless"]:
        return "relaxed"
    if row["temperature"] > 0:
        return "sampled"
    return {True: "same", False: "differs", None: "unchecked"}[row["identical_to_target"]]


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}" if bounds else "–"


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
