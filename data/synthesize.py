"""Prompts nobody had to collect: sampled from the target itself, and crossed from the topics that ship with the package."""

from __future__ import annotations

import random
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.data.journal import Journal
from slipstream.data.template import user_turn, written

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from slipstream.data.regenerate import Sample

_FIELD = re.compile(r"{(\w+)}")
_BARREN = 20  # batches in a row without a new prompt, after which no more are drawn


def topic_prompts(count: int, seed: int) -> list[dict[str, Any]]:
    """Some `count` distinct prompts from `data/topics.yaml`: rows of `question_id`, `category`, `turns`.

    Each group's share is rounded, and a small group may hold fewer. The same seed gives the same prompts; a larger
    count extends the list of a smaller one in every group.
    """
    topics = yaml.safe_load((files("slipstream.data") / "topics.yaml").read_text())
    lists: dict[str, list[str]] = topics["lists"]
    rows: list[dict[str, Any]] = []
    for group, spec in topics["groups"].items():
        draw = random.Random(f"{seed}/{group}")

        def fill(match: re.Match[str], draw: random.Random = draw) -> str:
            name = match.group(1)
            return str(draw.randint(2, 99)) if name == "number" else draw.choice(lists[name])

        seen: set[str] = set()
        wanted = round(count * spec["share"])
        for _ in range(50 * wanted):  # small groups may hold fewer distinct prompts than asked for
            if len(seen) == wanted:
                break
            text = _FIELD.sub(fill, draw.choice(spec["text"]))
            if text not in seen:
                seen.add(text)
                rows.append({"question_id": f"{group}-{len(seen)}", "category": group, "turns": [text]})
    return rows


def self_prompts(
    target: str,
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seed: int,
    temperature: float = 1.0,
    max_prompt_tokens: int = 96,
    batch_size: int = 160,
    out: Path,
) -> None:
    """Sample `count` distinct prompts from the target after the opening of a user turn; resumable to the batch.

    Prompts the target did not finish, and repeats, are dropped.

    Raises:
        SlipstreamError: If batch after batch holds no new prompt.
    """
    opening, closing = user_turn(tokenizer)
    settings = {"target": target, "seed": seed, "temperature": temperature, "batch": batch_size}
    with Journal(out, settings) as journal, progress("prompts by the target", count, "prompts") as advance:
        seen = {row["turns"][0] for row in journal.rows()}
        advance(len(seen))
        unit, barren = journal.next_unit, 0
        while len(seen) < count:
            if barren == _BARREN:
                raise SlipstreamError(
                    f"{target} wrote no new prompt in {barren} batches of {batch_size}, after {len(seen):,} of {count:,}; "
                    f"ask for no more than those (--own {len(seen)})"
                )
            drawn = sample(
                [opening] * batch_size,
                [temperature] * batch_size,
                max_new_tokens=max_prompt_tokens,
                stop_ids=sorted({*closing, *tokenizer.all_special_ids}),
                seed=seed * 1_000_003 + unit,
            )
            rows = []
            for tokens in drawn:
                text = written(tokenizer, tokens[:-1], special=True).strip()
                if tokens[-1] in closing and len(text) >= 8 and text not in seen and len(seen) < count:
                    seen.add(text)
                    rows.append({"question_id": f"self-{len(seen)}", "category": "self", "turns": [text]})
            journal.append(unit, rows)
            advance(len(rows))
            barren = 0 if rows else barren + 1
            unit += 1
