"""The fastest policy within a budget of fidelity: searched on a trace with this device's costs, confirmed by real runs.

Tokens per second are predicted from rounds replayed on the contexts of the trace. A policy that accepts other tokens comes
to other contexts, so its acceptance length is an estimate; what is chosen was run, on prompts the trace does not hold.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.decode.budget import NEARLY, Point
from slipstream.decode.costs import PROBES, CostProbe
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import compare, interval
from slipstream.decode.recorder import record
from slipstream.decode.replay import check, cut, judge
from slipstream.decode.sandbox import isolation
from slipstream.decode.scores import recovery, score_means, score_records
from slipstream.decode.speculation import SCHEDULES, Speculation
from slipstream.decode.tasks import encode_first
from slipstream.decode.trace import Trace
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slipstream.decode.budget import Budget
    from slipstream.decode.costs import Costs
    from slipstream.decode.evaluate import Record
    from slipstream.decode.policy import Policy
    from slipstream.decode.trace import Rounds
    from slipstream.decode.tree import Tree

LARGEST = TreeShape(6, 6, 48)
"""The tree a trace is recorded with; those searched are parts of it."""

SHAPES = tuple(
    TreeShape(depth, top_k, nodes)
    for top_k in sorted({shape.top_k for shape in PROBES})
    for depth in range(1, LARGEST.depth + 1)
    for nodes in sorted({*(4, 6, 8, 10, 12, 16, 20, 24, 32), 1 + top_k, 1 + depth})
    if max(depth, top_k) < nodes <= 1 + top_k + (depth - 1) * top_k**2
)
RULES = (
    *(
        Verifier("mars", "margin", m, rank=rank, per_round=most)
        for m in (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        for rank in (2, 3)
        for most in (float("inf"), 1)
    ),
    *(Verifier("mars", "ratio", r, per_round=most) for r in (0.98, 0.95, 0.9, 0.85) for most in (float("inf"), 1)),
)
"""Relaxed rules; greedily, `odds` rho is `margin` -log rho."""

COPIES = (3, 5, 8)
"""Copied nodes tried beside the best tree."""

_WIDELY = 16  # trees that all rules are tried on
_PASSES = 2  # times that every probe is timed between the answers of a run
_RUNS = 3  # points that are run beside the fastest exact one
_NEIGHBOURS = 2  # thresholds on either side of the chosen one that are run on its tree


def tune(
    decoder: Decoder,
    prompts: Sequence[dict[str, Any]],
    *,
    budget: Budget,
    max_new_tokens: int = 96,
    trace: Path | None = None,
    shapes: Sequence[TreeShape] = SHAPES,
    rules: Sequence[Verifier] = RULES,
) -> tuple[Policy, list[dict[str, Any]]]:
    """The fastest policy within the budget.

    Args:
        decoder: Target and draft; its policy is the starting point.
        prompts: Held-out prompt rows; every other one is recorded, the rest are run. For a task budget they must have
            references.
        budget: Of fidelity.
        max_new_tokens: Per turn.
        trace: Where to keep the trace; one that is there is taken as it is.
        shapes: Trees to try, parts of `LARGEST`.
        rules: Relaxed rules to try.

    Returns:
        The tuned policy, and the frontier: predicted points that no other beats in speed and regret, and those run.

    Raises:
        SlipstreamError: If nothing that was run is within the budget (the nearest point is named); or, under a task budget,
            if programs cannot be scored here or exact decoding scores 0.
    """
    if len(prompts) < 2:
        raise SlipstreamError("tuning needs at least 2 prompts: one half is recorded, the other is run")
    if max_new_tokens < 2:
        raise SlipstreamError(
            f"tuning needs answers with a draft in them: max_new_tokens 2 or more, not {max_new_tokens}"
        )
    score = budget.kind == "task"
    sandbox = isolation() if score and any("test" in row for row in prompts) else None  # or an error, before the work
    with tempfile.TemporaryDirectory() as folder:
        recorded = _recorded(decoder, prompts[::2], trace or Path(folder) / "trace.arrow", max_new_tokens)
        probe = CostProbe(decoder, [_prompt(decoder, row) for row in prompts])
        points, length = predict(recorded, probe.measure(), shapes, rules), recorded.mean_tokens()
    best, others = frontier(points), prompts[1::2]
    foreseen = _candidates(points, best, budget)
    # A machine's speed drifts: what is run is held against what rounds timed in between foresee.
    share = math.ceil(_PASSES * len(probe) / len(others))
    ran = _run(decoder, foreseen, others, max_new_tokens, score, between=partial(probe.take, share))
    costs = probe.costs()
    foreseen = [replace(p, speed=costs.speed(p.shape, p.rule, p.tau, length)) for p in foreseen]
    ran = [replace(point, predicted=before.speed) for point, before in zip(ran, foreseen, strict=True)]
    fixed = budget.choose(ran)
    compared = {"exact": (ran[0], foreseen[0]), "chosen": (fixed, foreseen[ran.index(fixed)])}
    options = (others, max_new_tokens, score)
    # What a trace does not tell is run: copies from the text beside two trees, then the best under schedules. They may take
    # the rule beyond the budget: which of its thresholds keeps to it is found out last, on the tree that came out.
    trees = dict.fromkeys([fixed.shape, _longest(points)])
    copied = [replace(fixed, shape=replace(shape, copied=count)) for shape in trees for count in COPIES]
    ran, again = _further(decoder, ran, [ran[0], fixed], copied, *options)
    copying = budget.best([point for point in again if point.rule == fixed.rule])
    scheduled = [replace(copying, schedule=name) for name in SCHEDULES if name != "fixed"]
    ran, again = _further(decoder, ran, [ran[0], copying], scheduled, *options)
    exact = chosen = budget.best([point for point in again if point.rule == fixed.rule])
    if not fixed.rule.lossless:
        ran, exact, chosen = _within(decoder, ran, chosen, fixed, budget, rules, options)
    speedup, span = interval(exact.records, chosen.records, seed=0)
    measured = {
        "budget": str(budget),
        "prompts": len(others),
        "max_new_tokens": max_new_tokens,
        "think": decoder.target.think,
        "compiled": bool(decoder.target.compiled),
        "exact": exact.to_dict(chosen is exact),
        "chosen": chosen.to_dict(True),
        "chosen_over_exact": {"speedup": round(speedup, 3), "ci95": span},
        "confirmed_over_predicted": {key: round(a.speed / b.speed, 3) for key, (a, b) in compared.items()},
        "confirmed_over_predicted_tau": {key: round(a.tau / b.tau, 3) for key, (a, b) in compared.items()},
        "costs": asdict(costs),
        **({"sandbox": sandbox.to_dict()} if sandbox else {}),
    }
    rows = [*(point.to_dict(False) for point in best), *(point.to_dict(point.label == chosen.label) for point in ran)]
    return replace(chosen.apply(decoder.policy), measured=measured), rows


def _recorded(decoder: Decoder, prompts: Sequence[dict[str, Any]], place: Path, max_new_tokens: int) -> Trace:
    """The trace in `place`, of exact rounds with the largest tree; made where there is none. Another head's is refused."""
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        policy = replace(decoder.policy, tree=LARGEST, speculation=Speculation())
        record_exact(Decoder(decoder.target, decoder.drafter, policy), prompts, place, max_new_tokens)
    return Trace.open(place, decoder)


def _further(
    decoder: Decoder,
    ran: Sequence[Point],
    paired: Sequence[Point],
    points: Sequence[Point],
    prompts: Sequence[dict[str, Any]],
    max_new_tokens: int,
    score: bool,
) -> tuple[list[Point], list[Point]]:
    """Run points beside an exact one and the best so far: all that ran, each as it last did, and those of this time.

    What was foreseen was so for another moment of this machine.
    """
    fresh = [replace(point, predicted=None) for point in dict.fromkeys([*paired, *points])]
    again = _run(decoder, fresh, prompts, max_new_tokens, score)
    labels = {point.label for point in again}
    return [again[0], *(point for point in ran if point.label not in labels), *again[1:]], again


def _within(
    decoder: Decoder,
    ran: list[Point],
    best: Point,
    fixed: Point,
    budget: Budget,
    rules: Sequence[Verifier],
    options: tuple[Sequence[dict[str, Any]], int, bool],
) -> tuple[list[Point], Point, Point]:
    """On the best tree, the threshold that keeps to the budget: all that ran, exact decoding there, and what was chosen.

    Where none does, on the tree of a point that did. A schedule that goes by the clock, or another exact text in bf16, may
    put all of them outside even so; that point stays then.
    """
    exact = fixed
    for tree in {point.label: point for point in (best, fixed)}.values():
        near = [replace(tree, rule=rule) for rule in _neighbours(tree.rule, rules)]
        ran, again = _further(decoder, ran, [replace(tree, rule=Verifier()), tree], near, *options)
        exact = again[0]
        if any(map(budget.met, again)):
            return ran, exact, budget.choose(again)
    return ran, exact, fixed


def _neighbours(rule: Verifier, rules: Sequence[Verifier]) -> list[Verifier]:
    """Rules that differ from a relaxed one in nothing but the threshold, the nearest on either side."""
    same = (r for r in rules if r.signal == rule.signal and replace(rule, threshold=r.theta) == r)
    ladder = sorted(same, key=lambda r: r.theta)
    place = ladder.index(rule)
    return [r for r in ladder[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1] if r != rule]


def _prompt(decoder: Decoder, row: dict[str, Any]) -> Tensor:
    """The first turn of a prompt row, [1, n]."""
    return torch.tensor([encode_first(decoder.target, row)], device=decoder.target.device)


def record_exact(decoder: Decoder, prompts: Sequence[dict[str, Any]], path: Path, max_new_tokens: int) -> None:
    """Decode the prompts' first turns exactly and greedily into a trace."""
    with record(path, decoder) as recorder, progress("trace", len(prompts), "prompts") as advance:
        for row in prompts:
            ids = _prompt(decoder, row)
            decoder.generate(ids, max_new_tokens=max_new_tokens, verify="exact", observer=recorder)
            advance()


def predict(
    trace: Trace, costs: Costs, shapes: Sequence[TreeShape] = SHAPES, rules: Sequence[Verifier] = RULES
) -> list[Point]:
    """Exact decoding with every tree, and every relaxed rule with the best of them.

    Raises:
        SlipstreamError: If the trace cannot tell.
    """
    chunks, length = list(trace.rounds()), trace.mean_tokens()
    for shape in shapes:
        check(trace.header, Verifier(), shape)
    trees = {shape: [cut(rounds, trace.header.tree, shape)[0] for rounds in chunks] for shape in shapes}

    def foresee(shape: TreeShape, rule: Verifier) -> Point:
        return _foresee(trace, list(zip(chunks, trees[shape], strict=True)), shape, rule, costs, length)

    with progress("search", len(shapes) + _WIDELY * len(rules), "policies") as advance:
        points = []
        for shape in shapes:
            points.append(foresee(shape, Verifier()))
            advance()
        good = sorted(points, key=lambda point: -point.speed)[:_WIDELY]
        for point, rule in itertools.product(good, rules):
            points.append(foresee(point.shape, rule))
            advance()
    return points


def _foresee(
    trace: Trace,
    chunks: Sequence[tuple[Rounds, Tree]],
    shape: TreeShape,
    rule: Verifier,
    costs: Costs,
    length: float,
) -> Point:
    """What a policy should give on texts like the recorded ones."""
    replayed = drafted = emitted = relaxed = 0
    regret = 0.0
    for rounds, tree in chunks:
        decision = judge(rounds, tree, rule, trace.header)
        first = rounds.round == 0
        lossy = (decision.tags == 1) & (torch.arange(decision.tags.shape[1]) < decision.counts[:, None])
        drafted += int((~first).sum())
        emitted += int(decision.counts[~first].sum())
        replayed += int(decision.counts.sum())
        relaxed += int(lossy.sum())
        regret += float(decision.regrets[lossy].sum())
    tau = emitted / drafted if drafted else 1.0
    return Point(shape, rule, costs.speed(shape, rule, tau, length), tau, regret / replayed, relaxed / replayed)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both speed and regret, by regret."""
    out: list[Point] = []
    for point in sorted(points, key=lambda point: (point.regret, -point.speed)):
        if not out or point.speed > out[-1].speed:
            out.append(point)
    return out


def _longest(points: Sequence[Point]) -> TreeShape:
    """Of the trees that exact decoding should be nearly as fast with as with the fastest, the one that accepts most."""
    exact = [point for point in points if point.rule.lossless]
    least = NEARLY * max(point.speed for point in exact)
    return max((point for point in exact if point.speed >= least), key=lambda point: point.tau).shape


def _candidates(points: Sequence[Point], best: Sequence[Point], budget: Budget) -> list[Point]:
    """Which points to run: the fastest exact one first, then the most promising ones of the budget's kind."""
    exact, relaxed = ([p for p in points if p.rule.lossless is kind] for kind in (True, False))
    exact.sort(key=lambda point: -point.speed)
    relaxed.sort(key=lambda point: -point.speed)
    if budget.kind == "strict":
        return exact[: 1 + _RUNS]
    cautious = min(relaxed, key=lambda point: (point.regret, -point.speed))
    if budget.kind == "regret":
        chosen = [point for point in relaxed if point.regret <= budget.value][:_RUNS]
    else:
        line = [point for point in best if not point.rule.lossless]
        chosen = [line[i * (len(line) - 1) // max(1, _RUNS - 1)] for i in range(_RUNS)] if line else []
    return [exact[0], *dict.fromkeys([*chosen, cautious])]


def _run(
    decoder: Decoder,
    points: Sequence[Point],
    prompts: Sequence[dict[str, Any]],
    max_new_tokens: int,
    score: bool,
    between: Callable[[], None] | None = None,
) -> list[Point]:
    """The points as they turn out in real runs; the first is exact."""
    variants = [Decoder(decoder.target, decoder.drafter, point.apply(decoder.policy)) for point in points]
    pairs = [(variant, point.rule) for variant, point in zip(variants, points, strict=True)]
    records = compare(pairs, prompts, max_new_tokens=max_new_tokens, label="confirm", between=between)
    if score:
        score_records(decoder.target, prompts, records)
        if not any(sum(record.scores.values()) for record in records[0]):
            raise SlipstreamError(
                f"exact decoding scores 0 on all {len(prompts)} prompts that were run: there is nothing to keep; give "
                "prompts that the target answers rightly, more --max_new_tokens, or another budget"
            )
    return [_confirmed(point, group, records[0]) for point, group in zip(points, records, strict=True)]


def _confirmed(point: Point, records: Sequence[Record], exact: Sequence[Record]) -> Point:
    """The point as it ran; `exact` is whose task scores it is told against.

    Its agreement is with exact decoding in the same tree, which gives the same tokens up to the first relaxed one and
    another one there. (The tokens of another tree are rounded otherwise, and part without any relaxation.)
    """
    tokens = sum(r.tokens for r in records)
    lengths = [n for r in records for n in r.accept_lengths]
    same = sum(next((i for i, t in enumerate(r.tagged) if t.tag == "relaxed"), r.tokens) for r in records)
    point = replace(
        point,
        speed=tokens / sum(r.seconds for r in records),
        tau=sum(lengths) / len(lengths) if lengths else 1.0,
        regret=sum(r.regret for r in records) / tokens,
        relaxed=sum(r.relaxed for r in records) / tokens,
        predicted=point.predicted if point.confirmed else point.speed,
        agreement=same / tokens,
        confirmed=True,
        records=records,
    )
    scores = score_means(exact, records, seed=0)
    if not scores:
        return point
    kept, span = recovery(exact, records, seed=0)
    return replace(point, recovery=kept, recovery_ci95=span, scores=scores)


def frontier_table(points: Sequence[dict[str, Any]]) -> Table:
    """What was run, for the terminal; the chosen point is marked."""
    ran = [point for point in points if point["confirmed"]]
    scored = "recovery" in ran[0]
    caption = "tree: depth/top-k/nodes+copied, and a schedule that is not fixed; regret: nats per token"
    table = Table("", "rule", box=None, caption=caption, caption_justify="left")
    table.add_column("tree", overflow="fold")
    for name in ("tok/s", "foreseen", "tau", "regret", "agreement", *(["score kept"] if scored else [])):
        table.add_column(name, justify="right", no_wrap=name != "score kept", overflow="fold")
    for p in ran:
        foreseen = p["predicted_tokens_per_second"]
        table.add_row(
            "*" if p["chosen"] else "",
            p["rule"],
            p["tree"] + (f" {p['schedule']}" if p["schedule"] != "fixed" else ""),
            f"{p['tokens_per_second']:.1f}",
            "-" if foreseen is None else f"{foreseen:.1f}",
            f"{p['acceptance_length']:.2f}",
            f"{p['mean_regret_nats']:.4f}",
            f"{p['agreement']:.2f}",
            *([_kept(p)] if scored else []),
        )
    return table


def gain(policy: Policy) -> str:
    """What relaxing gives beside exact decoding with the same tree and schedule, in words."""
    measured = policy.measured
    speedup, span = measured["chosen_over_exact"]["speedup"], measured["chosen_over_exact"]["ci95"]
    within = f" [{span[0]:.2f}, {span[1]:.2f}]" if span else ""
    words = f"{policy.relaxed.label} has {speedup:.2f}{within} times the tokens/s of exact decoding with its tree"
    told = span is not None and not span[0] <= 1 <= span[1]
    return words if told else f"{words}, which cannot be told from 1 on so few answers"


def _kept(point: dict[str, Any]) -> str:
    """The share of the exact task score, with its interval."""
    span = point["recovery_ci95"]
    return f"{point['recovery']:.3f}" + (f" ({span[0]:.2f}–{span[1]:.2f})" if span else "")
