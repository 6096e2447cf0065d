"""Budgets of fidelity: what they admit, what is said where they cannot be met, and the share of a task score kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_tasks import GSM8K, write
from test_tune import FEW, PROMPTS
from tiny import tiny_head

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.budget import Budget, Point
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import Record, answer
from slipstream.decode.policy import Policy
from slipstream.decode.scores import rouge_l
from slipstream.decode.tune import tune
from slipstream.decode.verify import Verifier
from slipstream.distill.heads import save_head
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 16
RULES = [Verifier("mars", "margin", m) for m in (0.05, 0.2, 0.5)]
EXACT = Point(FEW[0], Verifier(), 10.0, 1.5, 0.0, 0.0, confirmed=True, records=[Record("all", 100, 10.0)])
MARS = replace(EXACT, rule=RULES[2], regret=0.02, agreement=0.8, recovery=0.981)


@pytest.fixture(scope="module")
def decoder(tiny_target_folder):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    return Decoder(target, HeadDrafter(tiny_head(target, target.vocab_size), target))


def said(decoder: Decoder, rule: str | Verifier, row: dict[str, Any]) -> str:
    """A rule's answer to a prompt, as text."""
    (text,) = answer(decoder, rule, row, max_new_tokens=TOKENS).texts(decoder.target.chat_tokenizer)
    return text


@pytest.fixture(scope="module")
def referenced(decoder) -> list[dict[str, Any]]:
    """Prompts whose references are what exact decoding answers."""
    return [{**row, "reference": [said(decoder, "exact", row)]} for row in PROMPTS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strickt", "did you mean 'strict'"),
        ("strict=1", "takes no number"),
        ("regret", "needs a number: regret=0.02"),
        ("regret=low", "needs a number"),
        ("regret=-1", "out of range"),
        ("agreement=98", "out of range"),
        ("agreement=nan", "out of range"),
        ("task", "needs a number: task=0.98"),
        ("task=1.01", "out of range"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(text, message):
    with pytest.raises(SlipstreamError, match=message):
        Budget.parse(text)


def test_budgets_are_read():
    assert Budget.parse("strict") == Budget()
    assert Budget.parse("regret=0.02") == Budget("regret", 0.02)
    assert str(Budget.parse("agreement=0.98")) == "agreement=0.98"
    assert str(Budget.parse("task=0.981")) == "task=0.981"


@pytest.mark.parametrize(
    ("just", "too_strict"),
    [("regret=0.02", "regret=0.0199"), ("agreement=0.8", "agreement=0.81"), ("task=0.981", "task=0.982")],
)
def test_a_point_keeps_to_a_budget_up_to_its_last_digit(just, too_strict):
    assert Budget.parse(just).met(MARS)
    assert not Budget.parse(too_strict).met(MARS)
    assert not Budget.parse(just).met(EXACT)
    assert Budget().met(EXACT)
    assert not Budget().met(MARS)


def test_the_fastest_within_a_budget_is_chosen_or_the_nearest_named():
    faster = replace(MARS, speed=11.0, records=[Record("all", 110, 10.0)])
    loose = replace(MARS, speed=12.0, recovery=0.97, rule=RULES[0], records=[Record("all", 120, 10.0)])
    assert Budget.parse("task=0.98").choose([EXACT, MARS, faster, loose]) is faster
    with pytest.raises(SlipstreamError, match=r"keeps to task=0.99 here; the nearest has 0.981 .* margin 0.5, depth"):
        Budget.parse("task=0.99").choose([EXACT, loose, MARS])


def test_of_points_as_fast_as_the_fastest_the_one_that_accepts_most_is_chosen():
    def ran(seconds: list[float], tau: float) -> Point:
        records = [Record("all", 10, each) for each in seconds]
        return replace(MARS, speed=10 * len(records) / sum(seconds), tau=tau, records=records)

    fastest = ran([1.0, 1.1, 0.9, 1.0], 1.6)
    alike = ran([0.99, 1.15, 0.88, 1.03], 2.0)  # now faster, now slower
    slower = ran([1.04, 1.15, 0.95, 1.05], 2.5)  # by a twentieth, on every prompt
    assert Budget("regret", 0.02).choose([fastest, slower, alike]) is alike
    assert Budget("regret", 0.02).choose([fastest, slower]) is fastest
    erratic = ran([0.7, 1.7, 0.7, 1.2], 2.5)  # nobody can say, but its pooled speed is a fourteenth lower
    assert not erratic.slower(fastest)
    assert Budget("regret", 0.02).choose([fastest, erratic]) is fastest


def test_fidelity_that_buys_no_longer_rounds_is_not_spent():
    def ran(rule: Verifier, tau: float, regret: float) -> Point:
        return replace(MARS, rule=rule, tau=tau, regret=regret)

    tight, middle, loose = (
        ran(rule, *gave) for rule, gave in zip(RULES, ((1.8, 0.001), (1.97, 0.01), (2.0, 0.02)), strict=True)
    )
    budget = Budget("regret", 0.02)
    assert budget.choose([EXACT, tight, middle, loose]) is middle
    assert budget.choose([EXACT, tight, loose]) is loose  # whose rounds are longer by a tenth
    longer = replace(EXACT, tau=1.51)
    assert Budget().choose([EXACT, longer, loose]) is longer  # nothing to lose: the longest


def test_a_point_says_what_it_is():
    point = Point(FEW[1], Verifier("mars", "margin", 0.5, rank=3, per_round=1), 10.0, 1.5, 0.01, 0.1, "cost")
    assert point.label == "mars margin 0.5, rank 3, 1 a round, depth 2, top-k 2, 6 nodes, cost"
    assert "recovery" not in point.to_dict(False)
    ones = [Verifier("mars", **{name: 1.0}) for name in ("per_round", "per_request", "regret")]
    assert len({replace(point, rule=rule).label for rule in (Verifier("mars"), *ones)}) == 4


def test_the_share_of_the_task_score_is_that_of_the_answers_themselves(decoder, referenced):
    budget = Budget("task", 0.3)
    policy, rows = tune(decoder, referenced, budget=budget, max_new_tokens=TOKENS, shapes=FEW, rules=RULES)
    chosen, exact = policy.measured["chosen"], policy.measured["exact"]
    tuned, confirm = Decoder(decoder.target, decoder.drafter, policy), referenced[1::2]
    scores = [rouge_l(row["reference"][0], said(tuned, policy.relaxed, row)) for row in confirm]
    assert chosen["recovery"] == pytest.approx(sum(scores) / len(confirm), abs=1e-4)
    assert chosen["recovery"] >= budget.value
    assert chosen["scores"]["rouge_l"]["prompts"] == policy.measured["prompts"] == len(confirm)
    assert chosen["scores"]["rouge_l"]["difference"] == pytest.approx(chosen["recovery"] - 1, abs=1e-4)
    assert exact["recovery"] == exact["scores"]["rouge_l"]["mean"] == 1.0
    assert all(("recovery" in row) is row["confirmed"] for row in rows)


def test_a_share_nothing_keeps_names_the_nearest(decoder, referenced, monkeypatch):
    monkeypatch.setattr(
        "slipstream.decode.scores.score", lambda row, turns: {"same": float(turns[0] == row["reference"][0])}
    )
    loose = [Verifier("mars", "margin", 9.0, rank=3)]
    with pytest.raises(SlipstreamError, match=r"keeps to task=1 here; the nearest has 0\.\d+ of the exact score: mars"):
        tune(decoder, referenced, budget=Budget("task", 1.0), max_new_tokens=TOKENS, shapes=FEW, rules=loose)


def test_where_exact_decoding_scores_nothing_there_is_nothing_to_keep(decoder):
    rows = [{**row, "reference": ["#### 123456789"]} for row in PROMPTS]
    with pytest.raises(SlipstreamError, match="exact decoding scores 0 on all 2 prompts") as caught:
        tune(decoder, rows, budget=Budget("task", 0.9), max_new_tokens=4, shapes=FEW, rules=RULES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GSM8K, {"turns": ["Hi"]}], "mine.jsonl:3: no reference; --budget task needs"),
        (None, "prompts_tune.jsonl:1: no reference; --budget task needs"),
    ],
)
def test_a_row_without_a_reference_is_named_before_anything_is_loaded(decoder, tmp_path, capsys, rows, message):
    save_head(decoder.drafter.head, tmp_path / "draft", {})
    capsys.readouterr()
    command = ["tune", "--draft", str(tmp_path / "draft"), "--target", "nowhere/at-all", "--budget", "task=0.98"]
    assert main([*command, *(["--prompts", str(write(tmp_path, *rows))] if rows else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_command_takes_task_files_and_writes_what_was_kept(
    decoder, referenced, tiny_target_folder, tmp_path: Path, capsys, monkeypatch
):
    few = {"shapes": FEW, "rules": RULES}
    monkeypatch.setattr("slipstream.decode.tune.tune.__kwdefaults__", {**tune.__kwdefaults__, **few})
    save_head(decoder.drafter.head, tmp_path / "draft", {})
    files = [write(tmp_path, *referenced[:3], name="one"), write(tmp_path, *referenced[3:], GSM8K, name="two")]
    command = ["tune", "--draft", str(tmp_path / "draft"), "--target", str(tiny_target_folder), "--dtype", "float32"]
    command += ["--prompts", *map(str, files), "--max_new_tokens", str(TOKENS), "--budget", "task=0.1"]
    assert main(command) == 0
    measured = Policy.load(tmp_path / "draft").measured
    assert (measured["budget"], measured["prompts"]) == ("task=0.1", 2)
    assert measured["chosen"]["recovery"] >= 0.1
    assert set(measured["chosen"]) >= {"recovery", "recovery_ci95", "scores"}
    assert "kept" in capsys.readouterr().err
