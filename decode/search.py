"""What a trace and the costs of a round foretell: exact decoding with every tree, relaxed rules with the best of them.

Tokens per second are predicted from rounds replayed on the contexts of the trace. A policy that accepts other tokens comes
to other contexts, so its acceptance length is an estimate.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from slipstream.configs.progress import progress
from slipstream.decode.budget import NEARLY, Point
from slipstream.decode.costs import PROBES
from slipstream.decode.replay import check, cut, judge
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.budget import Budget
    from slipstream.decode.costs import Costs
    from slipstream.decode.trace import Rounds, Trace
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
    *(
        Verifier("mars", "margin", 2.0, rank=rank, price=price)
        for price in (8.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0)
        for rank in (2, 4)
    ),
)
"""Relaxed rules; greedily, `odds` rho is `margin` -log rho."""

_WIDELY = 16  # trees that all rules are tried on
_RUNS = 3  # points that are run beside the fastest exact one


def predict(
    trace: Trace, costs: Costs, shapes: Sequence[TreeShape] = SHAPES, rules: Sequence[Verifier] = RULES
) -> list[Point]:
    """Exact decoding with every tree, and every relaxed rule with the best of them.

    Raises:
        SlipstreamError: If the trace cannot tell.
    """
    chunks, length = list(trace.rounds()), trace.mean_tokens()
    rules = [rule for rule in rules if rule.rank <= trace.header.top]  # as far down as the trace goes
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


def longest(points: Sequence[Point]) -> TreeShape:
    """Of the trees that exact decoding should be nearly as fast with as with the fastest, the one that accepts most."""
    exact = [point for point in points if point.rule.lossless]
    least = NEARLY * max(point.speed for point in exact)
    return max((point for point in exact if point.speed >= least), key=lambda point: point.tau).shape


def candidates(points: Sequence[Point], best: Sequence[Point], budget: Budget) -> list[Point]:
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
