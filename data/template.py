"""What the chat template itself says: turn openings, prompts and assistant spans. No list of named templates."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_PROBE = "SLIPSTREAMPROBE"  # no template writes this word by itself
_BEFORE = 64  # characters; tokens do not depend on text farther away


@dataclass(frozen=True)
class Rendered:
    """One conversation as token ids with the mask of what the assistant wrote.

    Attributes:
        input_ids: Token ids, length L.
        assistant_mask: Length L, 1 where the token was written by the assistant (its end-of-turn token included).
    """

    input_ids: list[int]
    assistant_mask: list[int]


def render_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompt: bool, **options: Any) -> str:
    """Render messages to text; with `prompt`, ending where the assistant's next turn begins.

    Raises:
        SlipstreamError: If the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise SlipstreamError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; set tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
    except Exception as error:  # jinja2 raises whatever the template's author chose
        raise SlipstreamError(f"the chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of the chat template, the same wherever and whenever it is taken."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that already carries its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids as it was written: no spaces taken out before commas, whatever the tokenizer's config says.

    Special tokens have a text where `special` says so.
    """
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> list[int]:
    """Token ids up to and including the opening of the assistant's next turn."""
    return encode(tokenizer, render_text(tokenizer, messages, prompt=True, **options))


def thinking(tokenizer: PreTrainedTokenizerBase, think: bool | None) -> dict[str, bool]:
    """The template's option that lets answers think, or not; None leaves it to the template.

    Raises:
        SlipstreamError: If the template has no such option.
    """
    if think is None:
        return {}
    asked = [{"role": "user", "content": _PROBE}]
    if render_text(tokenizer, asked, prompt=True, enable_thinking=True) == render_text(
        tokenizer, asked, prompt=True, enable_thinking=False
    ):
        raise SlipstreamError("the chat template has no option enable_thinking; leave think unset")
    return {"enable_thinking": think}


def require_generation_prompt(tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Make sure that a prompt ends where the assistant's text begins.

    Templates need no generation prompt where the user's closing is the assistant's opening (`[/INST]`).

    Raises:
        SlipstreamError: If the template writes something between the two.
    """
    asked = [{"role": "user", "content": "Hi"}]
    bare, prompt = (render_text(tokenizer, asked, prompt=asks, **options) for asks in (False, True))
    answered = render_text(tokenizer, [*asked, {"role": "assistant", "content": _PROBE}], prompt=False, **options)
    opening = answered.partition(_PROBE)[0].removeprefix(bare)
    if prompt == bare and opening.strip():
        raise SlipstreamError(
            f"the chat template has no generation prompt: add_generation_prompt must write {opening!r} behind the messages"
        )


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that open a user's first turn, and the ids that end it.

    A target sampled after the opening writes prompts of the kind it was trained on (Magpie, arXiv 2406.08464).
    """
    text = render_text(tokenizer, [{"role": "user", "content": _PROBE}], prompt=True)
    before, found, _ = text.partition(_PROBE)
    if not found:
        raise SlipstreamError("the chat template drops the user's message; prompts cannot be synthesized with it")
    return encode(tokenizer, before), _encode_at(tokenizer, text, len(before + found), len(text))[:1]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    finished: bool = True,
    max_length: int | None = None,
    **options: Any,
) -> Rendered:
    """Tokenize a conversation and mark the assistant's tokens, from the template alone.

    Each assistant message is replaced by a probe in turn; what surrounds the probe is the template's, what stands in
    its place in the real rendering is the assistant's. So is what the template writes between the generation prompt
    and the message (the opening of a thought), and the calls of tools behind it. The end-of-turn token counts as the
    assistant's, with whitespace before it, whether it is a special token or another added one; text that a template
    puts behind it does not.

    The ids are those of the whole text, except that no token reaches over the beginning or the end of an answer, as
    none does where the target answers a prompt.

    Worked example (ChatML): messages `[user "Hi", assistant "Yo"]` render to
    `<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n` + `Yo<|im_end|>` + `\\n`; the mask is 1 on
    `Yo<|im_end|>` only.

    Args:
        tokenizer: With the chat template.
        messages: The conversation.
        finished: Whether the last answer came to its end; the end of one that was cut short is not the assistant's.
        max_length: Leave out what stands behind the turn that reaches so many tokens.
        options: Of the template.

    Raises:
        SlipstreamError: If the template drops an assistant message.
    """
    whole = render_text(tokenizer, messages, prompt=False, **options)
    ending = _ending(tokenizer, **options)
    ids: list[int] = []
    mask: list[int] = []

    def add(start: int, end: int, learned: int) -> None:
        piece = _encode_at(tokenizer, whole, start, end)
        ids.extend(piece)
        mask.extend([learned] * len(piece))

    done = 0
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        if max_length is not None and len(ids) >= max_length:
            return Rendered(ids, mask)
        span = _span(tokenizer, messages, i, whole, **options)
        if span is None:
            continue
        start, end = max(done, span[0]), span[1]
        if messages[i].get("tool_calls"):
            end = _called(tokenizer, messages, i, whole, ending, **options) or end
        end = max(start, end)
        if finished or i < answers[-1]:
            closing = ending.match(whole, end)
            end = closing.end() if closing else end
        add(done, start, 0)
        add(start, end, 1)
        done = end
    add(done, len(whole), 0)
    return Rendered(ids, mask)


def _encode_at(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> list[int]:
    """Token ids of `text[start:end]` where it stands: SentencePiece marks the beginning of a text, and this is none.

    So the piece is tokenized behind what stands before it, or behind a newline where a token would reach over `start`.
    """
    piece = text[start:end]
    for before in (text[max(0, start - _BEFORE) : start], "\n"):
        lead, ids = encode(tokenizer, before), encode(tokenizer, before + piece)
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
    return encode(tokenizer, piece)


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], i: int, whole: str, **options: Any
) -> tuple[int, int] | None:
    """Where the text of the assistant's message i begins and ends in the rendered conversation.

    Templates may write no text beside calls of tools; None where it cannot be told then where the message begins.
    """
    probe = _PROBE
    while probe in whole:  # a conversation may speak of the probe
        probe += "X"
    probed = [*messages[:i], {**messages[i], "content": probe}, *messages[i + 1 :]]
    before, found, after = render_text(tokenizer, probed, prompt=False, **options).partition(probe)
    if not found and not messages[i].get("tool_calls"):
        raise SlipstreamError(f"the chat template drops the assistant's message {i}; its tokens cannot be found")
    start = len(commonprefix([before, whole])) if found else None  # noqa: RUF071 (characters are meant)
    if i and messages[i - 1]["role"] in ("user", "tool"):
        opened = render_text(tokenizer, messages[:i], prompt=True, **options)
        start = len(opened) if whole.startswith(opened) else start
    if start is None:
        return None
    return start, len(whole) - len(commonprefix([after[::-1], whole[::-1]])) if found else start  # noqa: RUF071


def _called(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    i: int,
    whole: str,
    ending: re.Pattern[str],
    **options: Any,
) -> int | None:
    """Where the text of message i ends with its calls; None where the template does not end the turn behind them."""
    told = render_text(tokenizer, messages[: i + 1], prompt=False, **options).rstrip()
    closings = [found.start() for found in ending.finditer(told) if found.end() == len(told)]
    return closings[0] if closings and whole.startswith(told) else None


def _ending(tokenizer: PreTrainedTokenizerBase, **options: Any) -> re.Pattern[str]:
    """What ends a turn behind its text.

    That is the token which the template writes behind a last answer, perhaps after whitespace, or a special one (the
    opening of the next turn, for targets that end theirs by it).
    """
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    last = render_text(tokenizer, talk, prompt=False, **options).partition(_PROBE)[2].lstrip()
    added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
    ends = [token.content for token in added if last.startswith(token.content)][:1]
    special = [token.content for token in added if token.special]
    patterns = [rf"\s*{re.escape(end)}" for end in ends] + [re.escape(token) for token in special]
    return re.compile("|".join(patterns) or r"(?!)")
