"""What a tuning found, for people: `frontier.json` beside a head's `decode.json`, its table, what relaxing gave in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from slipstream.decode.policy import Policy

    Row = dict[str, Any]

FILE = "frontier.json"


def save_frontier(folder: Path, rows: Sequence[Row]) -> None:
    """Write the points of a tuning into a head's folder."""
    write_atomic(folder / FILE, json.dumps(list(rows), indent=1) + "\n")


def load_frontier(folder: Path, policy: Policy) -> list[Row]:
    """The points that a head's policy was chosen from; none where they are not there, or are another tuning's.

    Raises:
        SlipstreamError: If the file cannot be read.
    """
    place = folder / FILE
    if not place.is_file():
        return []
    try:
        rows = json.loads(place.read_text(encoding="utf-8"))
        chosen = [row for row in rows if row["chosen"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SlipstreamError(f"{place} cannot be read; tune the head again, or delete it") from error
    return rows if chosen == [policy.measured.get("chosen")] else []


def frontier_table(points: Sequence[Row]) -> Table:
    """What was run, for the terminal; the chosen point is marked."""
    ran = [point for point in points if point["confirmed"]]
    scored = "recovery" in ran[0]
    caption = (
        "tree: depth/top-k/nodes+copied, and a schedule that is not fixed; regret: nats per token; foreseen: by the "
        "trace, or (~) by the acceptance length of the run itself"
    )
    table = Table("", "rule", box=None, caption=caption, caption_justify="left")
    table.add_column("tree", overflow="fold")
    for name in ("tok/s", "foreseen", "tau", "regret", "agreement", *(["score kept"] if scored else [])):
        table.add_column(name, justify="right", no_wrap=name != "score kept", overflow="fold")
    for p in ran:
        foreseen, by = p["predicted_tokens_per_second"], {"trace": "", "run": "~"}
        table.add_row(
            "*" if p["chosen"] else "",
            p["rule"],
            p["tree"] + (f" {p['schedule']}" if p["schedule"] != "fixed" else ""),
            f"{p['tokens_per_second']:.1f}",
            "-" if foreseen is None else f"{by[p['predicted_from']]}{foreseen:.1f}",
            f"{p['acceptance_length']:.2f}",
            f"{p['mean_regret_nats']:.4f}",
            f"{p['agreement']:.2f}",
            *([_kept(p)] if scored else []),
        )
    return table


def gain(measured: Row) -> str | None:
    """What relaxing gave beside exact decoding with the same tree and schedule, in words; None where nothing was relaxed."""
    if "chosen_over_exact" not in measured or measured["chosen"]["lossless"]:
        return None
    speedup, span = measured["chosen_over_exact"]["speedup"], measured["chosen_over_exact"]["ci95"]
    within = f" [{span[0]:.2f}, {span[1]:.2f}]" if span else ""
    words = f"{measured['chosen']['rule']} has {speedup:.2f}{within} times the tokens/s of exact decoding with its tree"
    if pays(span):
        return words
    if span and span[1] < 1:
        return f"{words}: relaxing does not pay here, exact decoding is faster"
    return f"{words}, which cannot be told from 1 on so few answers: as far as they tell, exact decoding is as fast"


def pays(span: Sequence[float] | None) -> bool:
    """Whether a ratio of speeds with this 95 % interval is above 1."""
    return span is not None and span[0] > 1


def _kept(point: Row) -> str:
    """The share of the exact task score, with its interval."""
    span = point["recovery_ci95"]
    return f"{point['recovery']:.3f}" + (f" ({span[0]:.2f}–{span[1]:.2f})" if span else "")
