"""Answers by the target itself: what a draft head must learn to foresee is this target's text, not a data set's."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import console, progress
from slipstream.data.journal import Journal, digest
from slipstream.data.template import encode_prompt, require_generation_prompt, thinking, written

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from slipstream.data.template import Message

    Sample = Callable[..., list[list[int]]]
    """Continues prompts: `decode.sampling.sample` with its target."""


@dataclass
class Conversation:
    """A prompt row whose turns are answered one after the other, each after the answers before it.

    Attributes:
        prompt: `question_id`, `category`, `turns`.
        temperature: Of the answers.
        think: What the chat template was told about thinking.
        messages: So far.
        finished: Whether the last answer came to its end; nothing is asked after one that did not.
        tokens: Of all answers.
        full: Whether the next question would leave no room for its answer; it is not asked then.
    """

    prompt: dict[str, Any]
    temperature: float
    think: bool | None
    messages: list[Message] = field(default_factory=list)
    finished: bool = True
    tokens: int = 0
    full: bool = False

    def ask(self) -> bool:
        """Put the next question, if there is one."""
        turn = len(self.messages) // 2
        if self.full or not self.finished or turn == len(self.prompt["turns"]):
            return False
        self.messages.append({"role": "user", "content": self.prompt["turns"][turn]})
        return True

    def retract(self) -> None:
        """Take the question put last back, and put no other."""
        self.messages.pop()
        self.full = True

    def hear(self, answer: Message, *, finished: bool, tokens: int) -> None:
        """Take the answer to the question put last."""
        self.messages.append(answer)
        self.finished = finished
        self.tokens += tokens

    def row(self) -> dict[str, Any]:
        """As conversations are kept in files."""
        return {
            "id": self.prompt["question_id"],
            "category": self.prompt["category"],
            "messages": self.messages,
            "temperature": self.temperature,
            "think": self.think,
            "finished": self.finished,
            "tokens": self.tokens,
        }


def require_drawable(temperatures: Sequence[float], max_new_tokens: int) -> None:
    """Make sure that answers can be drawn so.

    Raises:
        SlipstreamError: If a temperature is negative or no number, or answers may have no token.
    """
    if not temperatures or not all(0 <= temperature < math.inf for temperature in temperatures):
        raise SlipstreamError(f"--temperatures must be numbers from 0 on, at least one, not {list(temperatures)}")
    if max_new_tokens < 1:
        raise SlipstreamError(f"--max_new_tokens must be at least 1, not {max_new_tokens}")


def made_of(
    target: str,
    prompts: Sequence[dict[str, Any]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    think: bool | None,
) -> dict[str, Any]:
    """Settings of a journal of answers: another prompt would be another row of the same number."""
    asked = [[row["question_id"], row["category"], row["turns"]] for row in prompts]
    return {
        "target": target,
        "prompts": len(prompts),
        "prompts_digest": digest(asked),
        "temperatures": list(temperatures),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "think": think,
    }


def regenerate(
    target: str,
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    *,
    stop_ids: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    think: bool | None = None,
    max_response_tokens: int | None = None,
    batch_size: int = 160,
    context: int | None = None,
    out: Path,
) -> None:
    """Answer all turns of every prompt row, each up to a token of `stop_ids`.

    `sample` answers, with the target named `target`; prompt i at temperature `i mod len(temperatures)`. `think` goes to the
    chat template.
    Writes conversations (`Conversation.row`) as JSON lines, resumable to the batch: batches are fixed by the prompts,
    so that a resumed file holds the same rows as an uninterrupted one (in bf16 a row of half a batch is rounded, and
    soon worded, otherwise). They are answered in an order drawn from the seed, and none is begun once
    `max_response_tokens` are there.

    A prompt that leaves no room for `max_new_tokens` in the target's `context` is left out, and a note says so; where a
    later turn does not, the conversation ends before it.

    Raises:
        SlipstreamError: If the template has no generation prompt, or no option to think where `think` is set, or if no
            prompt leaves room for an answer.
    """
    require_drawable(temperatures, max_new_tokens)
    if batch_size < 1:
        raise SlipstreamError(f"--batch_size must be at least 1, not {batch_size}")
    options = thinking(tokenizer, think)
    require_generation_prompt(tokenizer, **options)
    firsts = [encode_prompt(tokenizer, [{"role": "user", "content": row["turns"][0]}], **options) for row in prompts]
    fitting = _fitting(target, prompts, firsts, max_new_tokens, context)
    order = sorted(fitting, key=lambda i: len(firsts[i]))  # rows of a batch need little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    settings = {**made_of(target, prompts, temperatures, max_new_tokens, seed, think), "batch": batch_size}
    todo = random.Random(seed).sample(range(len(batches)), len(batches))
    with Journal(out, settings) as journal, progress("answers by the target", len(order), "rows") as advance:
        done = journal.units
        advance(len(journal.rows()))
        tokens = sum(row["tokens"] for row in journal.rows())
        for unit in todo:
            if unit in done:
                continue
            if max_response_tokens is not None and tokens >= max_response_tokens:
                break
            talks = [Conversation(prompts[i], temperatures[i % len(temperatures)], think) for i in batches[unit]]
            _answer(
                sample,
                tokenizer,
                talks,
                options,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                seed=seed * 1_000_003 + unit,
                context=context,
            )
            tokens += sum(talk.tokens for talk in talks)
            journal.append(unit, [talk.row() for talk in talks])
            advance(len(talks), note=f"{tokens:,} tokens")


def _fitting(
    target: str,
    prompts: Sequence[dict[str, Any]],
    firsts: Sequence[Sequence[int]],
    max_new_tokens: int,
    context: int | None,
) -> list[int]:
    """The prompts whose first turn leaves room for an answer; says which others there are."""
    fitting = [i for i, first in enumerate(firsts) if context is None or len(first) + max_new_tokens <= context]
    if len(fitting) == len(prompts):
        return fitting
    why = f"room for {max_new_tokens:,} tokens (--max_new_tokens) in the context of {target}, {context:,}"
    if not fitting:
        raise SlipstreamError(f"no prompt leaves {why}; the shortest has {min(map(len, firsts)):,}")
    first = min(set(range(len(prompts))) - set(fitting))
    left_out = f"{len(prompts) - len(fitting):,} of {len(prompts):,} prompts leave no {why}, and are left out"
    note = f"{left_out}, the first: prompt {prompts[first]['question_id']}, {len(firsts[first]):,} tokens"
    console.print(note, markup=False, soft_wrap=True)
    return fitting


def _answer(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    options: dict[str, bool],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    context: int | None,
) -> None:
    """Have all turns of a batch of conversations answered, the first ones together, then the second ones, and so on."""
    for turn in itertools.count():
        asked: list[Conversation] = []
        prompts: list[list[int]] = []
        for talk in (talk for talk in talks if talk.ask()):
            prompt = encode_prompt(tokenizer, talk.messages, **options)
            if context is not None and len(prompt) + max_new_tokens > context:
                talk.retract()
            else:
                asked.append(talk)
                prompts.append(prompt)
        if not asked:
            return
        answers = sample(
            prompts,
            [talk.temperature for talk in asked],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            seed=seed + (turn << 40),
        )
        for talk, answer in zip(asked, answers, strict=True):
            finished = answer[-1] in stop_ids
            content = written(tokenizer, answer[:-1] if finished else answer, special=True)
            talk.hear({"role": "assistant", "content": content}, finished=finished, tokens=len(answer))
