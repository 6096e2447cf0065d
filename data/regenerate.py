"""Answers by the target itself: what a draft head must learn to foresee is this target's text, not a data set's."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slipstream.configs.progress import progress
from slipstream.data.journal import Journal
from slipstream.data.template import encode_prompt, require_generation_prompt, thinking

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
    """

    prompt: dict[str, Any]
    temperature: float
    think: bool | None
    messages: list[Message] = field(default_factory=list)
    finished: bool = True
    tokens: int = 0

    def ask(self) -> bool:
        """Put the next question, if there is one."""
        turn = len(self.messages) // 2
        if not self.finished or turn == len(self.prompt["turns"]):
            return False
        self.messages.append({"role": "user", "content": self.prompt["turns"][turn]})
        return True

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
        "prompts_digest": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
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
    out: Path,
) -> None:
    """Answer all turns of every prompt row, each up to a token of `stop_ids`.

    `sample` answers, with the target named `target`; prompt i at temperature `i mod len(temperatures)`. `think` goes to the
    chat template.
    Writes conversations (`Conversation.row`) as JSON lines, resumable to the batch: batches are fixed by the prompts,
    so that a resumed file holds the same rows as an uninterrupted one (in bf16 a row of half a batch is rounded, and
    soon worded, otherwise). They are answered in an order drawn from the seed, and none is begun once
    `max_response_tokens` are there.

    Raises:
        SlipstreamError: If the template has no generation prompt, or no option to think where `think` is set.
    """
    options = thinking(tokenizer, think)
    require_generation_prompt(tokenizer, **options)
    firsts = [encode_prompt(tokenizer, [{"role": "user", "content": row["turns"][0]}], **options) for row in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(firsts[i]))  # rows of a batch need little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    settings = {**made_of(target, prompts, temperatures, max_new_tokens, seed, think), "batch": batch_size}
    todo = random.Random(seed).sample(range(len(batches)), len(batches))
    with Journal(out, settings) as journal, progress("answers by the target", len(prompts), "rows") as advance:
        done = journal.units
        advance(sum(len(batches[unit]) for unit in done))
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
            )
            tokens += sum(talk.tokens for talk in talks)
            journal.append(unit, [talk.row() for talk in talks])
            advance(len(talks), note=f"{tokens:,} tokens")


def _answer(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    options: dict[str, bool],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
) -> None:
    """Have all turns of a batch of conversations answered, the first ones together, then the second ones, and so on."""
    for turn in itertools.count():
        asked = [talk for talk in talks if talk.ask()]
        if not asked:
            return
        answers = sample(
            [encode_prompt(tokenizer, talk.messages, **options) for talk in asked],
            [talk.temperature for talk in asked],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            seed=seed + (turn << 40),
        )
        for talk, answer in zip(asked, answers, strict=True):
            finished = answer[-1] in stop_ids
            content = tokenizer.decode(answer[:-1] if finished else answer)
            talk.hear({"role": "assistant", "content": content}, finished=finished, tokens=len(answer))
