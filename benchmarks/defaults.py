"""The tuned policy of a head against the paper's settings untuned: depth 7, top-k 10, 60 nodes, MARS ratio 0.9; greedy.

    python benchmarks/defaults.py --draft runs/quickstart/draft --out runs/defaults \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 64 tokens take some 4 minutes at 60 tokens/s. The tuned policy should be at least 1.25 times as fast, at no
more regret.
"""

from __future__ import annotations

from typing import Any

from plots import Panel, draw_curves
from study import Study, regret, relaxed, run, show, speed, sums, table, tau, words

from slipstream.decode.evaluate import interval
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape

PAPER = TreeShape(7, 10, 60)
WANTED = 1.25


def main(ratio: float = 0.9, **settings: Any) -> None:
    """Print a Markdown table, and whether the tuned policy is as much faster as it should be; draw speed and regret.

    Args:
        ratio: The paper's threshold.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    paper = study.variant(tree=PAPER, speculation=Speculation())
    untuned, strict = f"paper's tree, mars ratio {ratio:g}", "paper's tree, exact"
    answers = study.answers(
        {
            untuned: (paper, f"mars:ratio={ratio:g}"),
            strict: (paper, "exact"),
            "tuned, exact": (study.decoder, "exact"),
            "tuned, mars": (study.decoder, "mars"),
        }
    )
    counts = {name: sums(records) for name, records in answers.items()}
    lines = [
        [
            name,
            f"{speed(records):.1f}",
            words(interval(answers[untuned], records, 0)),
            words(interval(answers[strict], records, 0)),
            words(tau(counts[name])),
            f"{relaxed(counts[name]):.1%}",
            words(regret(counts[name]), 4),
            f"{counts[name][:, 3].mean():.0f}",
        ]
        for name, records in answers.items()
    ]
    names = ["", "tokens/s", f"over {untuned} (95 %)", f"over {strict} (95 %)", "tau", "relaxed", "regret (nats/token)"]
    ratio_of, span = interval(answers[untuned], answers["tuned, mars"], 0)
    ours, theirs = regret(counts["tuned, mars"])[0], regret(counts[untuned])[0]
    verdict = "met" if ratio_of >= WANTED and ours <= theirs else "missed"
    pairs = {"paper's tree": (strict, untuned), "tuned": ("tuned, exact", "tuned, mars")}
    points = {
        tree: [(regret(counts[name])[0], speed(answers[name])) for name in rules] for tree, rules in pairs.items()
    }
    show(
        study.out,
        draw_curves(
            "Speed and regret of the tuned policy and of the paper's settings, exact and with MARS",
            [Panel("exact at regret 0, MARS right of it", points)],
            "regret (nats per token)",
            "tokens per second",
        ),
        table([*names, "answer length"], lines),
        f"Tuned over untuned: {words((ratio_of, span))} of the tokens per second at a regret of {ours:.4f} against "
        f"{theirs:.4f} nats a token; {WANTED} at no more regret is {verdict}.",
    )


if __name__ == "__main__":
    run(main)
