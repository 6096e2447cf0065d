"""Dynamic speculation against fixed trees, per category: tokens per second, all contenders on a prompt before the next one.

    python benchmarks/policies.py --draft runs/quickstart/draft --out runs/policies \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 64 tokens take some 9 minutes at 60 tokens/s. Schedules learn from round to round: give them longer answers
too (`--tokens 256`, four times as long). `cost` drafts no copies, whatever the tree has.
"""

from __future__ import annotations

from typing import Any

from plots import Part, draw_points
from study import Study, run, show, speed, sums, table, tau, words

from slipstream.decode.evaluate import by_task, interval
from slipstream.decode.speculation import SCHEDULES, Speculation
from slipstream.decode.tree import TreeShape

BASE = "tuned tree, fixed"
TREE = TreeShape(4, 4, 16)


def main(rule: str = "exact", tree: TreeShape = TREE, **settings: Any) -> None:
    """Print two Markdown tables, over all prompts and per category, and draw the second; ratios are to the tuned tree, fixed.

    Args:
        rule: Of verification, the same for all.
        tree: A tree beside the tuned one, larger, so that schedules have something to choose from.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    trees = {"tuned tree": study.decoder.policy.tree, f"{tree.size} nodes": tree}
    answers = study.answers(
        {
            f"{name}, {schedule}": (study.variant(tree=shape, speculation=Speculation(schedule)), rule)
            for name, shape in trees.items()
            for schedule in SCHEDULES
        }
    )
    lines = [
        [name, f"{speed(records):.1f}", words(interval(answers[BASE], records, 0)), words(tau(sums(records)))]
        for name, records in answers.items()
    ]
    tasks = {task: dict(zip(answers, groups, strict=True)) for task, groups in by_task(list(answers.values())).items()}
    counted = {f"{task} ({len(found[BASE])})": found for task, found in tasks.items()}
    ratios = {
        name: {task: interval(found[BASE], found[name], 0) for task, found in counted.items()} for name in answers
    }
    rivals = {name: by for name, by in ratios.items() if name != BASE}
    show(
        study.out,
        draw_points(
            f"Speed of speculation schedules over the {BASE}, by category",
            [Part(f"{rule}: tokens/s over {BASE}", rivals, 1.0)],
        ),
        table([rule, "tokens/s", f"over {BASE} (95 %)", "tau"], lines),
        table([f"{rule}, over {BASE}", *counted], [[name, *map(words, by.values())] for name, by in ratios.items()]),
    )


if __name__ == "__main__":
    run(main)
