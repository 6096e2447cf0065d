"""The report's figures of fidelity: agreement, likelihood, margins and regret of relaxed tokens, and task scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.decode.drawing import (
    colours_of,
    draw_point,
    folded,
    kind_of,
    line_height,
    lines_of,
    name_lines,
    new_figure,
    panels,
    rule_name,
    set_legend,
    setting_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from slipstream.decode.drawing import Line, Plot, Row

SHADES = {"0.5": 0.35, "0.9": 0.6, "0.99": 0.8, "max": 1.0}  # of a rule's colour, by the quantile of its regrets


def plot_fidelity(rows: list[Row]) -> Plot | None:
    """How far each rule's output is from the strict one; None where it was not compared."""
    rows = [row for row in rows if row.get("compared_with")]
    if not rows:
        return None
    greedy = [row for row in rows if row["agreement"] and row["rule"] != "autoregressive"]
    relaxed = [row for row in rows if row["regret_quantiles"]]
    parts = [
        ("common prefix with the strict output", greedy, _draw_prefix),
        ("log-likelihood (nats per token)", rows, _draw_likelihood),
        ("regret of a relaxed token (nats)", relaxed, _draw_tail),
    ]
    drawn = [(title, lines_of(some), draw) for title, some, draw in parts if some]
    heights = [0.55 + line_height(lines) * len(lines) for _, lines, _ in drawn]
    figure = new_figure(0.2 + sum(heights))
    colours, said = colours_of(rows), []
    grid = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights).flat
    for axes, (title, lines, draw) in zip(grid, drawn, strict=True):
        name_lines(axes, lines)
        axes.set_title(title, loc="right")  # where long names leave the axes narrow, it reaches over them
        for place, row in _rules(lines):
            said.append(f"{_said(row)} {title} {draw(axes, place, row, colours[kind_of(row)])}")
    return figure, "Points with 95 % intervals: " + "; ".join(said)


def plot_margins(rows: list[Row]) -> Plot | None:
    """How undecided the target was where a relaxed token passed; None where none did."""
    rows = [row for row in rows if row.get("relaxed_margins")]
    if not rows:
        return None
    figure = new_figure(0.5 + 1.15 * len(rows))
    colours, said = colours_of(rows), []
    several = len({setting_of(row) for row in rows}) > 1
    for axes, row in zip(figure.subplots(len(rows), 1, sharex=True, squeeze=False).flat, rows, strict=True):
        edges, counts = row["relaxed_margins"]["edges"], row["relaxed_margins"]["counts"]
        axes.stairs(counts, edges, fill=True, color=colours[kind_of(row)], alpha=0.85)
        name = f"{setting_of(row)}, {rule_name(row)}" if several else rule_name(row)
        axes.set_title(folded(f"{name}: {sum(counts)} relaxed tokens", 52))
        axes.tick_params(labelbottom=True)
        bins = (f"up to {edge:.2f} {count}" for edge, count in zip(edges[1:], counts, strict=True))
        said.append(f"{_said(row)} {', '.join(bins)}")
    figure.supxlabel("margin z1 - z2 (nats)", fontsize=9)
    return figure, "Histograms, relaxed tokens by the target’s margin in nats: " + "; ".join(said)


def plot_regret(rows: list[Row]) -> Plot | None:
    """How regret adds up along an answer; None where nothing was relaxed."""
    rows = [row for row in rows if row.get("regret_by_length")]
    if not rows:
        return None
    figure, settings = panels(rows)
    colours, said = colours_of(rows), []
    for row in rows:
        points, axes, colour = row["regret_by_length"], settings[setting_of(row)], colours[kind_of(row)]
        tokens = [point["tokens"] for point in points]
        axes.plot(tokens, [point["mean"] for point in points], color=colour, label=f"{rule_name(row)}, mean")
        tail = [point["q90"] for point in points]
        axes.plot(tokens, tail, color=colour, linestyle="--", label=f"{rule_name(row)}, 90 %")
        last = points[-1]
        reached = f"after {last['tokens']} tokens mean {last['mean']:.2f}, 90 % {last['q90']:.2f}"
        said.append(f"{_said(row)} {reached}, of {last['answers']} answers")
    figure.supxlabel("tokens of the answer", fontsize=9)
    figure.axes[0].set_ylabel("regret (nats)")
    set_legend(figure)
    return figure, "Curves, regret of an answer so far in nats: " + "; ".join(said)


def plot_scores(rows: list[Row]) -> Plot | None:
    """Task scores with their intervals, answer lengths beside them; None where nothing was scored."""
    groups: dict[str, list[tuple[Row, Row]]] = {}
    for row in rows:
        for name, score in row.get("scores", {}).items():
            groups.setdefault(f"{setting_of(row)}: {name}", []).append((row, score))
    if not groups:
        return None
    lines: list[Line] = []
    for heading, group in groups.items():
        lines += [(len(lines), heading, None)]
        lines += [(len(lines) + i, rule_name(row), row | {"score": score}) for i, (row, score) in enumerate(group)]
    figure = new_figure(0.7 + line_height(lines) * len(lines))
    axes = figure.subplots()
    name_lines(axes, lines)
    colours, said = colours_of(rows), []
    for place, row in _rules(lines):
        score, length = row["score"], f"{row['score']['mean_output_tokens']:.0f} tokens"
        words = draw_point(axes, place, score["mean"], score["ci95"], colours[kind_of(row)])
        said.append(f"{_said(row)} {words}, {length}")
        axes.annotate(length, (1.5, place), ha="right", va="center")
    axes.set(xlabel="score", xlim=(-0.02, 1.5), xticks=[0, 0.5, 1])
    return figure, "Points with 95 % intervals, scores from 0 to 1, and mean answer length: " + "; ".join(said)


def _rules(lines: Sequence[Line]) -> list[tuple[int, Row]]:
    """Places and rows of the lines that are no headings."""
    return [(place, row) for place, _, row in lines if row is not None]


def _draw_prefix(axes: Axes, place: int, row: Row, colour: str) -> str:
    same = row["agreement"]
    axes.update_datalim([(0, place), (1, place)])
    return draw_point(axes, place, same["common_prefix"], same["common_prefix_ci95"], colour)


def _draw_likelihood(axes: Axes, place: int, row: Row, colour: str) -> str:
    return draw_point(axes, place, row["log_likelihood"], row["log_likelihood_ci95"], colour)


def _draw_tail(axes: Axes, place: int, row: Row, colour: str) -> str:
    """Draw the quantiles of a rule's regrets, the larger the darker; the same in words."""
    tail = row["regret_quantiles"]
    axes.update_datalim([(0, place)])
    for name, value in tail.items():
        axes.plot(value, place, "D", color=colour, alpha=SHADES[name])
    return ", ".join(f"{name} {value:.2f}" for name, value in tail.items())


def _said(row: Row) -> str:
    return f"{setting_of(row)} {rule_name(row)}"
