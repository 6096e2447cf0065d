"""`slipstream evaluate`: all rules on a task file, into a folder."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch

from slipstream.configs.files import write_atomic
from slipstream.configs.progress import console
from slipstream.decode.evaluate import BASELINES, Record, identical_outputs, result_rows, run
from slipstream.decode.report import results_table, write_report
from slipstream.decode.signals import signal_samples
from slipstream.distill.heads import versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from slipstream.decode.engine import Decoder
    from slipstream.distill.target import Target


def header(target: Target, draft: str, seed: int) -> dict[str, Any]:
    """The part of `results.json` that says what was measured, and on what."""
    device = f"cpu ({torch.get_num_threads()} threads)" if target.device.type == "cpu" else str(target.device)
    return {
        "target": target.name,
        "draft": draft,
        "device": device,
        "dtype": str(target.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "seed": seed,
    }


def sample(target: Target, row: dict[str, Any], rule: str, record: Record) -> dict[str, Any]:
    """One answer, token by token, for the report."""
    tokenizer = target.chat_tokenizer
    tokens = [
        {"text": tokenizer.decode([t.id]), "tag": t.tag, "margin": t.margin, "regret": t.regret} for t in record.tagged
    ]
    return {"prompt": row["turns"][0], "rule": rule, "tokens": tokens}


def answer_lines(
    target: Target, prompts: Sequence[dict[str, Any]], rules: Sequence[str], records: list[list[Record]]
) -> str:
    """Spec-Bench's `answers.jsonl`: one line per prompt and rule."""
    tokenizer = target.chat_tokenizer
    lines = []
    for rule, group in zip(rules, records, strict=True):
        for row, record in zip(prompts, group, strict=True):
            choice = {
                "index": 0,
                "turns": [tokenizer.decode(ids, skip_special_tokens=True) for ids in record.outputs],
                "new_tokens": [len(ids) for ids in record.outputs],
                "wall_time": [record.seconds],
                "accept_lengths": record.accept_lengths,
            }
            entry = {"question_id": row["question_id"], "category": row["category"], "model_id": rule}
            lines.append(json.dumps({**entry, "choices": [choice], "tstamp": time.time()}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def evaluate(
    decoder: Decoder,
    draft: str,
    prompts: Sequence[dict[str, Any]],
    rules: Sequence[str],
    out: Path,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Measure the baselines and `rules`; write `results.json`, `answers.jsonl` and `report.html` into `out`."""
    names = [*BASELINES, *rules]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for rule in rules:
        decoder.policy.rule(rule)  # an unknown rule fails before anything runs
    records = run(decoder, names, prompts, **options)  # type: ignore[arg-type]
    exact_dtype = decoder.target.dtype == torch.float32 and temperature == 0
    results = {
        **header(decoder.target, draft, seed),
        "rows": result_rows(
            decoder,
            names,
            records,
            temperature=temperature,
            seed=seed,
            identical=identical_outputs(records, names) if exact_dtype else None,
        ),
        "policy": decoder.policy.to_dict(),
        "distributions": signal_samples(decoder.target, prompts, records[0]),
        "samples": [sample(decoder.target, prompts[0], names[i], records[i][0]) for i in range(2, len(names))],
    }
    write_atomic(out / "answers.jsonl", answer_lines(decoder.target, prompts, names, records))
    write_atomic(out / "results.json", json.dumps(results, indent=1))
    write_report(out / "report.html", results)
    console.print(results_table(results))
    return results
