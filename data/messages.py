"""Rows of the shapes conversations are published in, as lists of messages."""

from __future__ import annotations

import json
from typing import Any

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.data.template import Message

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def require_text(value: Any) -> None:
    """Make sure that all of a JSON value's text can be written as UTF-8.

    Raises:
        SlipstreamError: If it holds half of a surrogate pair, which JSON can spell and no tokenizer reads, or is nested
            too deeply.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise SlipstreamError(f"holds {half}, half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise SlipstreamError("nested too deeply") from error


def normalize(row: Any) -> list[Message]:
    """The messages of a row, `{"role", "content"}` each and whatever else a template may read from them.

    Known shapes: `messages`; ShareGPT's `conversations` (`from`, `value`); `turns` with as many `answers`;
    `instruction`, perhaps with an `input`, and `response` or `output`.

    Raises:
        SlipstreamError: If the row has none of them; it says what is wrong, not where.
    """
    if not isinstance(row, dict):
        raise SlipstreamError("not a JSON object")
    require_text(row)
    filled = {name: value for name, value in row.items() if value is not None}  # Arrow has every column in every row
    for name in ("messages", "conversations"):
        if name in filled:
            return _listed(name, filled[name])
    if "turns" in filled:
        return _paired(filled["turns"], filled.get("answers"))
    if "instruction" in filled:
        return _instructed(filled)
    raise SlipstreamError(
        f"needs 'messages', 'conversations', 'turns' with 'answers', or 'instruction', has {', '.join(filled)}"
    )


def _listed(name: str, entries: Any) -> list[Message]:
    if not isinstance(entries, list) or not entries:
        raise SlipstreamError(f"{name!r} must be a list of messages, at least one")
    return [_message(name, entry) for entry in entries]


def _message(name: str, entry: Any) -> Message:
    speaks = isinstance(entry, dict) and "from" in entry
    keys = ("from", "value") if speaks else ("role", "content")
    if isinstance(entry, dict) and entry.get("tool_calls") and entry.get("content") is None:
        entry = {**entry, "content": ""}  # as OpenAI writes a message that only calls tools
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise SlipstreamError(f"{name!r} must be a list of {{{', '.join(keys)}}} texts")
    role, content = (entry[key] for key in keys)
    if speaks and role not in _SPEAKERS:
        raise SlipstreamError(f"unknown speaker {role!r}{near(role, _SPEAKERS)}")
    rest = {key: value for key, value in entry.items() if key not in keys and value is not None}
    return {**rest, "role": _SPEAKERS[role] if speaks else role, "content": content}


def _paired(turns: Any, answers: Any) -> list[Message]:
    texts = isinstance(turns, list) and isinstance(answers, list) and all(isinstance(t, str) for t in turns + answers)
    if not texts or not turns or len(turns) != len(answers):
        raise SlipstreamError("'turns' and 'answers' must be lists of texts of the same length, at least one")
    return [
        message
        for turn, answer in zip(turns, answers, strict=True)
        for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": answer})
    ]


def _instructed(row: dict[str, Any]) -> list[Message]:
    asked = [row["instruction"], *([row["input"]] if row.get("input") else [])]
    answer: Any = row.get("response", row.get("output"))
    if not all(isinstance(text, str) for text in [*asked, answer]):
        raise SlipstreamError("'instruction', 'input' and 'response' or 'output' must be texts")
    return [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": answer}]
