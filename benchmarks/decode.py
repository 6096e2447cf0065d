"""Decoding on the same prompts in one run: transformers' generate and prompt look-up against ours, eager and compiled.

python benchmarks/decode.py --draft runs/quickstart/draft --prompts "[A.jsonl, B.jsonl]" --limit 6
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from study import first_turns, run, table

import slipstream
from slipstream.configs.files import write_atomic
from slipstream.configs.progress import progress
from slipstream.decode.drafters import NGramDrafter
from slipstream.decode.drawing import interval_text
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import Record, answer, autoregressive, interval
from slipstream.decode.speculation import Speculation
from slipstream.decode.tasks import encode_first
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.target import Target

Pair = tuple[Decoder, str | Verifier]  # a decoder with its rule

LOOK_UP = "prompt look-up"


def _look_up(target: Target, row: dict[str, Any], max_new_tokens: int) -> Record:
    """transformers' assisted generation with prompt look-up."""
    prompts = [encode_first(target, row)]
    outputs, seconds = autoregressive(target, prompts, max_new_tokens=max_new_tokens, prompt_lookup_num_tokens=10)
    return Record("all", len(outputs[0]), seconds, outputs=outputs)


def _line(name: str, base: list[Record], undrafted: list[Record], records: list[Record]) -> list[str]:
    tokens, seconds = sum(r.tokens for r in records), sum(r.seconds for r in records)
    lengths = [n for r in records for n in r.accept_lengths]
    speed, span = interval(base, records, 0)
    target, draft = (sum(getattr(r, f"{who}_seconds") for r in records) / seconds for who in ("target", "draft"))
    split = f"{target:.0%} / {draft:.0%} / {1 - target - draft:.1%}" if target else "-"
    return [
        name,
        f"{tokens / seconds:.1f}",
        f"{speed:.2f} [{interval_text(span)}]",
        f"{interval(undrafted, records, 0)[0]:.2f}",
        f"{np.mean(lengths) if lengths else 1.0:.2f}",
        f"{sum(r.regret for r in records) / tokens:.4f}",
        split,
    ]


def _contenders(eager: Decoder, compiled: bool, nodes: tuple[int, ...], margins: tuple[float, ...]) -> dict[str, Pair]:
    """Who decodes, by name."""
    model, drafter, policy = eager.target, eager.drafter, eager.policy
    mars = policy.rule("mars").label
    chain = replace(policy, tree=TreeShape.chain(10))
    alone = replace(policy, tree=replace(policy.tree, copied=0))
    cost = replace(policy, tree=TreeShape(4, 4, 16), speculation=Speculation("cost"))
    contenders: dict[str, Pair] = {
        "transformers generate": (eager, "autoregressive"),
        "transformers, prompt look-up": (eager, LOOK_UP),
        "ours, no draft": (Decoder(model), "exact"),
        "ours, n-gram": (Decoder(model, NGramDrafter(), chain), "exact"),
        "ours, head without copies, exact": (Decoder(model, drafter, alone), "exact"),
        "ours, head, exact": (eager, "exact"),
        f"ours, head, {mars}": (eager, "mars"),
        **{f"ours, head, {rule.label}": (eager, rule) for rule in (Verifier("mars", "margin", m) for m in margins)},
        "ours, head, exact, cost-aware": (Decoder(model, drafter, cost), "exact"),
    }
    if compiled:
        compiling = Target(model.model, model.tokenizer, name=model.name, layer_ids=model.layer_ids)
        compiling.compile()
        contenders |= {
            "compiled, no draft": (Decoder(compiling), "exact"),
            "compiled, n-gram": (Decoder(compiling, NGramDrafter(), chain), "exact"),
            "compiled, head, exact": (Decoder(compiling, drafter, policy), "exact"),
            f"compiled, head, {mars}": (Decoder(compiling, drafter, policy), "mars"),
        }
        for size in nodes:
            larger = replace(policy, tree=TreeShape(4, 4, size))
            contenders[f"compiled, head, exact, {size} nodes"] = (Decoder(compiling, drafter, larger), "exact")
    return contenders


def _answered(contender: Pair, row: dict[str, Any], tokens: int) -> Record:
    decoder, rule = contender
    if rule == LOOK_UP:
        return _look_up(decoder.target, row, tokens)
    return answer(decoder, rule, row, max_new_tokens=tokens)


def _measured(contenders: dict[str, Pair], rows: list[dict[str, Any]], max_new_tokens: int) -> dict[str, list[Record]]:
    """Records by contender and prompt; all answer a prompt before the next one comes, so that drift hits them alike."""
    records: dict[str, list[Record]] = {name: [] for name in contenders}
    with progress("warm up", len(contenders), "contenders") as advance:
        for contender in contenders.values():
            how = contender[0].target.compiled
            if how is not None and how.static:  # each size of cache has its own graphs
                for row in rows:
                    _answered(contender, row, max_new_tokens)
            else:
                _answered(contender, rows[0], 8)
            advance()
    with progress("decode", len(rows) * len(contenders), "answers") as advance:
        for row in rows:
            for name, contender in contenders.items():
                records[name].append(_answered(contender, row, max_new_tokens))
                advance()
    return records


def main(
    draft: str,
    target: str = "smollm2-135m-instruct",
    prompts: list[Path] | None = None,
    limit: int = 20,
    max_new_tokens: int = 128,
    compiled: bool = True,
    nodes: tuple[int, ...] = (),
    margins: tuple[float, ...] = (),
    device: str = "cpu",
    dtype: str = "bfloat16",
    out: Path | None = None,
) -> None:
    """Print a Markdown table.

    Args:
        draft: A head's folder.
        target: The target model.
        prompts: Spec-Bench JSONL files; default: the held-out prompts that ship with the package.
        limit: First prompts of each file; only first turns are asked.
        max_new_tokens: Per prompt.
        compiled: Also with target and head compiled.
        nodes: Also the head's tree at these sizes, compiled.
        margins: Also MARS at these margins, whatever they cost.
        device: `cpu` or `cuda`.
        dtype: Of target and head.
        out: A file for the table.
    """
    eager = slipstream.load(target, draft, dtype=dtype, device=device)
    records = _measured(_contenders(eager, compiled, nodes, margins), first_turns(prompts, limit), max_new_tokens)
    base = records["transformers generate"]
    lines = []
    for name, group in records.items():
        undrafted = records["compiled, no draft" if name.startswith("compiled") else "ours, no draft"]
        lines.append(_line(name, base, undrafted, group))
    columns = ["tokens/s", "over generate (95 %)", "over no draft, same mode", "tau", "regret", "target / draft / rest"]
    text = table(["", *columns], lines)
    print(text)
    if out is not None:
        write_atomic(out, text + "\n")


if __name__ == "__main__":
    run(main)
