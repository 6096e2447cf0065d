"""Tree and rule for this head on this device: every candidate is run, not predicted."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import run
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.decode.policy import Policy

SHAPES = (
    TreeShape(2, 1, 3),
    TreeShape(3, 1, 4),
    TreeShape(2, 3, 8),
    TreeShape(3, 3, 10),
    TreeShape(3, 4, 16),
    TreeShape(5, 5, 24),
)
RULES = (
    *(Verifier("mars", "margin", m) for m in (0.25, 0.5, 1.0)),
    *(Verifier("mars", "ratio", r) for r in (0.98, 0.95, 0.9)),
)


def _point(label: str, records: list[Record], lossless: bool) -> dict[str, Any]:
    tokens = sum(r.tokens for r in records)
    lengths = [n for r in records for n in r.accept_lengths]
    return {
        "label": label,
        "tokens_per_second": round(tokens / sum(r.seconds for r in records), 2),
        "acceptance_length": round(sum(lengths) / max(1, len(lengths)), 3),
        "mean_regret_nats": round(sum(r.regret for r in records) / tokens, 5),
        "relaxed_share": round(sum(r.relaxed for r in records) / tokens, 4),
        "lossless": lossless,
        "chosen": False,
    }


def tune(
    decoder: Decoder,
    prompts: Sequence[dict[str, Any]],
    *,
    regret_budget: float = 0.02,
    max_new_tokens: int = 64,
    shapes: Sequence[TreeShape] = SHAPES,
    rules: Sequence[Verifier] = RULES,
) -> tuple[Policy, list[dict[str, Any]]]:
    """The fastest tree under exact verification, then the fastest relaxed rule within the budget.

    Args:
        decoder: Target and head; its policy is the starting point.
        prompts: Held-out prompt rows.
        regret_budget: Mean regret allowed, nats per emitted token.
        max_new_tokens: Per turn.
        shapes: Trees to try.
        rules: Relaxed rules to try on the best tree. Where none meets the budget, the one of least regret is taken.

    Returns:
        The tuned policy, and the frontier: one point per rule, exact first.
    """
    trees = []
    for shape in shapes:
        variant = Decoder(decoder.target, decoder.drafter, replace(decoder.policy, tree=shape))
        label = f"tree: depth {shape.depth}, top-k {shape.top_k}, {shape.nodes} nodes"
        (records,) = run(variant, ["exact"], prompts, max_new_tokens=max_new_tokens, label=label)
        trees.append((_point(label, records, True), shape))
    best = max(trees, key=lambda pair: pair[0]["tokens_per_second"])[1]
    policy = replace(decoder.policy, tree=best)
    variant = Decoder(decoder.target, decoder.drafter, policy)
    names: list[str | Verifier] = ["exact", *rules]
    groups = run(variant, names, prompts, max_new_tokens=max_new_tokens, label="verification rules")
    points = [
        _point(policy.rule(rule).label, group, rule == "exact") for rule, group in zip(names, groups, strict=True)
    ]
    within = [i for i in range(1, len(points)) if points[i]["mean_regret_nats"] <= regret_budget]
    if within:
        chosen = max(within, key=lambda i: points[i]["tokens_per_second"])
    else:
        chosen = min(range(1, len(points)), key=lambda i: points[i]["mean_regret_nats"])
    points[chosen]["chosen"] = True
    measured = {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "regret_budget_nats": regret_budget,
        "within_budget": bool(within),
        "exact": points[0],
        "relaxed": points[chosen],
        "trees": [{**asdict(shape), **point} for point, shape in trees],
    }
    return replace(policy, relaxed=rules[chosen - 1], measured=measured), points


def frontier_table(points: Sequence[dict[str, Any]]) -> Table:
    """The frontier for the terminal; the chosen rule is marked."""
    table = Table("", "rule", "tokens/s", "acceptance length", "mean regret (nats)", "relaxed", box=None)
    for p in points:
        table.add_row(
            "*" if p["chosen"] else "",
            p["label"],
            f"{p['tokens_per_second']:.1f}",
            f"{p['acceptance_length']:.2f}",
            f"{p['mean_regret_nats']:.4f}",
            f"{p['relaxed_share']:.1%}",
        )
    return table
