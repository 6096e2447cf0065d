"""Results for people: the terminal's table, a model card's table, and one self-contained HTML page.

All three read `results.json`. Its optional parts (policy, frontier, training, distributions, samples, limits, and what
rows say of fidelity and scores) are left out of the page where they are absent; a row without a required key is a KeyError.
"""

from __future__ import annotations

import datetime
import importlib.util
import itertools
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.decode.columns import WORD_COLUMNS, fidelity_columns, score_columns
from slipstream.decode.drawing import apart, interval_text, pooled, rule_name
from slipstream.decode.figures import figures
from slipstream.decode.frontier import gain

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Row = dict[str, Any]

SUBJECTS = {"exact": "Exact decoding", "mars": "MARS"}
BASELINES = ("autoregressive", "engine")
WORDS = ("task", "rule", "output")  # the columns that hold words, not numbers
TAGS = ("exact", "relaxed", "bonus")


def require_figures() -> None:
    """Make sure, before anything is measured, that the report's figures can be drawn.

    Raises:
        SlipstreamError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SlipstreamError("the report needs matplotlib: pip install 'slipstream[report]'")


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write a self-contained HTML page, without network or scripts; `time_split` is seconds over all tokens of a row.

    Raises:
        KeyError: If a row lacks a required key.
        ValueError: If a sample's token has an unknown tag.
    """
    for token in itertools.chain.from_iterable(sample["tokens"] for sample in results.get("samples") or []):
        if token["tag"] not in TAGS:
            raise ValueError(f"token {token['text']!r} is tagged {token['tag']!r}; the tags are {', '.join(TAGS)}")
    rows, tasks = pooled(results), apart(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "name": rule_name}
    source = resources.files("slipstream.decode").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        results=results,
        date=results.get("date") or datetime.date.today().isoformat(),
        headline=headline(results),
        tables=_grouped_cells(rows),
        categories=_grouped_cells(tasks),
        figures=figures(results),
        gain=gain((results.get("policy") or {}).get("measured") or {}),
        fidelity=fidelity_columns([row for row in rows if row.get("compared_with")]),
        scores=score_columns([row for row in tasks or rows if row.get("scores")]),
        talks=_by_prompt(results.get("samples") or []),
        tags=TAGS,
        words=WORD_COLUMNS,
    )
    write_atomic(path, page)


def _by_prompt(samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Samples that answer the same prompt; `same` counts the tokens that each shares with the first before they part."""
    talks: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        beside = talks.setdefault(sample["prompt"], [])
        first = beside[0] if beside else sample
        pairs = zip(first["tokens"], sample["tokens"], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0]["id"] == pair[1]["id"], pairs))
        beside.append({**sample, "same": same})
    return talks


def results_table(results: dict[str, Any]) -> Table:
    """The table the terminal shows: one line per row, the relaxed rules below a rule of their own."""
    columns = {"task": "Task", "rule": "Rule", "temperature": "T", "rate": "tok/s", "speedup": "Speed-up"}
    columns |= {"interval": "95 %", "tau": "tau", "regret": "Regret", "length": "Length", "output": "Output"}
    title = Text(f"{results['target']} with {results['draft']}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for key, header in columns.items():
        table.add_column(header, justify="left" if key in WORDS else "right", no_wrap=key not in WORDS)
    for _, group in _grouped_cells(pooled(results)):
        for cells in group:
            table.add_row(*(Text(cells[key]) for key in columns))
        table.add_section()
    return table


def markdown_table(results: dict[str, Any]) -> str:
    """Tables for a model card, over all tasks; relaxed rules stand apart from the lossless ones."""
    return markdown_rows(pooled(results))


def markdown_rows(rows: list[Row]) -> str:
    """The same for any rows of `results.json`."""
    columns = {"task": "Task", "rule": "Rule", "temperature": "T", "rate": "Tokens/s", "speedup": "Speed-up"}
    columns |= {"interval": "95 % interval", "tau": "Acceptance length", "length": "Answer length"}
    blocks = []
    for title, group in _grouped_cells(rows):
        lossy = {"relaxed": "Relaxed tokens", "regret": "Regret (nats/token)"} if title.startswith("Relaxed") else {}
        shown = columns | lossy | {"output": "Output"}
        lines = [f"**{title}**", "", markdown_line(shown.values())]
        lines.append("|" + "|".join("---" if key in WORDS else "--:" for key in shown) + "|")
        lines += [markdown_line(cells[key] for key in shown) for cells in group]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def headline(results: dict[str, Any]) -> str:
    """What the rows say, in one plain sentence."""
    rules: dict[str, list[Row]] = {}
    for row in pooled(results):
        if row["rule"] not in BASELINES:
            rules.setdefault(row["rule"], []).append(row)
    if not rules:
        return "Only the baselines were measured; nothing was drafted."
    plain = [row for row in pooled(results) if row["rule"] == "autoregressive"]
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
        outputs = sorted({_output(row) for row in rows})
        if any(output.startswith("differs") for output in outputs):
            return "but did not give the same tokens in every answer"
        if "unchecked" in outputs:
            return "(its tokens were not compared with the target’s)"
        if "sampled" in outputs:
            return "and keeps the target’s distribution"
        return f"and gives the same tokens{outputs[-1].removeprefix('same')}"
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
        "rule": rule_name(row),
        "temperature": f"{row['temperature']:g}",
        "rate": _number(row["tokens_per_second"], 1),
        "speedup": _number(row["speedup"], 2, "×"),
        "interval": "–" if row["rule"] == "autoregressive" else interval_text(row["speedup_ci95"]),
        "engine": _number(row["speedup_engine"], 2, "×"),
        "tau": _number(row["acceptance_length"], 2),
        "relaxed": "–" if row["relaxed_share"] is None else f"{row['relaxed_share']:.1%}",
        "regret": _number(row["mean_regret_nats"], 3),
        "length": _number(row["mean_output_tokens"], 0),
        "prompts": f"{row['prompts']}",
        "tokens": f"{row['tokens']:,}",
        "output": _output(row),
    }


def _output(row: Row) -> str:
    """How a row's output relates to the target's own."""
    if not row["lossless"]:
        return "relaxed"
    if row["temperature"] > 0:
        return "sampled"
    word = {True: "same", False: "differs", None: "unchecked"}[row["identical_to_target"]]
    checked = row.get("identity_dtype")  # where it was found out in a run of its own
    return f"{word} in {checked}" if checked and word != "unchecked" else word


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def markdown_line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
