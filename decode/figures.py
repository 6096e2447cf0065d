"""The report's figures, as inline SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.decode.drawing import (
    COLOURS,
    EDGE,
    INK,
    MARKERS,
    STYLE,
    apart,
    bar_axes,
    colours_of,
    inline_svg,
    interval_text,
    kind_of,
    lines_of,
    new_figure,
    panels,
    pooled,
    rule_name,
    set_legend,
    setting_of,
)
from slipstream.decode.fidelity_figures import plot_fidelity, plot_margins, plot_regret, plot_scores

if TYPE_CHECKING:
    from markupsafe import Markup

    from slipstream.decode.drawing import Plot, Row

TIME_PARTS = {"target": ("#0072b2", ""), "draft": ("#e69f00", "////"), "rest": ("#c3c7cc", "....")}
# Each signal's axis label, and whether a rule on it relaxes above its threshold (else below).
SIGNALS = {"ratio": ("ratio z2 / z1", True), "margin": ("margin z1 - z2 (nats)", False), "odds": ("odds p2 / p1", True)}


def figures(results: dict[str, Any]) -> dict[str, Markup | None]:
    """Every figure as inline SVG, None where its data are absent."""
    import matplotlib  # an extra, as everywhere below

    rows, tasks = pooled(results), apart(results)
    with matplotlib.rc_context(STYLE):
        plots: dict[str, Plot | None] = {
            "speedup": _plot_speedup(rows),
            "acceptance": _plot_acceptance(rows),
            "by_task": _plot_acceptance(tasks),
            "time": _plot_time(rows),
            "frontier": _plot_frontier(results.get("frontier") or []),
            "fidelity": plot_fidelity(rows),
            "margins": plot_margins(rows),
            "regret": plot_regret(rows),
            "scores": plot_scores(tasks or rows),
            "training": _plot_training(results.get("training") or {}),
            "distributions": _plot_distributions(results.get("distributions") or {}, results.get("policy") or {}),
        }
        return {name: None if plot is None else inline_svg(*plot, name) for name, plot in plots.items()}


def _plot_speedup(rows: list[Row]) -> Plot | None:
    lines = lines_of([row for row in rows if row["rule"] != "autoregressive"])
    if not lines:
        return None
    figure, axes = bar_axes(lines, "speed-up over transformers generate")
    colours, reach, said = colours_of(rows), 1.0, []
    for place, _, row in lines:
        if row is None:
            continue
        speed, hatch = row["speedup"], "" if row["lossless"] else "////"
        low, high = row["speedup_ci95"] or (speed, speed)
        axes.barh(place, speed, 0.62, color=colours[kind_of(row)], alpha=0.85, hatch=hatch, edgecolor="white")
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

    figure, settings = panels(rows)
    colours, said = colours_of(rows), []
    for row in rows:
        shares, axes, kind = row["acceptance_by_position"], settings[setting_of(row)], kind_of(row)
        marker = MARKERS[list(colours).index(kind) % len(MARKERS)]
        axes.plot(range(1, len(shares) + 1), shares, marker=marker, color=colours[kind], label=rule_name(row))
        said.append(f"{row['task']} {rule_name(row)} " + ", ".join(f"{share:.0%}" for share in shares))
    for axes in settings.values():
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.supxlabel("draft position", fontsize=9)
    set_legend(figure)
    return figure, "Lines, acceptance at draft positions 1, 2, 3 and on: " + "; ".join(said)


def _plot_time(rows: list[Row]) -> Plot | None:
    lines = lines_of([row for row in rows if row.get("time_split") and row["tokens"]])
    if not lines:
        return None
    figure, axes = bar_axes(lines, "milliseconds per token")
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
    figure = new_figure(3.2)
    axes = figure.subplots()
    regrets = np.array([point["mean_regret_nats"] for point in points])
    rates = np.array([point["tokens_per_second"] for point in points])
    lossless, chosen, ran = (np.array([point[key] for point in points]) for key in ("lossless", "chosen", "confirmed"))
    foreseen = np.maximum.accumulate(rates[~ran])
    axes.step(regrets[~ran], foreseen, where="post", color=EDGE, linewidth=1, zorder=1)
    looks: dict[str, tuple[Any, dict[str, Any]]] = {
        "predicted": (~ran, {"s": 8, "marker": "o", "color": EDGE}),
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
    figure = new_figure(5.4)
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
    figure = new_figure(0.2 + 1.55 * len(shown))
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
