"""Columns of text that say how faithful an output is: fidelity and scores, for Markdown and for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipstream.decode.drawing import NAMES, rule_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]
    Columns = tuple[list[str], list[list[str]]]  # their names, and the lines

WORD_COLUMNS = ("Task", "Rule", "Score", "Compared with")  # the others hold numbers


def fidelity_columns(rows: Sequence[Row]) -> Columns:
    """Agreement with the strict output, likelihood of the output, and the tail of the regret."""
    lines = []
    for row in rows:
        same, tail = row["agreement"], row["regret_quantiles"]
        shares = [_share(same, name) if same else "–" for name in ("exact_match", "common_prefix", "equal_tokens")]
        likely = f"{row['log_likelihood']:.3f}{_span(row['log_likelihood_ci95'], '.3f')}"
        costs = " / ".join(f"{value:.2f}" for value in tail.values()) if tail else "–"
        mean = f"{row['mean_regret_nats']:.4f}"
        lines.append([*place(row), _judge(row), *shares, likely, mean, costs, f"{row['mean_output_tokens']:.0f}"])
    names = ["Task", "Rule", "T", "Compared with", "Same answers", "Common prefix", "The same, pooled"]
    names += [
        "Log-likelihood (nats/token)",
        "Regret (nats/token)",
        "Regret of relaxed tokens: 50 / 90 / 99 % / largest",
    ]
    return [*names, "Answer length"], lines


def score_columns(rows: Sequence[Row]) -> Columns:
    """Every score with its interval, its difference to the strict output's, and the length of the answers."""
    lines = []
    for row in rows:
        for name, score in row["scores"].items():
            change = f"{score['difference']:+.3f}{_span(score['difference_ci95'], '+.3f')}"
            mean = f"{score['mean']:.3f}{_span(score['ci95'], '.3f')}"
            length, prompts = f"{score['mean_output_tokens']:.0f}", f"{score['prompts']}"
            lines.append([row["task"], name, *place(row)[1:], mean, _judge(row), change, length, prompts])
    names = [
        "Task",
        "Score",
        "Rule",
        "T",
        "Mean (95 %)",
        "Compared with",
        "Difference (95 %)",
        "Answer length",
        "Prompts",
    ]
    return names, lines


def place(row: Row) -> list[str]:
    """Task, rule and temperature."""
    return [row["task"], rule_name(row), f"{row['temperature']:g}"]


def _judge(row: Row) -> str:
    return NAMES[row["compared_with"]]


def _share(same: Row, name: str) -> str:
    return f"{same[name]:.1%}{_span(same[f'{name}_ci95'], '.1%')}"


def _span(bounds: Sequence[float] | None, form: str) -> str:
    """An interval behind its value."""
    return f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else ""
