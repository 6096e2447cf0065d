"""`table.md`: everything `slipstream evaluate` measured, as Markdown for a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipstream.decode.figures import NAMES, pooled, rule_name
from slipstream.decode.report import markdown_line, markdown_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]


def card_tables(results: dict[str, Any]) -> str:
    """Speed over all tasks and by task, acceptance by position, fidelity, and scores where there are any."""
    rows = pooled(results)
    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    apart = sorted((row for row in results["rows"] if row not in rows), key=lambda row: tasks.index(row["task"]))
    parts = {
        "Speed": markdown_rows(rows),
        "Speed by task": markdown_rows(apart),
        "Acceptance by position": _positions([row for row in [*rows, *apart] if row["acceptance_by_position"]]),
        "Fidelity": _fidelity(rows),
        "Scores": _scores(apart or rows, results.get("sandbox")),
    }
    about = f"{results['target']} with {results['draft']}, {results['device']}, {results['dtype']}, {results['date']}"
    return f"{about}\n\n" + "\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text.strip())


def _positions(rows: Sequence[Row]) -> str:
    """Share of rounds that kept at least 1, 2, .. drafts."""
    depth = max((len(row["acceptance_by_position"]) for row in rows), default=0)
    lines = []
    for row in rows:
        shares = [f"{share:.0%}" for share in row["acceptance_by_position"]]
        lines.append([*_place(row), f"{row['acceptance_length']:.2f}", *shares, *["–"] * (depth - len(shares))])
    return _table(["Task", "Rule", "T", "Acceptance length", *map(str, range(1, depth + 1))], lines)


def _fidelity(rows: Sequence[Row]) -> str:
    """Agreement with the strict output, likelihood of the output, and the tail of the regret."""
    lines = []
    for row in rows:
        same, tail = row["agreement"], row["regret_quantiles"]
        shares = [_share(same, name) if same else "–" for name in ("exact_match", "common_prefix", "equal_tokens")]
        likely = f"{row['log_likelihood']:.3f}{_span(row['log_likelihood_ci95'], '.3f')}"
        costs = " / ".join(f"{value:.2f}" for value in tail.values()) if tail else "–"
        mean = f"{row['mean_regret_nats']:.4f}"
        lines.append([*_place(row), _judge(row), *shares, likely, mean, costs, f"{row['mean_output_tokens']:.0f}"])
    names = ["Task", "Rule", "T", "Compared with", "Same answers", "Common prefix", "The same, pooled"]
    names += [
        "Log-likelihood (nats/token)",
        "Regret (nats/token)",
        "Regret of relaxed tokens: 50 / 90 / 99 % / largest",
    ]
    return _table([*names, "Answer length"], lines)


def _scores(rows: Sequence[Row], sandbox: dict[str, bool] | None) -> str:
    """Every score with its interval, its difference to the strict output's, and the length of the answers."""
    lines = []
    for row in rows:
        for name, score in row["scores"].items():
            change = f"{score['difference']:+.3f}{_span(score['difference_ci95'], '+.3f')}"
            mean = f"{score['mean']:.3f}{_span(score['ci95'], '.3f')}"
            length, prompts = f"{score['mean_output_tokens']:.0f}", f"{score['prompts']}"
            lines.append([row["task"], name, *_place(row)[1:], mean, _judge(row), change, length, prompts])
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
    held = ""
    if sandbox:
        network = "without a network" if sandbox["network"] else "not isolated from the network"
        processes = "could not" if sandbox["processes"] else "were not kept by the kernel from trying to"
        held = f"\nPrograms ran {network} and {processes} start processes.\n"
    return _table(names, lines) + held


def _place(row: Row) -> list[str]:
    return [row["task"], rule_name(row), f"{row['temperature']:g}"]


def _judge(row: Row) -> str:
    return NAMES[row["compared_with"]]


def _share(same: Row, name: str) -> str:
    return f"{same[name]:.1%}{_span(same[f'{name}_ci95'], '.1%')}"


def _span(bounds: Sequence[float] | None, form: str) -> str:
    """An interval behind its value."""
    return f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else ""


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where it has no lines."""
    if not lines:
        return ""
    ruler = (
        "|" + "|".join("---" if name in ("Task", "Rule", "Score", "Compared with") else "--:" for name in names) + "|"
    )
    return "\n".join([markdown_line(names), ruler, *map(markdown_line, lines)]) + "\n"
