"""Measured acceptance lengths of heads of one target, tree by tree: what their training has come to.

    python benchmarks/heads.py --drafts "[runs/quickstart/draft, runs/longrun/draft]"

Verification is exact, nothing is timed, and the heads' own policies are not asked.
"""

from __future__ import annotations

from pathlib import Path

from study import first_turns, run, sums, table, tau, words

import slipstream
from slipstream.configs.progress import progress
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import answer_batch
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape

TREES = {
    "24 nodes (depth 5, top-k 5)": TreeShape(5, 5, 24),
    "and 8 copied": TreeShape(5, 5, 24, copied=8),
    "chain of 3": TreeShape.chain(3),
}


def main(
    drafts: list[str],
    target: str = "smollm2-135m-instruct",
    prompts: list[Path] | None = None,
    limit: int = 20,
    tokens: int = 96,
    temperature: float = 0.0,
    batch_size: int = 4,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> None:
    """Print a Markdown table, with 95 % intervals over prompts.

    Args:
        drafts: Heads' folders.
        target: The target model.
        prompts: Task files; default: the held-out prompts that ship with the package.
        limit: First prompts of each file; only first turns are asked.
        tokens: New tokens an answer.
        temperature: Of the answers.
        batch_size: Prompts that are answered together.
        dtype: Of target and heads.
        device: `cpu` or `cuda`.
    """
    loaded = slipstream.load_target(target, dtype=dtype, device=device)
    rows = first_turns(prompts, limit)
    lines = []
    with progress("heads", len(drafts) * len(TREES) * len(rows), "answers") as advance:
        for draft in drafts:
            decoder, cells = slipstream.load(loaded, draft), []
            for tree in TREES.values():
                shaped, records = Decoder(decoder.target, decoder.drafter, Policy(tree=tree)), []
                for start in range(0, len(rows), batch_size):
                    group = rows[start : start + batch_size]
                    records += answer_batch(
                        shaped, "exact", group, max_new_tokens=tokens, temperature=temperature, seed=start
                    )
                    advance(len(group))
                cells.append(words(tau(sums(records))))
            lines.append([draft, *cells])
    print(table(["head", *TREES], lines))


if __name__ == "__main__":
    run(main)
