"""The frontier of a tuning: kept beside the policy it was for, shown in that head's report, and told in words."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reported import full_results
from rich.console import Console
from tiny import tiny_head

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.budget import Point
from slipstream.decode.frontier import FILE, frontier_table, gain, load_frontier, save_frontier
from slipstream.decode.policy import Policy
from slipstream.decode.report import write_report
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.heads import save_head
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = TreeShape(2, 2, 6)
EXACT = Point(SHAPE, Verifier(), 20.0, 1.5, 0.0, 0.0, predicted=21.0, basis="trace", confirmed=True)
MARS = Point(SHAPE, Verifier("mars", "margin", 0.5), 24.0, 1.8, 0.01, 0.1, predicted=25.0, basis="run", confirmed=True)
FORESEEN = Point(SHAPE, Verifier("mars", "margin", 0.2), 22.0, 1.6, 0.005, 0.05)
ROWS = [FORESEEN.to_dict(False), EXACT.to_dict(False), MARS.to_dict(True)]
POLICY = Policy(SHAPE, relaxed=MARS.rule, measured={"chosen": MARS.to_dict(True)})


def over(speedup: float, span: list[float] | None, **chosen: Any) -> dict[str, Any]:
    """What `decode.json` has of a tuning."""
    return {"chosen": {**MARS.to_dict(True), **chosen}, "chosen_over_exact": {"speedup": speedup, "ci95": span}}


def test_a_frontier_is_read_back_for_its_own_policy_alone(tmp_path: Path) -> None:
    assert load_frontier(tmp_path, POLICY) == []
    save_frontier(tmp_path, ROWS)
    assert load_frontier(tmp_path, POLICY) == ROWS
    assert load_frontier(tmp_path, Policy()) == []  # tuned since then by other means, or by hand
    assert load_frontier(tmp_path, Policy(measured={"chosen": EXACT.to_dict(True)})) == []


@pytest.mark.parametrize("text", ['[{"label": ', "[1]", "{}{}", '[{"label": "exact"}]'])
def test_a_damaged_frontier_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(SlipstreamError, match=rf"{FILE} cannot be read"):
        load_frontier(tmp_path, POLICY)


@pytest.mark.parametrize(
    ("speedup", "span", "told"),
    [
        (1.12, [1.03, 1.2], None),
        (1.05, [0.98, 1.1], "exact decoding is as fast"),
        (1.3, None, "exact decoding is as fast"),  # a single prompt tells nothing
        (0.9, [0.85, 0.97], "exact decoding is faster"),
    ],
)
def test_where_relaxing_does_not_pay_it_is_said(tmp_path: Path, speedup, span, told) -> None:
    words = gain(over(speedup, span))
    assert words is not None
    assert words.startswith("mars margin 0.5 has ")
    assert f"{speedup:.2f}" in words
    assert words.endswith(told or "times the tokens/s of exact decoding with its tree")
    write_report(tmp_path / "report.html", {**full_results(), "policy": {"measured": over(speedup, span)}})
    assert f"On the prompts it was tuned with, {words}." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_of_exact_decoding_nothing_is_gained() -> None:
    assert gain({}) is None
    assert gain(over(1.0, [1.0, 1.0], lossless=True)) is None


def test_the_table_holds_what_was_run_and_says_what_speeds_were_foreseen_from() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(frontier_table(ROWS))
    text = console.file.getvalue()
    assert "mars margin 0.2" not in text  # only foreseen
    assert " 21.0 " in text
    assert " ~25.0 " in text


def test_evaluate_shows_the_frontier_of_the_heads_policy(tiny_target_folder, tmp_path: Path) -> None:
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    folder, asked = tmp_path / "draft", tmp_path / "asked.jsonl"
    save_head(tiny_head(target, target.vocab_size), folder, {})
    POLICY.save(folder)
    save_frontier(folder, ROWS)
    asked.write_text('{"turns": ["Hi"]}')
    command = ["evaluate", "--draft", str(folder), "--target", str(tiny_target_folder), "--prompts", str(asked)]
    command += ["--max_new_tokens", "4", "--rules", "exact", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["frontier"] == ROWS
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "Speed against fidelity" in page
    assert MARS.label in page
    (folder / FILE).unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert main([*command, str(tmp_path / "one")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert main([*command, str(tmp_path / "two")]) == 0
    assert "frontier" not in json.loads((tmp_path / "two" / "results.json").read_text())
