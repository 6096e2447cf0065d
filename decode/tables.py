"""`table.md`: everything `slipstream evaluate` measured, as Markdown for a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipstream.decode.columns import WORD_COLUMNS, fidelity_columns, place, score_columns
from slipstream.decode.drawing import apart, pooled
from slipstream.decode.report import markdown_line, markdown_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]


def card_tables(results: dict[str, Any]) -> str:
    """Speed over all tasks and by task, acceptance by position, fidelity, and scores where there are any."""
    rows, tasks = pooled(results), apart(results)
    parts = {
        "Speed": markdown_rows(rows),
        "Speed by task": markdown_rows(tasks),
        "Acceptance by position": _positions([row for row in [*rows, *tasks] if row["acceptance_by_position"]]),
        "Fidelity": _table(*fidelity_columns(rows)),
        "Scores": _table(*score_columns(tasks or rows)) + _held(results.get("sandbox")),
    }
    about = f"{results['target']} with {results['draft']}, {results['device']}, {results['dtype']}, {results['date']}"
    return f"{about}\n\n" + "\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text.strip())


def _positions(rows: Sequence[Row]) -> str:
    """Share of rounds that kept at least 1, 2, .. drafts."""
    depth = max((len(row["acceptance_by_position"]) for row in rows), default=0)
    lines = []
    for row in rows:
        shares = [f"{share:.0%}" for share in row["acceptance_by_position"]]
        lines.append([*place(row), f"{row['acceptance_length']:.2f}", *shares, *["–"] * (depth - len(shares))])
    return _table(["Task", "Rule", "T", "Acceptance length", *map(str, range(1, depth + 1))], lines)


def _held(sandbox: dict[str, bool] | None) -> str:
    """What kept the scored programs from doing harm; nothing where none ran."""
    if not sandbox:
        return ""
    network = "without a network" if sandbox["network"] else "not isolated from the network"
    processes = "could not" if sandbox["processes"] else "were not kept by the kernel from trying to"
    return f"\nPrograms ran {network} and {processes} start processes.\n"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing where it has no lines."""
    if not lines:
        return ""
    ruler = "|" + "|".join("---" if name in WORD_COLUMNS else "--:" for name in names) + "|"
    return "\n".join([markdown_line(names), ruler, *map(markdown_line, lines)]) + "\n"
