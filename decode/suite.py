"""`slipstream evaluate`: drafts, rules, temperatures and batch sizes on task files, into a folder; resumable."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.configs.progress import console
from slipstream.data.journal import digest
from slipstream.decode.evaluate import BASELINES, by_task, identical_outputs, result_rows
from slipstream.decode.fidelity import (
    agreement,
    likelihood,
    measure_likelihood,
    regret_by_length,
    regret_quantiles,
    relaxed_margins,
)
from slipstream.decode.plan import Contender, measure, trace_parts
from slipstream.decode.report import results_table, write_report
from slipstream.decode.sandbox import isolation
from slipstream.decode.scores import score_means, score_records
from slipstream.decode.signals import signal_samples
from slipstream.decode.stream import Pieces
from slipstream.decode.tables import card_tables
from slipstream.decode.trace import fingerprint, join
from slipstream.decode.verify import require_drawn
from slipstream.distill.heads import versions
from slipstream.distill.store import weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from slipstream.decode.engine import Decoder
    from slipstream.decode.evaluate import Record
    from slipstream.decode.plan import Groups, Plan, Setting
    from slipstream.distill.target import Target

    Row = dict[str, Any]

_REFERENCES = ("reference", "test", "entry_point")  # of a prompt: what its answer is scored by
_JOURNAL = "progress.jsonl"
_PARTS = "progress.traces"
_SAMPLES = 3  # prompts whose answers are shown, each of another task


def header(target: Target, draft: str, seed: int) -> dict[str, Any]:
    """The part of `results.json` that says what was measured, and on what."""
    device = str(target.device)
    if target.device.type == "cpu":
        device += f" ({torch.get_num_threads()} threads)"
    elif target.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(target.device)})"
    device += ", compiled" if target.compiled else ""
    return {
        "target": target.name,
        "draft": draft,
        "device": device,
        "dtype": str(target.dtype).removeprefix("torch."),
        "think": target.think,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "seed": seed,
    }


def sample_answer(target: Target, row: Row, rule: str, record: Record) -> dict[str, Any]:
    """The answer to a first turn, token by token, for the report."""
    pieces = Pieces(target.chat_tokenizer, special=True)
    tokens = [
        {"id": t.id, "text": pieces.add(t.id), "tag": t.tag, "margin": t.margin, "regret": t.regret}
        for t in record.tagged[: len(record.outputs[0])]
    ]
    return {"prompt": row["turns"][0], "rule": rule, "tokens": tokens}


def sampled(rows: Sequence[Row]) -> list[int]:
    """Places of the rows whose answers the report shows: the first of each of the first tasks."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.get("task") or row["category"], i)
    return list(first.values())[:_SAMPLES]


def evaluate(
    decoders: Mapping[str, Decoder], rows: Sequence[Row], plan: Plan, out: Path, frontier: Sequence[Row] = ()
) -> dict[str, Any]:
    """Measure what `plan` says, and write `results.json`, `answers.jsonl`, `table.md` and `report.html` into `out`.

    Every finished answer is kept in `out/progress.jsonl` until all are there, so that the same call goes on after an
    interruption. With `plan.trace` so is every batch's trace, in `out/progress.traces`; joined, they are `out/traces`.

    Args:
        decoders: By the name of their draft, over one target; the rules are left out for a draft named `none`.
        rows: Of `read_tasks`; to be scored, they must have references.
        plan: The grid.
        out: An existing folder.
        frontier: What the head was chosen from when it was tuned, for the report.

    Raises:
        SlipstreamError: If a prompt does not fit, a rule cannot judge a draft's trees, `out` holds another run, or programs
            cannot be scored here.
    """
    first = next(iter(decoders.values()))
    target = first.target
    contenders = [Contender(rule, None, first) for rule in BASELINES]
    prints = {draft: fingerprint(decoder.drafter) for draft, decoder in decoders.items()}
    contenders += [
        Contender(rule, draft, decoder, prints[draft])
        for draft, decoder in decoders.items()
        for rule in (plan.rules if draft != "none" else ())
    ]
    _check_lengths(target, rows, plan.max_new_tokens)
    _check_rules(decoders, plan)
    sandbox = isolation() if plan.score and any("test" in row for row in rows) else None  # or an error, before the work
    said = header(target, ", ".join(decoders), plan.seed)
    settings = {
        **{name: said[name] for name in ("target", "device", "dtype", "think")},
        "weights": weights_fingerprint(target),
        "drafts": [[name, digest([d.policy.to_dict(), prints[name]])] for name, d in decoders.items()],
        "prompts": digest([[row["task"], row["turns"]] for row in rows]),
        **json.loads(json.dumps(asdict(plan))),
    }
    if plan.score:
        settings["references"] = digest([[row.get(key) for key in _REFERENCES] for row in rows])
    if (out / "results.json").is_file():
        return _finished(out, settings)
    # Answers are kept by the place of their draft, and do not depend on scores.
    begun = {name: value for name, value in settings.items() if name not in ("score", "references")}
    records = measure(contenders, rows, plan, out / _JOURNAL, out / _PARTS, begun)
    groups = [group for groups in records.values() for group in groups]
    measure_likelihood(target, rows, groups)
    if plan.score:
        score_records(target, rows, groups)
    baseline, *_ = records[plan.settings[0]]
    results = {
        **said,
        "plan": asdict(plan),
        "settings": settings,
        "rows": [row for setting in plan.settings for row in _rows(decoders, plan, setting, records[setting])],
        **_policies(decoders),
        **({"sandbox": sandbox.to_dict()} if sandbox else {}),
        "distributions": signal_samples(target, rows, baseline),
        "samples": [
            sample_answer(target, rows[i], _name(contender, decoders), group[i])
            for i in sampled(rows)
            for contender, group in zip(contenders, records[plan.settings[0]], strict=True)
            if contender.draft is not None
        ],
        **({"traces": _join_traces(decoders, contenders, rows, plan, out)} if plan.trace else {}),
        **({"frontier": list(frontier)} if frontier else {}),
    }
    write_atomic(out / "answers.jsonl", answer_lines(decoders, contenders, rows, plan, records))
    write_atomic(out / "table.md", card_tables(results))
    write_report(out / "report.html", results)
    write_atomic(out / "results.json", json.dumps(results, indent=1))
    for name in (_JOURNAL, f"{_JOURNAL}.settings.json"):
        (out / name).unlink()
    shutil.rmtree(out / _PARTS, ignore_errors=True)  # a run that was begun otherwise may have left some
    console.print(results_table(results))
    return results


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in a folder, if they are those of these settings."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    before = results.get("settings", {})
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        raise SlipstreamError(f"{out} holds the results of another run ({', '.join(changed)}); give another --out")
    console.print(f"this run is finished; nothing was changed. Report: {out / 'report.html'}")
    console.print(results_table(results))
    return results


def answer_lines(
    decoders: Mapping[str, Decoder],
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    plan: Plan,
    records: Mapping[Setting, Groups],
) -> str:
    """Spec-Bench's `answers.jsonl`: one line per answer; `model_id` names the rule and what else sets it apart."""
    tokenizer, lines, now = contenders[0].decoder.target.chat_tokenizer, [], time.time()
    for setting, groups in records.items():
        for contender, group in zip(contenders, groups, strict=True):
            model = _model(contender, decoders, plan, setting)
            for row, record in zip(rows, group, strict=True):
                choice = {
                    "index": 0,
                    "turns": record.texts(tokenizer),
                    "decoding_steps": record.turn_rounds,
                    "new_tokens": [len(ids) for ids in record.outputs],
                    "wall_time": record.turn_seconds,
                    "accept_lengths": record.accept_lengths if record.tagged else [1] * record.tokens,
                }
                entry = {
                    "question_id": row["question_id"],
                    "category": row["category"],
                    "answer_id": f"{row['place']} {model}",
                    "model_id": model,
                    "choices": [choice],
                    "tstamp": now,
                    "task": row["task"],
                    "seed": record.seed,
                    "log_likelihood": record.log_likelihood,
                    "scores": record.scores,
                }
                lines.append(json.dumps(entry, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _check_lengths(target: Target, rows: Sequence[Row], max_new_tokens: int) -> None:
    """A conversation that may not fit fails before anything runs; its last answer may be cut short."""
    for row in rows:
        questions = sum(len(target.encode_prompt([{"role": "user", "content": text}])) for text in row["turns"])
        answers = (len(row["turns"]) - 1) * max_new_tokens
        if questions + answers >= target.context:
            before = f" and up to {answers} of answers before its last turn" if answers else ""
            raise SlipstreamError(
                f"{row['place']}: the prompt has {questions} tokens{before}, the context of {target.name} is "
                f"{target.context}; {'give fewer --max_new_tokens or ' if answers else ''}leave it out"
            )


def _check_rules(decoders: Mapping[str, Decoder], plan: Plan) -> None:
    """A rule that cannot judge a draft's trees fails before anything runs."""
    drawn = [d for name, d in decoders.items() if name != "none"] if any(plan.temperatures) else []
    for decoder, rule in itertools.product(drawn, plan.rules):
        tree = decoder.policy.tree
        require_drawn(decoder.policy.rule(rule), tree.sampled, tree.size == tree.depth + 1)


def _rows(decoders: Mapping[str, Decoder], plan: Plan, setting: Setting, groups: Groups) -> list[Row]:
    """Rows of `results.json` for one setting: the baselines once, then each draft's rules."""
    short = short_names(list(decoders))
    rest = iter(groups[len(BASELINES) :])
    heat = setting.temperature
    checked = heat == 0 and next(iter(decoders.values())).target.dtype == torch.float32
    out: list[Row] = []
    for place, (draft, decoder) in enumerate(decoders.items()):
        names = [*BASELINES, *(plan.rules if draft != "none" else ())]
        mine = [*groups[: len(BASELINES)], *(next(rest) for _ in names[len(BASELINES) :])]
        identical = identical_outputs(mine, names) if checked else None
        for row in judged_rows(decoder, names, mine, temperature=heat, seed=plan.seed, identical=identical):
            drafted = row["rule"] not in BASELINES
            if drafted or not place:
                own = short[draft] if drafted and len(decoders) > 1 else None
                out.append({**row, "batch_size": setting.batch_size, "draft": own})
    return out


def judged_rows(
    decoder: Decoder,
    rules: Sequence[str],
    records: Groups,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    identical: dict[str, bool] | None = None,
) -> list[Row]:
    """Rows of `result_rows`, each with its output's fidelity and scores.

    A lossy rule is compared with `exact` under the same draft, where that was measured: up to the first relaxed token the
    two compute the same forwards, so that rounding does not count as relaxation. All else is compared with `generate`.
    """
    rows = result_rows(decoder, rules, records, temperature=temperature, seed=seed, identical=identical)
    pairs = [(chosen, group) for chosen in by_task(records).values() for group in chosen]
    out: list[Row] = []
    for row, (chosen, group) in zip(rows, pairs, strict=True):
        judge = "autoregressive" if row["lossless"] or "exact" not in rules else "exact"
        strict = chosen[rules.index(judge)]
        out.append(
            {
                **row,
                "compared_with": judge,
                "agreement": agreement(strict, group, seed) if temperature == 0 else None,
                **likelihood(group, seed),
                "regret_quantiles": regret_quantiles(group),
                "relaxed_margins": relaxed_margins(group),
                "regret_by_length": regret_by_length(group),
                "scores": score_means(strict, group, seed),
            }
        )
    return out


def _join_traces(
    decoders: Mapping[str, Decoder], contenders: Sequence[Contender], rows: Sequence[Row], plan: Plan, out: Path
) -> dict[str, str]:
    """Write the trace of each draft, rule and setting; their files, below `out`, by the `model_id` of their answers."""
    (out / "traces").mkdir(exist_ok=True)
    files = {}
    for (setting, who), parts in trace_parts(contenders, rows, plan, out / _PARTS).items():
        model = _model(contenders[who], decoders, plan, setting)
        files[model] = f"traces/{quote(model, safe=' =,')}.arrow"
        join(out / files[model], parts)
    return files


def _policies(decoders: Mapping[str, Decoder]) -> dict[str, Any]:
    """How the drafts were used; of several, which short name stands for which."""
    policies = {draft: decoder.policy.to_dict() for draft, decoder in decoders.items()}
    if len(policies) == 1:
        return {"policy": next(iter(policies.values()))}
    return {"policies": policies, "drafts": short_names(list(decoders))}


def short_names(drafts: Sequence[str]) -> dict[str, str]:
    """Each draft's path without what all of them begin and end with: runs/a/draft and runs/b/draft are `a` and `b`."""
    parts = {draft: draft.split("/") for draft in drafts}
    while len(parts) > 1 and all(len(p) > 1 for p in parts.values()) and len({p[0] for p in parts.values()}) == 1:
        parts = {draft: p[1:] for draft, p in parts.items()}
    while len(parts) > 1 and all(len(p) > 1 for p in parts.values()) and len({p[-1] for p in parts.values()}) == 1:
        parts = {draft: p[:-1] for draft, p in parts.items()}
    return {draft: "/".join(p) for draft, p in parts.items()}


def _name(contender: Contender, decoders: Mapping[str, Decoder]) -> str:
    """The rule, behind its draft where there are several."""
    if contender.draft is None or len(decoders) == 1:
        return contender.rule
    return f"{short_names(list(decoders))[contender.draft]} {contender.rule}"


def _model(contender: Contender, decoders: Mapping[str, Decoder], plan: Plan, setting: Setting) -> str:
    """What answers and traces are told apart by: draft and rule, temperature and batch size where there are several."""
    heat = f" T={setting.temperature:g}" if len(plan.temperatures) > 1 else ""
    size = f" batch={setting.batch_size}" if len(plan.batch_sizes) > 1 else ""
    return _name(contender, decoders) + heat + size
