"""Commands that decode: `generate`, `evaluate`, `tune`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from slipstream.distill.target import Target

Dtype = Literal["bfloat16", "float16", "float32"]
Schedule = Literal["fixed", "heuristic", "confidence", "entropy", "cost"]


def generate(
    prompt: str | None = None,
    target: str = "smollm2-135m-instruct",
    draft: str = "none",
    verify: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    device: str | None = None,
    schedule: Schedule | None = None,
    think: bool | None = None,
    adapter: str | None = None,
    compiled: bool = False,
    quiet: bool = False,
) -> None:
    """Answer a prompt, or chat; accepted tokens are coloured by tag.

    Args:
        prompt: The user's message. Without one, standard input is the message; on a terminal, a chat begins, which an
            empty line or Ctrl-D ends.
        target: The target model.
        draft: A head's folder or hub id, `ngram` (prompt look-up), a causal LM with the same tokenizer, or `none`.
        verify: `exact`, `mars`, another rule, or the one in the head's decode.json.
        temperature: 0 is greedy.
        max_new_tokens: Per answer, exact to the token.
        seed: Of the draws.
        dtype: Of target and draft.
        device: `cpu`, `cuda`, `cuda:1`, ..; default: a card where there is one.
        schedule: How the tree changes from round to round; default: as in the head's decode.json.
        think: Whether answers think before they speak, for templates with `enable_thinking`; default: as the head was
            trained.
        adapter: A peft adapter of the target, folder or hub id; default: as the head was trained.
        compiled: Run the target through torch.compile: faster, after a minute the first time.
        quiet: Only the text: no colours, no line of statistics.
    """
    from dataclasses import replace

    import torch

    import slipstream
    from slipstream.data.template import written
    from slipstream.decode.speculation import Speculation
    from slipstream.decode.stream import TagStream

    chat = prompt is None and sys.stdin.isatty()
    if prompt is None and not chat:
        prompt = sys.stdin.read().strip()
    if not chat and not (prompt or "").strip():
        raise SlipstreamError("no prompt: give --prompt, or write one to standard input")
    loaded = _load_target(target, [draft], dtype, device, think, adapter)
    decoder = slipstream.load(loaded, draft, compiled=compiled)
    if schedule is not None:
        decoder.policy = replace(decoder.policy, speculation=Speculation(schedule))
    tokenizer = decoder.target.chat_tokenizer
    if compiled:  # now, so that no answer's statistics tell of it
        greeting = torch.tensor([decoder.target.encode_prompt([{"role": "user", "content": "Hello"}])])
        decoder.generate(greeting, max_new_tokens=4, eos_token_id=None)
    messages: list[dict[str, str]] = []
    while message := prompt if prompt is not None else _ask():
        messages.append({"role": "user", "content": message})
        stream = TagStream(tokenizer, plain=quiet or draft == "none")
        out = decoder.generate(
            torch.tensor([decoder.target.encode_prompt(messages)]),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            verify=verify,
            seed=seed,
            on_tokens=stream.put,
        )
        stream.end()
        if not quiet:
            stream.statistics(out.stats)
        if not chat:
            return
        text = written(tokenizer, [token.id for token in out.tokens])
        messages.append({"role": "assistant", "content": text})


def _load_target(
    name: str, drafts: list[str], dtype: Dtype, device: str | None, think: bool | None, adapter: str | None
) -> Target:
    """The target as it was where the heads were trained: told the same about thinking, with the same adapter.

    What was asked for goes before that.

    Raises:
        SlipstreamError: If nothing was asked for, and the heads differ.
    """
    from slipstream.distill.heads import is_head, locate, trained_adapter, trained_think
    from slipstream.distill.target import find_device, load_target

    places = {draft: locate(draft) for draft in drafts if draft not in ("none", "ngram")}
    heads = {draft: folder for draft, folder in places.items() if is_head(folder)}
    if think is None:
        think = _agreed("think", {draft: trained_think(folder) for draft, folder in heads.items()})
    if adapter is None:
        adapter = _agreed("adapter", {draft: trained_adapter(folder, name) for draft, folder in heads.items()})
    return load_target(name, dtype=dtype, device=find_device(device), think=think, adapter=adapter)


def _agreed(option: str, told: dict[str, Any]) -> Any:
    """What all heads were trained with."""
    if len(set(told.values())) > 1:
        words = ", ".join(f"{draft} with {option} {json.dumps(value)}" for draft, value in told.items())
        raise SlipstreamError(f"the heads were trained differently ({words}); give --{option}")
    return next(iter(told.values()), None)


def _ask() -> str:
    """The next message of a chat; empty at its end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def evaluate(
    out: Path,
    target: str = "smollm2-135m-instruct",
    draft: list[str] = ["none"],  # noqa: B006 (jsonargparse copies defaults)
    prompts: list[Path] = [],  # noqa: B006
    rules: list[str] = ["exact", "mars"],  # noqa: B006
    temperature: list[float] = [0.0],  # noqa: B006
    batch_size: list[int] = [1],  # noqa: B006
    limit: int | None = None,
    max_new_tokens: int = 128,
    score: bool = False,
    trace: bool = False,
    dtype: Dtype = "bfloat16",
    device: str | None = None,
    seed: int = 0,
    think: bool | None = None,
    adapter: str | None = None,
    compiled: bool = False,
    card: bool = False,
) -> None:
    """Measure rules and heads against transformers' generate: results.json, answers.jsonl, table.md, report.html.

    Options that say "one or several" take several values: --temperature 0 1. What is interrupted goes on when the same
    command is given again.

    Args:
        out: Folder for the results.
        target: The target model.
        draft: One or several: a head's folder or hub id, `ngram`, a causal LM with the same tokenizer, or `none`.
        prompts: One or several JSONL files of Spec-Bench, HumanEval or GSM8K rows; default: the held-out prompts that
            ship with the package.
        rules: One or several, beside the two baselines: `exact`, `mars` (as tuned), `mars:margin=0.5,regret=10`, ..
        temperature: One or several; 0 is greedy.
        batch_size: One or several: prompts that are answered together.
        limit: Only the first prompts of each file.
        max_new_tokens: Per turn.
        score: Score the answers: HumanEval's tests, GSM8K's numbers, ROUGE-L against other references.
        trace: Record every round of every draft and rule into traces/*.arrow; the time that takes is not counted.
        dtype: Of target and head; whether outputs are identical is only claimed in float32.
        device: `cpu`, `cuda`, `cuda:1`, ..; default: a card where there is one.
        seed: Of draws and intervals.
        think: Whether answers think before they speak; default: as the heads were trained.
        adapter: A peft adapter of the target, folder or hub id; default: as the heads were trained.
        compiled: Run the target through torch.compile, for batches of one: faster, after a minute the first time.
        card: Write the measured table into the model card (README.md) of the head's folder as well.
    """
    import slipstream
    from slipstream.configs.files import require_writable
    from slipstream.decode.card import write_card
    from slipstream.decode.frontier import load_frontier
    from slipstream.decode.plan import Plan
    from slipstream.decode.report import require_figures
    from slipstream.decode.suite import evaluate as measure
    from slipstream.decode.tasks import read_tasks, require_references
    from slipstream.distill.heads import check_head

    plan = Plan(tuple(rules), tuple(temperature), tuple(batch_size), max_new_tokens, seed, score, trace)
    if card and (len(draft) > 1 or not Path(draft[0]).is_dir()):
        raise SlipstreamError(f"--card needs one draft head's folder, which {' '.join(draft)} is not")
    if card:
        check_head(Path(draft[0]))
    if trace and draft == ["none"]:
        raise SlipstreamError("--trace records rounds of drafts, and there is none; give --draft")
    rows = read_tasks(prompts, limit)
    if score:
        require_references(rows)
    loaded = _load_target(target, draft, dtype, device, think, adapter)
    decoders = {name: slipstream.load(loaded, name, compiled=compiled) for name in draft}
    require_figures()
    require_writable(out, 10)
    frontier = load_frontier(Path(draft[0]), decoders[draft[0]].policy) if len(draft) == 1 else []
    results = measure(decoders, rows, plan, out, frontier)
    if card:
        write_card(Path(draft[0]), loaded.name, results=results)


def tune(
    draft: Path,
    target: str = "smollm2-135m-instruct",
    prompts: list[Path] = [],  # noqa: B006 (jsonargparse copies defaults)
    budget: str = "regret=0.02",
    trace: Path | None = None,
    max_new_tokens: int = 96,
    dtype: Dtype = "bfloat16",
    device: str | None = None,
    think: bool | None = None,
    adapter: str | None = None,
    compiled: bool = False,
) -> None:
    """Choose tree, rule and schedule for this device within a budget of fidelity, into the head's folder.

    decode.json is the policy with what was measured, frontier.json all points that it was chosen from.

    Args:
        draft: The head's folder.
        target: The target model.
        prompts: One or several JSONL files of Spec-Bench, HumanEval or GSM8K rows; default: the tuning prompts that ship
            with the package.
        budget: `strict` (exact decoding), `regret=0.02` (nats per token at most), `agreement=0.98` (the least share of
            tokens before the first difference from the exact output), or `task=0.981` (the least share of the exact
            policy's task score, on prompts with references).
        trace: Where to keep what was recorded; a trace that is there is used, not recorded again.
        max_new_tokens: Per turn; of the prompts that are recorded, only first turns are asked.
        dtype: Of target and head.
        device: The one to tune for: `cpu`, `cuda`, `cuda:1`, ..; default: a card where there is one.
        think: Whether answers think before they speak; default: as the head was trained.
        adapter: A peft adapter of the target, folder or hub id; default: as the head was trained.
        compiled: Tune for a target run through torch.compile, as `--compiled` of the other commands does.
    """
    import slipstream
    from slipstream.configs.progress import console
    from slipstream.decode.budget import Budget
    from slipstream.decode.frontier import FILE as FRONTIER
    from slipstream.decode.frontier import frontier_table, gain, save_frontier
    from slipstream.decode.policy import FILE
    from slipstream.decode.tasks import read_tasks, require_references, tuning_prompts
    from slipstream.decode.tune import tune as search
    from slipstream.distill.heads import check_head

    if max_new_tokens < 1:
        raise SlipstreamError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check_head(draft)  # not only on the hub: its folder is written to
    limit = Budget.parse(budget)  # fails before anything runs
    rows = read_tasks(prompts) if prompts else tuning_prompts()
    if limit.kind == "task":
        require_references(rows, "--budget task")
    loaded = _load_target(target, [str(draft)], dtype, device, think, adapter)
    decoder = slipstream.load(loaded, draft, compiled=compiled)
    policy, points = search(decoder, rows, budget=limit, max_new_tokens=max_new_tokens, trace=trace)
    policy.save(draft)
    save_frontier(draft, points)
    console.print(frontier_table(points))
    if gained := gain(policy.measured):
        console.print(gained)
    console.print(f"policy: {draft / FILE}   all points: {draft / FRONTIER}")
