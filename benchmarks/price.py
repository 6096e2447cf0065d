"""What a price of regret buys over a threshold: acceptance at equal regret, and what becomes of the answers; greedy, real runs.

    python benchmarks/price.py --draft runs/quickstart/draft --out runs/price --batch_size 8 \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 64 tokens take some 4 minutes. The paper's rule (MARS with a margin: the runner-up, where nothing is exact) is
held against the same rule with further ranks, and against the most valuable paths at several prices.
`--copied 0` leaves the copies out of the head's tree: what is relaxed is the head's alone then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from guards import TEXT_COLUMNS, text_line
from plots import Panel, draw_curves
from signals import by_regret, equal_regret
from study import Study, regret, relaxed, run, show, sums, table, tau, words

from slipstream.decode.fidelity import measure_likelihood

MARGINS = [0.25, 0.5, 0.75, 1.0, 1.5]
PRICES = [5.0, 3.0, 2.0, 1.5]
LEVELS = (0.005, 0.01, 0.02)


def main(
    margins: list[float] = MARGINS,
    prices: list[float] = PRICES,
    rank: int = 4,
    cap: float = 2.0,
    copied: int | None = None,
    levels: tuple[float, ...] = LEVELS,
    **settings: Any,
) -> None:
    """Print three Markdown tables: acceptance and regret, the answers, and all rules at equal regret; draw the first.

    Args:
        margins: Of the paper's rule, and of the one with further ranks.
        prices: Tokens that a nat must bring.
        rank: Lowest rank of the two other rules.
        cap: Margin that no token exceeds at any price.
        copied: Copies in the tree; default: as many as the head's policy has.
        levels: Regrets at which the rules are compared, nats per token.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    tree = study.decoder.policy.tree
    decoder = study.decoder if copied is None else study.variant(tree=replace(tree, copied=copied))
    ladders = {
        "margin": [f"mars:margin={m:g}" for m in margins],
        f"margin, rank {rank}": [f"mars:margin={m:g},rank={rank}" for m in margins],
        f"price, rank {rank}": [f"mars:margin={cap:g},rank={rank},price={p:g}" for p in prices],
    }
    rules = ["exact", *(text for ladder in ladders.values() for text in ladder)]
    answers = study.answers({text: (decoder, text) for text in rules})
    measure_likelihood(study.decoder.target, study.rows, list(answers.values()))
    counts = {text: sums(records) for text, records in answers.items()}
    curves = {name: np.stack([counts[text] for text in ("exact", *ladder)]) for name, ladder in ladders.items()}
    found = equal_regret(curves, levels)
    show(
        study.out,
        draw_curves(
            "Acceptance length against regret: margins, margins with further ranks, prices",
            [Panel("T = 0", {name: list(zip(*by_regret(x.sum(1)), strict=True)) for name, x in curves.items()})],
            "regret (nats per token)",
            "acceptance length",
        ),
        table(
            ["rule", "tau", "relaxed", "regret (nats/token)"],
            [[text, words(tau(c)), f"{relaxed(c):.1%}", words(regret(c), 4)] for text, c in counts.items()],
        ),
        table(
            ["rule", *TEXT_COLUMNS],
            [text_line(text, answers["exact"], records) for text, records in answers.items()],
        ),
        table(
            ["regret (nats/token)", "rule", "tau", "above the first"],
            [
                [f"{level:g}", name, *(words(stated, 3) for stated in by_level[i])]
                for i, level in enumerate(levels)
                for name, by_level in found.items()
            ],
            left=2,
        ),
    )


if __name__ == "__main__":
    run(main)
