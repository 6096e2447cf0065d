"""Measure rules against transformers' `generate`, on the same prompts, in the same run; rows of `results.json`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.data.template import encode_prompt
from slipstream.decode.drafters import NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.verify import Verifier
from slipstream.distill.objectives import forward_kl
from slipstream.distill.unroll import unroll

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.verify import Token
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.target import Target

BASELINES = ("autoregressive", "engine")
_BOOTSTRAP = 2000


@dataclass
class Record:
    """What one rule did on one prompt, all turns together."""

    task: str
    tokens: int = 0
    seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    accept_lengths: list[int] = field(default_factory=list)
    relaxed: int = 0
    regret: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)
    tagged: list[Token] = field(default_factory=list)


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Spec-Bench rows (`question_id, category, turns`) from a JSONL file; None reads the shipped held-out prompts.

    Raises:
        SlipstreamError: If the file is missing, or a row lacks its turns.
    """
    file = Path(path).expanduser() if path is not None else Path(str(files("slipstream.data") / "prompts.jsonl"))
    if not file.is_file():
        raise SlipstreamError(f"prompts {str(file)!r} do not exist")
    rows = []
    if limit is not None and limit < 1:
        raise SlipstreamError(f"limit must be at least 1, not {limit}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SlipstreamError(f"{file} is not UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SlipstreamError(f"{file}:{number}: not JSON: {error.msg}") from error
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise SlipstreamError(f'{file}:{number}: needs "turns", a list of user messages')
        rows.append({"question_id": number, "category": "", **row})
    if not rows:
        raise SlipstreamError(f"{file} holds no prompts")
    return rows[:limit]


def tuning_prompts() -> list[dict[str, Any]]:
    """The prompts that ship for tuning; none of them is among those for measuring."""
    return read_prompts(str(files("slipstream.data") / "prompts_tune.jsonl"))


def _autoregressive(target: Target, ids: Tensor, max_new_tokens: int, temperature: float) -> tuple[list[int], float]:
    """transformers' own `generate`; new tokens and seconds."""
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    begun = time.perf_counter()
    out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
    return out[0, ids.shape[1] :].tolist(), time.perf_counter() - begun


def answer(
    decoder: Decoder,
    rule: str | Verifier,
    row: dict[str, Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    task: str = "all",
) -> Record:
    """Answer all turns of one prompt row under a rule; each turn sees the rule's own answers to the turns before."""
    target = decoder.target
    tokenizer = target.chat_tokenizer
    record = Record(task)
    messages: list[dict[str, str]] = []
    undrafted = Decoder(target, NoDrafter())
    for turn in row["turns"]:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([encode_prompt(tokenizer, messages)], device=target.device)
        if rule == "autoregressive":
            output, seconds = _autoregressive(target, ids, max_new_tokens, temperature)
            record.seconds += seconds
            record.target_seconds += seconds
        else:
            engine, verify = (undrafted, "exact") if rule == "engine" else (decoder, rule)
            out = engine.generate(ids, max_new_tokens=max_new_tokens, temperature=temperature, verify=verify, seed=seed)
            output = [token.id for token in out.tokens]
            record.tagged += out.tokens
            record.seconds += out.stats.seconds
            record.target_seconds += out.stats.target_seconds
            record.draft_seconds += out.stats.draft_seconds
            record.accept_lengths += out.stats.accept_lengths
            record.relaxed += out.stats.relaxed
            record.regret += out.stats.regret
        record.tokens += len(output)
        record.outputs.append(output)
        messages.append({"role": "assistant", "content": tokenizer.decode(output, skip_special_tokens=True)})
    return record


def run(
    decoder: Decoder,
    rules: Sequence[str | Verifier],
    prompts: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    label: str = "measure",
) -> list[list[Record]]:
    """Records by rule and prompt. All rules answer a prompt before the next one comes, so that drift hits them alike."""
    if max_new_tokens < 1:
        raise SlipstreamError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for rule in rules:  # warm-up, not counted
        answer(decoder, rule, prompts[0], max_new_tokens=8, temperature=temperature)
    records: list[list[Record]] = [[] for _ in rules]
    with progress(label, len(rules) * len(prompts), "answers") as advance:
        for row in prompts:
            task = row.get("category") or "all"
            for place, rule in zip(records, rules, strict=True):
                place.append(
                    answer(
                        decoder, rule, row, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, task=task
                    )
                )
                advance()
    return records


def interval(base: list[Record], ours: list[Record], seed: int) -> tuple[float, list[float]]:
    """Ratio of pooled tokens per second, and its 95 % interval: paired bootstrap over prompts."""
    data = np.array([[b.tokens, b.seconds, o.tokens, o.seconds] for b, o in zip(base, ours, strict=True)])

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 2] / sums[..., 3]) / (sums[..., 0] / sums[..., 1])

    picks = np.random.default_rng(seed).integers(len(data), size=(_BOOTSTRAP, len(data)))
    low, high = np.quantile(ratio(data[picks].sum(1)), [0.025, 0.975])
    return float(ratio(data.sum(0))), [round(float(low), 3), round(float(high), 3)]


def by_position(lengths: Sequence[int]) -> list[float]:
    """Share of rounds in which at least 1, 2, .. drafts were accepted; a round of length n accepted n - 1."""
    counts = np.bincount(lengths, minlength=2)
    reached = counts[::-1].cumsum()[::-1] / max(1, len(lengths))
    return [round(float(v), 4) for v in reached[2:]]


def result_rows(
    decoder: Decoder,
    rules: Sequence[str | Verifier],
    records: list[list[Record]],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    identical: dict[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `results.json` from `run`'s records; the first two rules must be the baselines.

    Each category is a task of its own where there are several; the task `all` pools them and comes first.
    """
    tasks = ["all", *dict.fromkeys(r.task for r in records[0] if r.task != "all")]
    out = []
    for task in tasks if len(tasks) > 2 else tasks[:1]:
        chosen = [[r for r in group if task in ("all", r.task)] for group in records]
        for rule, group in zip(rules, chosen, strict=True):
            verifier = decoder.policy.rule(rule) if rule not in BASELINES else Verifier()
            name = rule if isinstance(rule, str) else verifier.label
            tokens, seconds = sum(r.tokens for r in group), sum(r.seconds for r in group)
            lengths = [n for r in group for n in r.accept_lengths]
            target, draft = sum(r.target_seconds for r in group), sum(r.draft_seconds for r in group)
            speedup, span = interval(chosen[0], group, seed)
            out.append(
                {
                    "task": task,
                    "rule": name,
                    "temperature": temperature,
                    "verifier": None if name in BASELINES else verifier.to_dict(),
                    "lossless": verifier.lossless,
                    "prompts": len(group),
                    "tokens": tokens,
                    "tokens_per_second": round(tokens / seconds, 2),
                    "speedup": round(speedup, 3),
                    "speedup_ci95": span,
                    "speedup_engine": round(interval(chosen[1], group, seed)[0], 3),
                    "acceptance_length": round(float(np.mean(lengths)), 3) if lengths else 1.0,
                    "acceptance_by_position": by_position(lengths) if lengths else [],
                    "relaxed_share": round(sum(r.relaxed for r in group) / tokens, 4),
                    "mean_regret_nats": round(sum(r.regret for r in group) / tokens, 5),
                    "mean_output_tokens": round(tokens / len(group), 2),
                    "identical_to_target": (identical or {}).get(name),
                    "time_split": {
                        "target": round(target, 2),
                        "draft": round(draft, 2),
                        "rest": round(seconds - target - draft, 2),
                    },
                }
            )
    return out


def identical_outputs(records: list[list[Record]], names: Sequence[str]) -> dict[str, bool]:
    """Whether each rule gave `generate`'s tokens on every prompt (records of one run, the first rule autoregressive)."""
    reference = [r.outputs for r in records[0]]
    return {name: [r.outputs for r in group] == reference for name, group in zip(names, records, strict=True)}


def simulated_acceptance_length(
    head: DraftHead, target: Target, answers: Sequence[tuple[list[int], list[int]]], steps: int
) -> float:
    """tau that the training-time unroll foresees for chains of `steps` drafts on given (prompt, output) token ids.

    Each output is walked as decoding would: a round that starts at row p and keeps a drafts emits a+1 tokens, and the
    next starts at row p+a+1. The first token comes from the prompt's own forward and belongs to no round.
    """
    emitted = rounds = 0
    for prompt, output in answers:
        ids = torch.tensor([prompt + output], device=target.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, len(prompt) :] = True
        with torch.no_grad():
            out = unroll(head, target, ids, mask, steps=steps, objective=forward_kl)
        keeps = dict(zip(out.positions[1].tolist(), out.accepted.tolist(), strict=True))
        row, end = len(prompt) - 1, len(prompt) + len(output) - 2  # row p predicts token p+2
        while row < end:
            step = min(keeps[row] + 1, end - row)
            emitted, rounds, row = emitted + step, rounds + 1, row + step
    return emitted / max(1, rounds)
