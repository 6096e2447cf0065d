"""What relaxed decoding keeps of the exact one's task score, and how much faster it is; greedy.

    python benchmarks/recovery.py --draft runs/coder/draft --target qwen2.5-coder-0.5b-instruct.gguf --out runs/recovery \\
        --prompts "[HumanEval.jsonl]" --limit 164 --tokens 320

The prompts need references or tests; equal answers are scored once. The rule of the head's policy should keep 98.1 % of the
score at 1.15 times the speed (MARS, arXiv 2601.15498, states a recovery between 98.1 and 100 %).
"""

from __future__ import annotations

from typing import Any

from plots import Part, draw_points
from study import Study, regret, relaxed, run, show, speed, sums, table, tau, words

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.evaluate import interval, mean_interval
from slipstream.decode.sandbox import isolation
from slipstream.decode.scores import recovery, score_records
from slipstream.decode.tasks import require_references

KEPT, FASTER = 0.981, 1.15


def main(rules: list[str] = ["mars"], **settings: Any) -> None:  # noqa: B006 (jsonargparse copies defaults)
    """Print a Markdown table, and whether the first rule keeps and gains as much as it should; draw both.

    Args:
        rules: Beside exact decoding; `mars` is the tuned rule.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    require_references(study.rows, "this study")
    if any("test" in row for row in study.rows):
        isolation()  # says so now if programs cannot be confined here
    answers = study.answers({rule: (study.decoder, rule) for rule in ["exact", *rules]})
    score_records(study.decoder.target, study.rows, list(answers.values()))
    exact = answers["exact"]
    if not any(sum(r.scores.values()) for r in exact):
        raise SlipstreamError("exact decoding scores 0 on these prompts: there is nothing to keep")
    kept = {rule: recovery(exact, records, 0) for rule, records in answers.items()}
    faster = {rule: interval(exact, records, 0) for rule, records in answers.items()}
    lines = []
    for rule, records in answers.items():
        counts, scores = sums(records), [sum(r.scores.values()) for r in records]
        same = sum(a.outputs == b.outputs for a, b in zip(exact, records, strict=True))
        lines.append(
            [
                rule,
                f"{speed(records):.1f}",
                words(faster[rule]),
                words(tau(counts)),
                f"{relaxed(counts):.1%}",
                words(regret(counts), 4),
                words(mean_interval(scores, [1.0] * len(scores), 0), 3),
                words(kept[rule], 3),
                f"{counts[:, 3].mean():.0f}",
                f"{same} of {len(records)}",
            ]
        )
    names = ["", "tokens/s", "over exact (95 %)", "tau", "relaxed", "regret (nats/token)", "score", "of exact's (95 %)"]
    met = kept[rules[0]][0] >= KEPT and faster[rules[0]][0] >= FASTER
    verdict = (
        f"{rules[0]} keeps {kept[rules[0]][0]:.1%} of the score at {faster[rules[0]][0]:.2f}x the speed; "
        f"{KEPT:.1%} at {FASTER}x was wanted: {'met' if met else 'missed'}."
    )
    show(
        study.out,
        draw_points(
            "Relaxed decoding beside exact decoding",
            [
                Part("share of exact's score", {rule: {"": kept[rule]} for rule in rules}, KEPT),
                Part("times exact's speed", {rule: {"": faster[rule]} for rule in rules}, FASTER),
            ],
        ),
        table([*names, "tokens an answer", "same answers"], lines),
        verdict,
    )


if __name__ == "__main__":
    run(main)
