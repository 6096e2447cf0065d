"""The report's figures, as inline SVG, and the words they share with its tables."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
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
TIME_PARTS = {"target": ("#0072b2", ""), "draft": ("#e69f00", "////"), "rest": ("#c3c7cc", "....")}
# Each signal's axis label, and whether a rule on it relaxes above its threshold (else below).
SIGNALS = {"ratio": ("ratio z2 / z1", True), "margin": ("margin z1 - z2 (nats)", False), "odds": ("odds p2 / p1", True)}
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


def figures(results: dict[str, Any]) -> dict[str, Markup | None]:
    """Every figure as inline SVG, None where its data are absent."""
    import matplotlib  # an extra, as everywhere below

    rows = pooled(results)
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


def pooled(results: dict[str, Any]) -> list[Row]:
    """The rows over all categories (task `all`), or all rows where none pools them."""
    return [row for row in results["rows"] if row["task"] == "all"] or results["rows"]


def rule_name(row: Row) -> str:
    """A rule as people read it, with the threshold of a relaxed one, and its draft and batch where they tell it apart."""
    name, verifier, batch = str(NAMES.get(row["rule"], row["rule"])), row.get("verifier"), row.get("batch_size", 1)
    threshold = f"{verifier['signal']} {verifier['threshold']:g}" if row["rule"] == "mars" and verifier else None
    return ", ".join(filter(None, (name, threshold, row.get("draft"), f"batch {batch}" if batch > 1 else None)))


def interval_text(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}" if bounds else "–"


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
        axes.barh(place, speed, 0.62, color=colours[_kind(row)], alpha=0.85, hatch=hatch, edgecolor="white")
        axes.plot((low, high), (place, place), color=INK, marker="|", linewidth=1.2)
        axes.annotate(f"{speed:.2f}×", (max(high, speed), place), (6, 0), textcoords="offset points", va="center")
        reach = max(reach, speed, high)
        said.append(f"{row['task']} {rule_name(row)} {speed:.2f}, interval {interval_text(row['speedup_ci95'])}")
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.18 * reach)
    return figure, "Bars, speed-up over transformers generate: " + "; ".join(said)


def _plot_acceptance(rows: list[Row]) -> Plot | None:
    rows = [row for row in rows if row.get("acceptance_by_position")]
    if not rows:
        return None
    from matplotlib.ticker import MaxNLocator

    settings = list(dict.fromkeys(_setting(row) for row in rows))
    across = min(len(settings), 2)
    down = -(-len(settings) // across)
    figure = _figure(0.6 + (2.4 if across == 1 else 1.6) * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    colours, panels, said = _colours(rows), list(grid.flat), []
    for axes, setting in zip(panels, settings, strict=False):
        for row in (row for row in rows if _setting(row) == setting):
            shares = row["acceptance_by_position"]
            said.append(f"{row['task']} {rule_name(row)} " + ", ".join(f"{share:.0%}" for share in shares))
            marker = MARKERS[list(colours).index(_kind(row)) % len(MARKERS)]
            axes.plot(range(1, len(shares) + 1), shares, marker=marker, color=colours[_kind(row)], label=rule_name(row))
        axes.set(title=setting if len(settings) > 1 else "", ylim=(0, 1.02))
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    figure.supxlabel("draft position", fontsize=9)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 3 if max(map(len, handles)) <= 16 else 1
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, -(-len(handles) // columns) - 2))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)
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
        said.append(f"{row['task']} {rule_name(row)} {', '.join(shares)}")
    axes.set_xlim(0, 1.15 * left.max() or 1)
    figure.legend(loc="outside upper left", ncols=3)
    return figure, "Stacked bars, milliseconds per token: " + "; ".join(said)


def _plot_frontier(points: list[Row]) -> Plot | None:
    points = [point for point in points if point["mean_regret_nats"] is not None]
    if not points:
        return None
    points.sort(key=lambda point: (point["mean_regret_nats"], -point["tokens_per_second"]))
    figure = _figure(3.2)
    axes = figure.subplots()
    regrets = np.array([point["mean_regret_nats"] for point in points])
    rates = np.array([point["tokens_per_second"] for point in points])
    lossless, chosen, ran = (np.array([point[key] for point in points]) for key in ("lossless", "chosen", "confirmed"))
    foreseen = np.maximum.accumulate(rates[~ran])
    axes.step(regrets[~ran], foreseen, where="post", color="#8a9099", linewidth=1, zorder=1)
    looks: dict[str, tuple[Any, dict[str, Any]]] = {
        "predicted": (~ran, {"s": 8, "marker": "o", "color": "#8a9099"}),
        "lossless": (lossless & ran, {"s": 30, "marker": "s", "color": COLOURS["exact"]}),
        "relaxed": (~lossless & ran, {"s": 30, "marker": "o", "color": COLOURS["mars"]}),
        "chosen": (chosen, {"s": 130, "facecolor": "none", "edgecolor": INK}),
    }
    for label, (some, look) in looks.items():
        if some.any():
            axes.scatter(regrets[some], rates[some], label=label, zorder=3, **look)
    axes.margins(0.1, 0.14)
    axes.set(xlabel="mean regret (nats per token)", ylabel="tokens per second")
    figure.legend(loc="outside upper left", ncols=4)
    said = (
        f"{p['label']} {p['tokens_per_second']:.1f} at {p['mean_regret_nats']:.3f}{'' if p['confirmed'] else ', predicted'}"
        for p in points
    )
    return figure, "Points, tokens per second against mean regret in nats per token: " + "; ".join(said)


def _plot_training(training: Row) -> Plot | None:
    curve = training.get("curve") or []
    if not curve:
        return None
    figure = _figure(5.4)
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
    figure = _figure(0.2 + 1.55 * len(shown))
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
    verify = policy.get("relaxed") or policy.get("verify", policy)
    if not isinstance(verify, dict) or verify.get("threshold") is None:
        return None
    used = verify.get("signal", verify.get("rule"))
    return float(verify["threshold"]) if signal == ("ratio" if used == "mars" else used) else None


def _figure(height: float) -> Figure:
    """An empty figure of the report's width; inches."""
    from matplotlib.figure import Figure

    return Figure((WIDTH, height), layout="constrained")


def _bars(lines: list[Line], label: str) -> tuple[Figure, Axes]:
    """A figure for horizontal bars, the first line on top."""
    figure = _figure(0.9 + 0.34 * len(lines))
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
        lines += [(rule_name(row), row) for row in rows if _setting(row) == setting]
    return [(place, text, row) for place, (text, row) in enumerate(lines)]


def _setting(row: Row) -> str:
    return f"{row['task']}, T = {row['temperature']:g}"


def _kind(row: Row) -> str:
    """What has a colour of its own: a rule, and a rule with another draft or batch size."""
    return str(row["rule"]) if not row.get("draft") and row.get("batch_size", 1) == 1 else rule_name(row)


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour per rule: a fixed one for the usual rules, spare ones in turn for the others."""
    others = dict.fromkeys(_kind(row) for row in rows if _kind(row) not in COLOURS)
    return COLOURS | dict(zip(others, itertools.cycle(SPARE_COLOURS), strict=False))
