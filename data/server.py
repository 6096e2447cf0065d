"""Answers by a target behind an OpenAI-compatible server: many conversations at a time, each a unit of the journal."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, BadRequestError, UnprocessableEntityError
from openai.types.chat import ChatCompletion

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import console, progress
from slipstream.data.journal import Journal
from slipstream.data.regenerate import Conversation, made_of, require_drawable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_RETRIES = 8  # of a request, on 429, 5xx and lost connections: after 0.5 s, then twice as long each time, up to 8 s
_REFUSED = 0.05  # share of the prompts a server may refuse, too long ones for instance
_AGAIN = "the same command goes on where it stopped"
_HINTS = {
    401: "; set OPENAI_API_KEY to its key",
    403: "; set OPENAI_API_KEY to its key",
    404: "; --server must end in /v1, and --target be the model's name there",
}


def regenerate(
    url: str,
    model: str,
    prompts: Sequence[dict[str, Any]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    think: bool | None = None,
    max_response_tokens: int | None = None,
    parallel: int = 32,
    out: Path,
) -> None:
    """Let a server's model answer all turns of every prompt row, `parallel` rows at a time.

    Prompts, temperatures and rows are those of `data.regenerate`; `think` goes to the server's chat template.
    Resumable to the row; rows stand in the file in the order in which they were finished. A thought that the server
    keeps apart from the answer becomes the message's `reasoning_content`, for the template to write. The key, where
    the server wants one, is `OPENAI_API_KEY`.

    Raises:
        SlipstreamError: If the server cannot be reached, fails in spite of retries, or refuses too many prompts.
    """
    if parallel < 1:
        raise SlipstreamError(f"--parallel must be at least 1, not {parallel}")
    require_drawable(temperatures, max_new_tokens)
    settings = {**made_of(model, prompts, temperatures, max_new_tokens, seed, think), "server": True}
    refused: list[str] = []
    with Journal(out, settings) as journal, progress("answers by the server", len(prompts), "rows") as advance:
        done = journal.units
        advance(len(done))
        tokens = sum(row["tokens"] for row in journal.rows())
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        todo = iter([i for i in order if i not in done])

        async def work(client: AsyncOpenAI) -> None:
            nonlocal tokens
            for i in todo:
                if max_response_tokens is not None and tokens >= max_response_tokens:
                    return
                talk = Conversation(prompts[i], temperatures[i % len(temperatures)], think)
                try:
                    await _converse(client, model, talk, max_new_tokens, f"{seed}/{i}")
                except (BadRequestError, UnprocessableEntityError) as error:
                    refused.append(f"prompt {prompts[i]['question_id']}: {_told(error)}")
                    if len(refused) > _REFUSED * len(prompts):
                        raise
                    continue
                tokens += talk.tokens
                journal.append(i, [talk.row()])
                advance(note=f"{tokens:,} tokens")

        async def work_all() -> None:
            key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
            async with AsyncOpenAI(base_url=url, api_key=key, max_retries=_RETRIES) as client:
                await asyncio.gather(*(work(client) for _ in range(parallel)))

        try:
            asyncio.run(work_all())
        except APIConnectionError as error:
            raise SlipstreamError(f"{url} cannot be reached: {error.__cause__ or error}; {_AGAIN}") from error
        except APIStatusError as error:
            hint = _HINTS.get(error.status_code, "")
            raise SlipstreamError(f"{url} answers {error.status_code}{hint}: {_told(error)}; {_AGAIN}") from error
    if refused:
        note = f"{len(refused):,} of {len(prompts):,} prompts were refused by the server, the first: {refused[0]}"
        console.print(note, markup=False, soft_wrap=True)


async def _converse(client: AsyncOpenAI, model: str, talk: Conversation, max_new_tokens: int, seed: str) -> None:
    """Have all turns of a conversation answered."""
    options = {} if talk.think is None else {"chat_template_kwargs": {"enable_thinking": talk.think}}
    while talk.ask():
        reply = await client.chat.completions.create(
            model=model,
            messages=talk.messages,
            temperature=talk.temperature,
            top_p=1.0,
            max_tokens=max_new_tokens,
            seed=random.Random(f"{seed}/{len(talk.messages)}").getrandbits(31),
            extra_body=options,
        )
        if not isinstance(reply, ChatCompletion) or not reply.choices or reply.usage is None:
            raise SlipstreamError(
                f"{client.base_url} gives no chat completion with its usage, but {str(reply)[:200]!r}"
            )
        message = reply.choices[0].message
        answer = {"role": "assistant", "content": message.content or ""}
        beside = message.model_extra or {}
        if thought := beside.get("reasoning_content") or beside.get("reasoning"):  # vLLM's newer name for it
            answer["reasoning_content"] = thought
        finished = reply.choices[0].finish_reason == "stop"
        talk.hear(answer, finished=finished, tokens=reply.usage.completion_tokens)


def _told(error: APIStatusError) -> str:
    """The server's own words, in one line."""
    return " ".join(error.response.text.split())[:300]
