"""Tuning: what is predicted from a trace, what is run, and what is said where a budget cannot be met."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_head

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode import tune as tuning
from slipstream.decode.budget import Budget, Point
from slipstream.decode.costs import CostProbe, Costs
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import Record, compare
from slipstream.decode.fidelity import common_prefix
from slipstream.decode.frontier import gain
from slipstream.decode.policy import Policy
from slipstream.decode.recorder import record
from slipstream.decode.search import LARGEST, RULES, SHAPES, frontier, predict
from slipstream.decode.trace import Trace
from slipstream.decode.tree import TreeShape
from slipstream.decode.tune import _neighbours, tune
from slipstream.decode.verify import Token, Verifier
from slipstream.distill.heads import save_head
from slipstream.distill.target import load_target

PROMPTS = [{"question_id": i, "category": "", "turns": [text]} for i, text in enumerate(("Hi", "Yo", "hello", "Hi Yo"))]
FEW = (TreeShape(1, 2, 3), TreeShape(2, 2, 6), TreeShape(3, 1, 4))
EVEN = Costs(0.0, dict.fromkeys((1, 2, 3, 4, 6), (0.0, 0.0)), [2, 48], [0.01, 0.01], [0.0, 0.0], 0.0)


@pytest.fixture(scope="module")
def head_folder(tiny_target_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "draft"
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    save_head(tiny_head(target, target.vocab_size), folder, {})
    return folder


@pytest.fixture(scope="module")
def decoder(tiny_target_folder):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    return Decoder(target, HeadDrafter(tiny_head(target, target.vocab_size), target))


@pytest.fixture(scope="module")
def trace(decoder, tmp_path_factory):
    """A trace of the largest tree, and the acceptance length of the run."""
    path = tmp_path_factory.mktemp("trace") / "trace.arrow"
    large = Decoder(decoder.target, decoder.drafter, Policy(tree=LARGEST))
    with record(path, large) as recorder:
        ids = torch.randint(3, 250, (4, 8), generator=torch.Generator().manual_seed(0))
        stats = large.generate(ids, max_new_tokens=40, observer=recorder).stats
    return Trace.open(path), stats


def test_the_recorded_policy_is_predicted_as_it_was_recorded(trace):
    recorded, stats = trace
    points = predict(recorded, EVEN, [LARGEST], [Verifier("mars", "margin", 0.0)])
    lengths = torch.cat([rounds.counts[rounds.round > 0] for rounds in recorded.rounds()]).double()
    assert points[0].tau == pytest.approx(float(lengths.mean()))
    assert points[0].tau == pytest.approx(stats.acceptance_length, rel=0.1)  # which does not count what the end cut off
    assert (points[1].tau, points[1].regret, points[1].relaxed) == (points[0].tau, 0.0, 0.0)


def test_predictions_follow_the_costs_and_the_rule(trace):
    even = {p.shape: p for p in predict(trace[0], EVEN, SHAPES, []) if p.rule.lossless}
    largest = max(even.values(), key=lambda p: p.speed)
    assert largest.tau == max(p.tau for p in even.values())
    dear = Costs(0.0, dict.fromkeys((1, 2, 3, 4, 6), (0.0, 1.0)), [2, 48], [0.01, 0.01], [0.0, 0.0], 0.0)
    assert max(predict(trace[0], dear, SHAPES, []), key=lambda p: p.speed).shape.depth == 1
    wide = Costs(0.0, EVEN.drafting, [2, 48], [0.01, 10.0], [0.0, 0.0], 0.0)
    assert max(predict(trace[0], wide, SHAPES, []), key=lambda p: p.speed).shape.nodes == 2
    rules = [Verifier("mars", "margin", m) for m in (0.05, 0.2, 1.0)]
    taus = [p.tau for p in predict(trace[0], EVEN, [LARGEST], rules)]
    assert taus == sorted(taus)
    assert taus[0] < taus[-1]


def test_costs_add_up_and_lie_between_the_sizes_timed():
    costs = Costs(0.5, {2: (0.1, 0.2)}, [4, 8], [1.0, 2.0], [0.0, 1.0], 0.25)
    shape, relaxed = TreeShape(3, 2, 6), Verifier("mars", "margin", 0.5)
    assert costs.round(shape, Verifier()) == pytest.approx(0.1 + 2 * 0.2 + 2.0)
    assert costs.round(shape, relaxed) == pytest.approx(2.75)
    assert costs.speed(shape, relaxed, 2.0, 9) == pytest.approx(9 / (0.5 + 4 * 2.75))


def test_measured_costs_are_those_of_real_rounds(decoder):
    costs = CostProbe(decoder, [torch.randint(3, 250, (1, 8))]).measure()
    assert costs.nodes == sorted(set(costs.nodes))
    assert costs.prompt > 0
    assert all(seconds > 0 for seconds in (*costs.target, *costs.rest))
    assert all(first > 0 and further >= 0 for first, further in costs.drafting.values())


def test_costs_are_of_what_was_timed_since_and_stalls_raise_them_alike(decoder, monkeypatch):
    """With clocks wound by hand: the second time all takes twice as long, then one round stalls."""
    probe, factor = CostProbe(decoder, [torch.randint(3, 250, (1, 8))]), 1.0

    def run(shape, rule, tokens, clock=None):
        if clock is not None:
            clock.prompts.append(factor)
            clock.seconds += [(factor, 2 * factor, (3 if rule == "exact" else 4) * factor)] * 5

    monkeypatch.setattr(probe, "_run", run)
    before = probe.measure()
    assert (before.prompt, before.relaxing) == (1.0, 1.0)
    assert before.round(TreeShape(4, 3, 14), Verifier()) == pytest.approx(6.0)
    factor = 2.0
    probe.take(len(probe) // 2)
    probe.take(len(probe) - len(probe) // 2)
    after = probe.costs()
    assert after.prompt == 2.0
    assert after.round(TreeShape(4, 3, 14), Verifier()) == pytest.approx(12.0)
    clock = next(iter(probe._clocks.values()))
    clock.seconds.append((0.0, 0.1 * sum(np.sum(clock.seconds) for clock in probe._clocks.values()), 0.0))
    stalled = probe.costs()
    assert stalled.round(TreeShape(4, 3, 14), Verifier()) == pytest.approx(1.1 * 12.0, rel=0.01)
    assert stalled.target == pytest.approx([1.1 * 4.0] * len(stalled.target), rel=0.01)


def test_no_point_of_the_frontier_is_beaten(trace):
    points = predict(trace[0], EVEN, FEW, [Verifier("mars", "margin", m) for m in (0.1, 0.5, 2.0)])
    best = frontier(points)
    for point in points:
        better = [p for p in best if p.regret <= point.regret and p.speed >= point.speed]
        assert better


@pytest.mark.parametrize("budget", ["strict", "regret=0.5", "agreement=0"])
def test_the_chosen_policy_was_run_and_keeps_to_the_budget(decoder, budget):
    rules = [Verifier("mars", "margin", m) for m in (0.05, 0.2, 0.5)]
    limit = Budget.parse(budget)
    policy, rows = tune(decoder, PROMPTS, budget=limit, max_new_tokens=12, shapes=FEW, rules=rules)
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["confirmed"]
    assert chosen == policy.measured["chosen"]
    assert chosen["lossless"] is (limit.kind == "strict")
    assert replace(policy.tree, copied=0) in FEW
    assert policy.verify == Verifier()
    if limit.kind != "strict":
        assert replace(policy.relaxed, per_request=math.inf, regret=math.inf) in rules
        assert chosen["mean_regret_nats"] <= 0.5
    assert {row["confirmed"] for row in rows} == {True, False}
    ran = [row["label"] for row in rows if row["confirmed"]]
    assert len(set(ran)) == len(ran)
    exact = [row for row in rows if row["confirmed"] and row["lossless"]]
    assert exact
    assert all(row["agreement"] == 1 and row["mean_regret_nats"] == 0 for row in exact)
    here = policy.measured["exact"]  # what exact decoding gives with the very tree that was chosen
    assert here["lossless"]
    assert here["label"].partition(", depth")[2] == chosen["label"].partition(", depth")[2]
    assert here in [{**row, "chosen": here["chosen"]} for row in exact]
    over = policy.measured["chosen_over_exact"]
    assert over["speedup"] == pytest.approx(chosen["tokens_per_second"] / here["tokens_per_second"], rel=0.01)
    if limit.kind != "strict":  # all three thresholds ran on the tree that was chosen
        assert "times the tokens/s of exact decoding with its tree" in gain(policy.measured)
        assert policy.measured["relaxing_pays"] is (over["ci95"][0] > 1)
        tried = {row["label"] for row in rows if row["confirmed"]}
        assert tried >= {rule.label + here["label"].removeprefix("exact") for rule in rules}
    for point in (here, chosen):  # what a schedule makes of the tree is not foreseen
        told = point["schedule"] == "fixed"
        assert point["predicted_from"] == ("run" if told else None)
        assert (
            (point["predicted_tokens_per_second"] is not None)
            is (point["confirmed_over_predicted"] is not None)
            is told
        )
    searched = policy.measured["searched"]
    assert list(searched) == ["exact", "best"]
    assert searched["exact"]["label"].startswith("exact")
    for point in searched.values():
        ratio = point["tokens_per_second"] / point["predicted_tokens_per_second"]
        assert point["confirmed_over_predicted"] == pytest.approx(ratio, rel=0.01)
        assert point["confirmed_over_predicted_tau"] > 0


def test_the_neighbours_of_every_rule_are_the_next_thresholds_of_its_kind():
    for rule in RULES:
        near = _neighbours(rule, RULES)
        assert near
        for r in near:
            assert r != rule
            assert bool(r.price) == bool(rule.price)
            assert replace(r, signal=rule.signal, threshold=rule.theta, price=rule.price) == rule
    middle = Verifier("mars", "margin", 1.0, rank=3)
    assert [r.theta for r in _neighbours(middle, RULES)] == [0.5, 0.75, 1.5, 2.0]
    assert [r.theta for r in _neighbours(Verifier("mars", "ratio", 0.98), RULES)] == [0.9, 0.95]
    priced = Verifier("mars", "margin", 2.0, rank=4, price=2.0)
    assert [r.price for r in _neighbours(priced, RULES)] == [1.5, 1.75, 2.5, 3.0]


def test_what_kept_to_the_budget_stays_where_its_last_run_does_not(decoder, monkeypatch):
    rules, runs = [Verifier("mars", "margin", m) for m in (0.2, 0.5)], []

    def run(*given, **options):
        runs.append([replace(p, regret=0.5 * (len(runs) > 2) * (not p.rule.lossless)) for p in real(*given, **options)])
        return runs[-1]

    real = tuning._run
    monkeypatch.setattr(tuning, "_run", run)
    limit = Budget("regret", 0.1)
    policy, rows = tune(decoder, PROMPTS, budget=limit, max_new_tokens=8, shapes=FEW[:1], rules=rules)
    assert len(runs) in (4, 5)  # the last time also on the tree without copies, where another had come out
    assert policy.measured["chosen"]["mean_regret_nats"] == 0
    assert [row["label"] for row in rows if row["chosen"]] == [policy.measured["chosen"]["label"]]


def test_agreement_is_with_exact_decoding_in_the_same_tree(decoder):
    rule, shape = Verifier("mars", "margin", 0.2), FEW[1]
    here = Decoder(decoder.target, decoder.drafter, replace(decoder.policy, tree=shape))
    exact, ours = compare([(here, "exact"), (here, rule)], PROMPTS, max_new_tokens=16, label="")
    assert {len(a.outputs[0]) for a in (*exact, *ours)} == {16}
    kept = sum(common_prefix(a.outputs, b.outputs) for a, b in zip(exact, ours, strict=True))
    other = [replace(record, outputs=[[]]) for record in exact]  # another tree's, whatever it gave, is not looked at
    point = tuning._confirmed(Point(shape, rule, 1.0, 1.0, 0.0, 0.0), ours, other)
    assert point.agreement == kept / 64
    assert 0 < point.agreement < 1


def test_copies_that_take_the_rule_beyond_the_budget_lower_its_threshold(decoder, monkeypatch):
    """In place of the copies, which exact decoding would lose as well."""
    rules, real = [Verifier("mars", "margin", m) for m in (0.2, 0.5)], tuning._run

    def run(*given, **options):
        """The larger threshold is faster, copies even more so, and only both together lose anything."""
        return [
            replace(
                p,
                speed=100 * (1 + (p.rule.theta == 0.5) + 9 * (p.shape.copied > 0)),
                tau=1.0,
                regret=0.5 * (p.rule.theta == 0.5 and p.shape.copied > 0),
            )
            for p in real(*given, **options)
        ]

    monkeypatch.setattr(tuning, "_run", run)
    monkeypatch.setattr(Point, "slower", lambda *_: False)
    limit = Budget("regret", 0.1)
    policy, _ = tune(decoder, PROMPTS, budget=limit, max_new_tokens=8, shapes=FEW[:1], rules=rules)
    assert policy.tree.copied
    assert policy.relaxed == rules[0]
    assert policy.measured["exact"]["tree"] == policy.measured["chosen"]["tree"]


def relaxing(*turns):
    """A record of answers whose relaxed tokens have these regrets, each between exact ones."""
    tagged = [[t for r in regrets for t in (Token(1, "exact"), Token(2, "relaxed", r, r))] for regrets in turns]
    outputs = [[token.id for token in turn] for turn in tagged]
    return Record("all", tokens=sum(map(len, outputs)), outputs=outputs, tagged=[t for turn in tagged for t in turn])


@pytest.mark.parametrize(
    ("turns", "guards"),
    [
        ([[1.5], [1.5]], []),  # each turn is a request of its own
        ([[1.5, 0.4], []], []),
        ([[0.1], [1.5, 0.6]], ["2 nats a request"]),
        ([[0.1] * 5], []),
        ([[0.1] * 6], ["5 a request"]),
        ([[3.0] * 6], ["2 nats a request", "8 nats a request", "5 a request"]),
    ],
)
def test_only_guards_that_an_answer_ran_into_are_tried(turns, guards):
    point = Point(FEW[0], Verifier("mars", "margin", 2.0, rank=3), 1.0, 1.0, 0.0, 0.0, records=[relaxing(*turns)])
    tried = tuning._guarded(point)
    assert [p.rule.guarded for p in tried] == [f"mars margin 2, rank 3, {guard}" for guard in guards]
    assert {p.shape for p in tried} <= {point.shape}


@pytest.fixture
def staged(decoder, monkeypatch):
    """Tuning where one relaxed token a request is the only guard, and speed and regret are what a test says."""

    def run(rules, gives):
        def staged(*given, **options):
            return [replace(p, tau=1.0, **gives(p.rule)) for p in real(*given, **options)]

        monkeypatch.setattr(tuning, "_run", staged)
        limit = Budget("regret", 0.1)
        return tune(decoder, PROMPTS, budget=limit, max_new_tokens=24, shapes=FEW[1:2], rules=rules)

    real = tuning._run
    monkeypatch.setattr(tuning, "GUARDS", (("per_request", 1.0),))
    monkeypatch.setattr("slipstream.decode.costs._TOKENS", 8)  # speeds are given: few rounds need timing
    monkeypatch.setattr(Point, "slower", lambda *_: False)
    return run


TIGHT, LOOSE = (Verifier("mars", "margin", m, rank=3) for m in (0.5, 9.0))


def test_a_guard_that_costs_no_speed_and_spends_less_is_chosen(staged):
    def gives(rule):
        return {"speed": 100.0, "regret": 0.0 if rule.lossless else 0.02 if rule.per_request < math.inf else 0.05}

    policy, rows = staged([LOOSE], gives)
    assert policy.relaxed == replace(LOOSE, per_request=1.0)
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["rule"] == "mars margin 9, rank 3, 1 a request"
    assert policy.measured["chosen"] == chosen
    labels = [row["label"] for row in rows if row["confirmed"]]
    assert len(set(labels)) == len(labels)


def test_a_guard_that_costs_speed_is_not_chosen(staged):
    def gives(rule):
        free = rule.per_request == math.inf
        return {"speed": 100.0 if free else 80.0, "regret": 0.0 if rule.lossless else 0.05 if free else 0.02}

    policy, rows = staged([LOOSE], gives)
    assert policy.relaxed == LOOSE
    assert any(row["rule"].endswith("1 a request") for row in rows)


def test_where_only_the_budget_forbids_a_faster_threshold_it_is_tried_under_guards(staged):
    def gives(rule):
        if rule.theta < 9:  # exact decoding, and what the search comes to
            return {"speed": 100.0, "regret": 0.0 if rule.lossless else 0.05}
        return {"speed": 150.0, "regret": 0.2 if rule.per_request == math.inf else 0.06}

    policy, _ = staged([TIGHT, LOOSE], gives)
    assert policy.relaxed == replace(LOOSE, per_request=1.0)
    assert policy.measured["chosen"]["mean_regret_nats"] == 0.06


def test_a_final_point_is_foreseen_from_its_own_acceptance_length_and_answers():
    costs = Costs(0.5, {2: (0.1, 0.2)}, [4, 8], [1.0, 2.0], [0.0, 1.0], 0.25)
    records = [Record("all", tokens=18, outputs=[[1] * 10, [1] * 8])]
    point = Point(TreeShape(3, 2, 4, copied=2), Verifier(), 2.0, 2.0, 0.0, 0.0, records=records)
    told = tuning._foretold(point, costs)
    assert told.predicted == pytest.approx(9 / (0.5 + 4 * (0.1 + 2 * 0.2 + 2.0)))  # six nodes, answers of nine
    assert told.to_dict(False)["predicted_from"] == "run"
    assert told.to_dict(False)["confirmed_over_predicted"] == pytest.approx(2.0 / told.predicted, abs=5e-4)
    for other in (replace(point, schedule="cost"), replace(point, shape=TreeShape(3, 2, 4, copied=5))):
        assert tuning._foretold(other, costs).to_dict(False)["predicted_tokens_per_second"] is None


def test_a_budget_nothing_can_meet_names_the_nearest_point(decoder):
    loose = [Verifier("mars", "margin", 9.0, rank=3)]
    for budget in ("regret=0", "agreement=1"):
        with pytest.raises(
            SlipstreamError, match=rf"keeps to {budget} here; the nearest has .*margin 9, rank 3, depth"
        ):
            tune(decoder, PROMPTS, budget=Budget.parse(budget), max_new_tokens=16, shapes=FEW, rules=loose)


def test_answers_of_one_token_have_no_round_to_tune(decoder):
    with pytest.raises(SlipstreamError, match="max_new_tokens 2 or more, not 1"):
        tune(decoder, PROMPTS, budget=Budget("strict"), max_new_tokens=1)


def test_one_prompt_is_not_enough(decoder):
    with pytest.raises(SlipstreamError, match="at least 2 prompts"):
        tune(decoder, PROMPTS[:1], budget=Budget())


def test_the_command_writes_policy_and_frontier_and_keeps_the_trace(
    head_folder, tiny_target_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("slipstream.decode.tune.tune.__kwdefaults__", {**tune.__kwdefaults__, "shapes": FEW})
    prompts, trace = tmp_path / "prompts.jsonl", tmp_path / "trace.arrow"
    prompts.write_text("\n".join(json.dumps(row) for row in PROMPTS))
    command = ["tune", "--draft", str(head_folder), "--target", str(tiny_target_folder), "--dtype", "float32"]
    command += ["--prompts", str(prompts), "--max_new_tokens", "12", "--trace", str(trace)]
    assert main([*command, "--budget", "strict"]) == 0
    assert Policy.load(head_folder).measured["budget"] == "strict"
    frontier = json.loads((head_folder / "frontier.json").read_text())
    assert [row for row in frontier if row["chosen"]] == [Policy.load(head_folder).measured["chosen"]]
    assert re.search(r"\* *exact +\d/\d/\d", capsys.readouterr().err)
    before = trace.read_bytes()
    assert main([*command, "--budget", "strict"]) == 0
    assert trace.read_bytes() == before
    assert main([*command, "--budget", "lossless"]) == 2
    assert "unknown budget 'lossless'" in capsys.readouterr().err
