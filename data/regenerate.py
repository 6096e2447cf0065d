"""Answers by the target itself: what a draft head must learn to foresee is this target's text, not a data set's."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from slipstream.configs.progress import progress
from slipstream.data.journal import Journal
from slipstream.data.sampling import sample
from slipstream.data.template import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def regenerate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    *,
    stop_ids: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    max_response_tokens: int | None = None,
    batch_size: int = 160,
    out: Path,
) -> None:
    """Answer the first turn of every prompt row, up to a token of `stop_ids`.

    Prompt i is sampled at temperature `i mod len(temperatures)`.
    Writes conversations (`messages`, `temperature`, `finished`) as JSON lines, resumable to the batch: batches are
    fixed by the prompts, so that a resumed file holds the same rows as an uninterrupted one. They are answered in an
    order drawn from the seed, and none is begun once `max_response_tokens` are there.
    """
    encoded = [encode_prompt(tokenizer, [{"role": "user", "content": row["turns"][0]}]) for row in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # rows of a batch need little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    settings = {
        "target": model.config.name_or_path,
        "prompts": len(prompts),
        "temperatures": list(temperatures),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch": batch_size,
    }
    todo = random.Random(seed).sample(range(len(batches)), len(batches))
    with Journal(out, settings) as journal, progress("answers by the target", len(prompts), "rows") as advance:
        advance(sum(len(batches[unit]) for unit in journal.units))
        tokens = sum(row["tokens"] for row in journal.rows())
        for unit in todo:
            if unit in journal.units:
                continue
            if max_response_tokens is not None and tokens >= max_response_tokens:
                break
            rows = batches[unit]
            heat = [temperatures[i % len(temperatures)] for i in rows]
            answers = sample(
                model,
                [encoded[i] for i in rows],
                heat,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                seed=seed * 1_000_003 + unit,
            )
            written = []
            for i, answer, temperature in zip(rows, answers, heat, strict=True):
                finished = answer[-1] in stop_ids
                tokens += len(answer)
                messages = [
                    {"role": "user", "content": prompts[i]["turns"][0]},
                    {"role": "assistant", "content": tokenizer.decode(answer[:-1] if finished else answer)},
                ]
                written.append(
                    {
                        "id": prompts[i]["question_id"],
                        "category": prompts[i]["category"],
                        "messages": messages,
                        "temperature": temperature,
                        "finished": finished,
                        "tokens": len(answer),
                    }
                )
            journal.append(unit, written)
            advance(len(rows), note=f"{tokens:,} tokens")
