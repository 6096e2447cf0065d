"""The fastest policy within a budget of fidelity: searched on a trace with this device's costs, confirmed by real runs.

What a trace foretells is in `decode/search.py`. It is an estimate: what is chosen was run, on prompts the trace does not hold.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.decode.budget import Point
from slipstream.decode.costs import CostProbe
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import compare, interval
from slipstream.decode.frontier import pays
from slipstream.decode.recorder import record
from slipstream.decode.sandbox import isolation
from slipstream.decode.scores import recovery, score_means, score_records
from slipstream.decode.search import LARGEST, RULES, SHAPES, candidates, frontier, longest, predict
from slipstream.decode.speculation import SCHEDULES, Speculation
from slipstream.decode.tasks import encode_first
from slipstream.decode.trace import Trace
from slipstream.decode.verify import Spent, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slipstream.decode.budget import Budget
    from slipstream.decode.costs import Costs
    from slipstream.decode.evaluate import Record
    from slipstream.decode.policy import Policy
    from slipstream.decode.tree import TreeShape

COPIES = (3, 5, 8)
"""Copied nodes tried beside the best tree."""

GUARDS: tuple[tuple[str, float], ...] = (("regret", 2.0), ("regret", 8.0), ("per_request", 5.0))
"""Budgets of a whole request that the chosen rule is tried under; a trace of exact rounds does not tell what they do."""

_PASSES = 2  # times that every probe is timed between the answers of the search's candidates
_LAST_PASSES = 1  # and between those of the last run
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
        probe = _probe(decoder, prompts)
        points, length = predict(recorded, probe.measure(), shapes, rules), recorded.mean_tokens()
    best, others = frontier(points), prompts[1::2]
    foreseen = candidates(points, best, budget)
    # A machine's speed drifts: what is run is held against what rounds timed in between foresee.
    ran = _run(decoder, foreseen, others, max_new_tokens, score, between=_between(probe, _PASSES, others))
    costs = probe.costs()
    foreseen = [replace(p, speed=costs.speed(p.shape, p.rule, p.tau, length)) for p in foreseen]
    ran = [replace(a, predicted=b.speed, basis="trace") for a, b in zip(ran, foreseen, strict=True)]
    fixed = budget.choose(ran)
    searched = {"exact": (ran[0], foreseen[0]), "best": (fixed, foreseen[ran.index(fixed)])}
    options = (others, max_new_tokens, score)
    # What a trace does not tell is run: copies from the text beside two trees, then the best under schedules. They may take
    # the rule beyond the budget: which of its thresholds keeps to it is found out last, on the tree that came out.
    trees = dict.fromkeys([fixed.shape, longest(points)])
    copied = [replace(fixed, shape=replace(shape, copied=count)) for shape in trees for count in COPIES]
    ran, again = _further(decoder, ran, [ran[0], fixed], copied, *options)
    copying = budget.best([point for point in again if point.rule == fixed.rule])
    scheduled = [replace(copying, schedule=name) for name in SCHEDULES if name != "fixed"]
    ran, again = _further(decoder, ran, [ran[0], copying], scheduled, *options, timed=fixed.rule.lossless)
    exact = chosen = budget.best([point for point in again if point.rule == fixed.rule])
    if not fixed.rule.lossless:
        ran, exact, chosen = _within(decoder, ran, chosen, fixed, budget, rules, options)
    final = {point.label: point for point in (exact, chosen)}  # as they are told, should they have run once more
    ran = [final.get(point.label, point) for point in ran]
    measured = {
        "budget": str(budget),
        "prompts": len(others),
        "max_new_tokens": max_new_tokens,
        "think": decoder.target.think,
        "compiled": bool(decoder.target.compiled),
        **_compared(exact, chosen),
        "searched": {name: _held(*pair) for name, pair in searched.items()},
        "costs": asdict(costs),
        **({"sandbox": sandbox.to_dict()} if sandbox else {}),
    }
    rows = [*(point.to_dict(False) for point in best), *(point.to_dict(point.label == chosen.label) for point in ran)]
    return replace(chosen.apply(decoder.policy), measured=measured), rows


def _compared(exact: Point, chosen: Point) -> dict[str, Any]:
    """The chosen point and exact decoding with its tree, as they ran side by side, and whether relaxing pays there."""
    speedup, span = interval(exact.records, chosen.records, seed=0)
    return {
        "exact": exact.to_dict(chosen is exact),
        "chosen": chosen.to_dict(True),
        "chosen_over_exact": {"speedup": round(speedup, 3), "ci95": span},
        **({} if chosen.rule.lossless else {"relaxing_pays": pays(span)}),
    }


def _held(point: Point, foreseen: Point) -> dict[str, Any]:
    """A point of the search as it ran, held against what the trace and the costs of a round foresaw."""
    return {
        "label": point.label,
        "tokens_per_second": round(point.speed, 2),
        "predicted_tokens_per_second": round(foreseen.speed, 2),
        "confirmed_over_predicted": round(point.speed / foreseen.speed, 3),
        "confirmed_over_predicted_tau": round(point.tau / foreseen.tau, 3),
    }


def _probe(decoder: Decoder, prompts: Sequence[dict[str, Any]]) -> CostProbe:
    return CostProbe(decoder, [_prompt(decoder, row) for row in prompts])


def _between(probe: CostProbe, passes: int, prompts: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """What times every probe so many times, if it is called behind each prompt."""
    return partial(probe.take, math.ceil(passes * len(probe) / len(prompts)))


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
    timed: bool = False,
) -> tuple[list[Point], list[Point]]:
    """Run points beside an exact one and the best so far: all that ran, each as it last did, and those of this time.

    What was foreseen was so for another moment of this machine. Where rounds are timed in between, it is foreseen anew.
    """
    fresh = [replace(point, predicted=None, basis=None) for point in dict.fromkeys([*paired, *points])]
    if timed:
        probe = _probe(decoder, prompts)
        between = _between(probe, _LAST_PASSES, prompts)
        again = _run(decoder, fresh, prompts, max_new_tokens, score, between=between)
        costs = probe.costs()
        again = [_foretold(point, costs) for point in again]
    else:
        again = _run(decoder, fresh, prompts, max_new_tokens, score)
    labels = {point.label for point in again}
    return [again[0], *(point for point in ran if point.label not in labels), *again[1:]], again


def _foretold(point: Point, costs: Costs) -> Point:
    """A point that ran, with the speed that follows from its acceptance length, its answers and the cost of its rounds.

    Copied nodes are counted as if a round always found something to copy: one that does not is cheaper. Nothing follows
    under a schedule, which changes the tree, nor for a tree that is larger than all that were timed.
    """
    if point.schedule != "fixed" or point.shape.size > costs.nodes[-1]:
        return point
    whole = replace(point.shape, nodes=point.shape.size, copied=0)
    length = sum(r.tokens for r in point.records) / sum(len(r.outputs) for r in point.records)
    return replace(point, predicted=costs.speed(whole, point.rule, point.tau, length), basis="run")


def _within(
    decoder: Decoder,
    ran: list[Point],
    best: Point,
    fixed: Point,
    budget: Budget,
    rules: Sequence[Verifier],
    options: tuple[Sequence[dict[str, Any]], int, bool],
) -> tuple[list[Point], Point, Point]:
    """On the best tree, the threshold and guards that keep to the budget: all that ran, exact decoding there, the chosen.

    Where none does, on the tree of a point that did. A schedule that goes by the clock, or another exact text in bf16, may
    put all of them outside even so; that point stays then. Where the budget alone keeps from a faster threshold, that one
    is run under guards too.
    """
    exact = fixed
    for tree in {point.label: point for point in (best, fixed)}.values():
        near = [replace(tree, rule=rule) for rule in _neighbours(tree.rule, rules)]
        paired = [replace(tree, rule=Verifier()), tree]
        ran, again = _further(decoder, ran, paired, [*near, *_guarded(tree)], *options, timed=True)
        exact = again[0]
        if not any(map(budget.met, again)):
            continue
        chosen, wanted = budget.choose(again), budget.best(again)
        known = {point.label for point in again}
        guarded = [point for point in _guarded(wanted) if point.label not in known]
        if budget.met(wanted) or not guarded:
            return ran, exact, chosen
        ran, later = _further(decoder, ran, [exact, chosen], guarded, *options, timed=True)
        return (ran, later[0], budget.choose(later)) if any(map(budget.met, later)) else (ran, exact, chosen)
    return ran, exact, fixed


def _guarded(point: Point) -> list[Point]:
    """A relaxed point that ran, under each guard that one of its requests ran into: the others would change nothing."""
    spent = [Spent()]
    for answer in point.records:
        tokens = iter(answer.tagged)
        for output in answer.outputs:  # a turn is a request of its own
            spent.append(Spent())
            spent[-1].add(list(islice(tokens, len(output))))
    used = {"regret": max(s.regret for s in spent), "per_request": max(s.relaxed for s in spent)}
    rules = [replace(point.rule, **{name: most}) for name, most in GUARDS if used[name] > most]  # type: ignore[arg-type]
    return [replace(point, rule=rule) for rule in rules]


def _neighbours(rule: Verifier, rules: Sequence[Verifier]) -> list[Verifier]:
    """Rules that differ from a relaxed one in nothing but the threshold, or the price where it has one; the nearest ones."""
    if rule.price:
        ladder = sorted((r for r in rules if r.price and replace(rule, price=r.price) == r), key=lambda r: r.price)
    else:
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
        agreement=same / tokens,
        confirmed=True,
        records=records,
    )
    scores = score_means(exact, records, seed=0)
    if not scores:
        return point
    kept, span = recovery(exact, records, seed=0)
    return replace(point, recovery=kept, recovery_ci95=span, scores=scores)
