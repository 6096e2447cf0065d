"""Decoding on the same prompts in one run: transformers' generate and prompt look-up against ours, eager and compiled.

python benchmarks/decode.py --draft runs/quickstart/draft --prompts "[A.jsonl, B.jsonl]" --limit 6
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from study import first_turns, run, table

import slipstream
from slipstream.configs.errors import SlipstreamError
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
from slipstream.distill.compilation import require_compiler
from slipstream.distill.target import Target

Pair = tuple[Decoder, str | Verifier]  # a decoder with its rule

LOOK_UP = "prompt look-up"
ALONE = "compiled, no draft"


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
        f"{interval(undrafted, records, 0)[0]:.2f}" if undrafted else "-",
        f"{np.mean(lengths) if lengths else 1.0:.2f}",
        f"{sum(r.regret for r in records) / tokens:.4f}",
        split,
    ]


def _contenders(eager: Decoder, margins: tuple[float, ...]) -> dict[str, Pair]:
    """Who decodes, by name."""
    model, drafter, policy = eager.target, eager.drafter, eager.policy
    mars = policy.rule("mars").guarded
    chain = replace(policy, tree=TreeShape.chain(10))
    alone = replace(policy, tree=replace(policy.tree, copied=0))
    cost = replace(policy, tree=TreeShape(4, 4, 16), speculation=Speculation("cost"))
    return {
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


def _compiled(eager: Decoder, nodes: tuple[int, ...]) -> dict[str, Pair]:
    """Those whose target and head are compiled, by name."""
    model, drafter, policy = eager.target, eager.drafter, eager.policy
    chain = replace(policy, tree=TreeShape.chain(10))
    require_compiler(model.device)
    compiling = Target(model.model, model.tokenizer, name=model.name, layer_ids=model.layer_ids)
    compiling.compile()
    contenders: dict[str, Pair] = {
        ALONE: (Decoder(compiling), "exact"),
        "compiled, n-gram": (Decoder(compiling, NGramDrafter(), chain), "exact"),
        "compiled, head, exact": (Decoder(compiling, drafter, policy), "exact"),
        f"compiled, head, {policy.rule('mars').guarded}": (Decoder(compiling, drafter, policy), "mars"),
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


def _measured(
    contenders: dict[str, Pair], rows: list[dict[str, Any]], max_new_tokens: int, failed: dict[str, Exception]
) -> dict[str, list[Record]]:
    """Records by contender and prompt; all answer a prompt before the next one comes, so that drift hits them alike.

    A compiled contender that fails is dropped into `failed`: what else is measured need not be lost with it.
    """
    records: dict[str, list[Record]] = {name: [] for name in contenders}

    def attempt(name: str, row: dict[str, Any], tokens: int) -> Record | None:
        try:
            return None if name in failed else _answered(contenders[name], row, tokens)
        except Exception as error:  # whatever goes wrong in a compiler
            if contenders[name][0].target.compiled is None:
                raise
            traceback.print_exc()
            failed[name] = error
            return None

    with progress("warm up", len(contenders), "contenders") as advance:
        for name, (decoder, _) in contenders.items():
            # On a card new shapes take other kernels, and each size of tree and cache has its own graphs.
            whole = decoder.target.device.type != "cpu"
            for row in rows if whole else rows[:1]:
                attempt(name, row, max_new_tokens if whole else 8)
            advance()
    with progress("decode", len(rows) * len(contenders), "answers") as advance:
        for row in rows:
            for name, group in records.items():
                record = attempt(name, row, max_new_tokens)
                group += [] if record is None else [record]
                advance()
    return {name: group for name, group in records.items() if name not in failed}


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
    contenders, failed = _contenders(eager, margins), {}
    if compiled:
        try:
            contenders |= _compiled(eager, nodes)
        except SlipstreamError as error:
            failed["compiled"] = error
    records = _measured(contenders, first_turns(prompts, limit), max_new_tokens, failed)
    base = records["transformers generate"]
    lines = []
    for name, group in records.items():
        undrafted = records.get(ALONE if name.startswith("compiled") else "ours, no draft", [])
        lines.append(_line(name, base, undrafted, group))
    columns = ["tokens/s", "over generate (95 %)", "over no draft, same mode", "tau", "regret", "target / draft / rest"]
    text = table(["", *columns], lines)
    print(text)
    if out is not None:
        write_atomic(out, text + "\n")
    if failed:
        told = (f"{name}: {str(error).strip().partition(chr(10))[0]}" for name, error in failed.items())
        raise SlipstreamError("failed were " + "; ".join(told))


if __name__ == "__main__":
    run(main)
