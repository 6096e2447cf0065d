"""What guards do to long relaxed answers: drift, length and repetition under budgets against none; greedy.

    python benchmarks/guards.py --draft runs/quickstart/draft --out runs/guards \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 512 tokens take some 50 minutes at 60 tokens/s, of 64 tokens (`--tokens 64`) 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plots import Panel, draw_curves
from study import Study, mean, regret, relaxed, run, show, speed, sums, table, tau, words

from slipstream.decode.evaluate import interval
from slipstream.decode.fidelity import agreement, likelihood, measure_likelihood, regret_by_length
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record

GUARDS = ["per_round=1", "per_request=5", "per_request=20", "regret=2", "regret=8"]
TEXT_COLUMNS = [
    "agreement with exact",
    "same answers",
    "log-likelihood (nats/token)",
    "length",
    "distinct 2-grams",
    "repeated 4-grams",
]


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of n-grams that are new where they stand; 1 where there is none."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def halves(records: Sequence[Record], tokens: int) -> tuple[float, float]:
    """Regret per token, nats, of the first half of what answers may have, and of what comes after it."""
    middle = tokens // 2
    parts = [[t for r in records for t in r.tagged[:middle]], [t for r in records for t in r.tagged[middle:]]]
    first, second = (sum(t.regret for t in part if t.tag == "relaxed") / max(1, len(part)) for part in parts)
    return first, second


def spent(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Regret so far, nats, after so many tokens; mean of the answers that are so long."""
    return [(0.0, 0.0), *((p["tokens"], p["mean"]) for p in regret_by_length(records) or [])]


def cost_line(name: str, exact: Sequence[Record], records: Sequence[Record], tokens: int) -> list[str]:
    """A line of the table of speed and regret."""
    counts = sums(records)
    first, second = halves(records, tokens)
    return [
        name,
        f"{speed(records):.1f}",
        words(interval(exact, records, 0)),
        words(tau(counts)),
        f"{relaxed(counts):.1%}",
        words(regret(counts), 4),
        f"{first:.4f} / {second:.4f}",
        words(mean(counts[:, 2])),
        f"{counts[:, 2].max():.2f}",
    ]


def text_line(name: str, exact: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """A line of the table of answers."""
    outputs = [r.outputs[0] for r in records]
    same, likely = agreement(exact, records, 0), likelihood(records, 0)
    return [
        name,
        words((same["common_prefix"], same["common_prefix_ci95"]), 3),
        f"{same['exact_match']:.0%}",
        words((likely["log_likelihood"], likely["log_likelihood_ci95"]), 3),
        words(mean([r.tokens for r in records]), 1),
        words(mean([distinct(output, 2) for output in outputs]), 3),
        words(mean([1 - distinct(output, 4) for output in outputs]), 3),
    ]


def main(
    tokens: int = 512,
    rule: str = "mars:margin=1",
    guards: list[str] = GUARDS,
    **settings: Any,
) -> None:
    """Print two Markdown tables: speed and regret, and what became of the answers; draw how regret adds up.

    Args:
        tokens: New tokens an answer.
        rule: The relaxed rule with its threshold, without guards.
        guards: Each added to the rule.
        **settings: Of `Study`.
    """
    study = Study(tokens=tokens, **settings)
    rules = {"exact": "exact", "no guard": rule} | {guard: f"{rule},{guard}" for guard in guards}
    for text in rules.values():
        Verifier.of(text)  # or an error, before the model is loaded
    answers = study.answers({name: (study.decoder, text) for name, text in rules.items()})
    measure_likelihood(study.decoder.target, study.rows, list(answers.values()))
    exact = answers["exact"]
    guarded = [name for name in rules if name != "exact"]
    show(
        study.out,
        draw_curves(
            f"How regret adds up along answers under {rule}, by guard",
            [Panel(f"{rule}: mean of the answers that are so long", {name: spent(answers[name]) for name in guarded})],
            "tokens of the answer",
            "regret so far (nats)",
        ),
        table(
            [
                f"{rule} with",
                "tokens/s",
                "over exact (95 %)",
                "tau",
                "relaxed",
                "regret (nats/token)",
                f"in the first {tokens // 2} tokens / after",
                "regret an answer",
                "largest",
            ],
            [cost_line(name, exact, records, tokens) for name, records in answers.items()],
        ),
        table(
            [f"{rule} with", *TEXT_COLUMNS],
            [text_line(name, exact, records) for name, records in answers.items()],
        ),
    )


if __name__ == "__main__":
    run(main)
