"""What the head learns from: masks from the chat template alone, checked files, full vocabularies, fixed batches."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import CHATML
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from slipstream.configs.errors import SlipstreamError
from slipstream.data import template
from slipstream.data.batches import Batches
from slipstream.data.sources import read
from slipstream.data.synthesize import self_prompts, topic_prompts
from slipstream.data.template import (
    encode,
    encode_prompt,
    render,
    require_generation_prompt,
    thinking,
    user_turn,
    written,
)
from slipstream.data.vocabulary import coverage, draft_vocabulary
from slipstream.decode.tasks import read_prompts

THINK_STRIPPED = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last and '</think>' in m.content -%}
{{ m.content.split('</think>')[-1].lstrip('\n') }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT_BEHIND_THE_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|> hello {{ m.role }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
LLAMA_2 = MISTRAL.replace("}}</s>", "}} </s>")
ENDED_BY_THE_NEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE_BEFORE_THE_ANSWER = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SPECIAL_END = NO_GENERATION_PROMPT + "{% if add_generation_prompt %}assistant: {% endif %}"
CLOSED_BY_THE_USER = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
THINKING = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% set thought = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip('\n') \
if m.reasoning_content or '</think>' in m.content else '' -%}
{% if m.role == 'assistant' and loop.last %}<think>
{{ thought }}
</think>

{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
CALLS_BEHIND_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{{ '\n<call>' + c.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS_IN_PLACE_OF_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].name }}</call>{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USERS_ONLY = "{% for m in messages if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def taught(tokenizer: PreTrainedTokenizerFast, ids: Any, mask: Any) -> list[str]:
    """The text of each run of ones in the mask."""
    spans: list[list[int]] = []
    for place, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on and not (place and mask[place - 1]):
            spans.append([])
        if on:
            spans[-1].append(int(token))
    return [tokenizer.decode(span) for span in spans]


def taught_by(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[str]:
    rendered = render(tokenizer, messages)
    return taught(tokenizer, rendered.input_ids, rendered.assistant_mask)


def sentencepiece(marks: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks words with `▁`, and the beginning of a text as Llama-2 (`prepend`) and later ones do."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if marks == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=marks, split=False)
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(fused)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=[*map(chr, range(33, 127)), "▁"],
        show_progress=False,
    )
    bpe.train_from_iterator(["Hi there user assistant", "Yo hello [INST] [/INST]"] * 20, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **names)


def rows_of(*lengths: int, masked: int = 1) -> Dataset:
    """Tokenized rows of the given lengths; every token of row i is i + 1."""
    rows = [{"input_ids": [i + 1] * n, "mask": [0] * (n - masked) + [1] * masked} for i, n in enumerate(lengths)]
    return Dataset.from_list(rows).with_format("numpy")


# --- chat template ---


def test_mask_of_a_chatml_turn_worked_by_hand(tiny_tokenizer):
    rendered = render(tiny_tokenizer, [user("Hi"), assistant("Yo")])
    tokens = tiny_tokenizer.convert_ids_to_tokens(rendered.input_ids)
    newline = "Ċ"
    opening = ["<|im_start|>", "user", newline, "Hi", "<|im_end|>", newline, "<|im_start|>", "as", "sistant", newline]
    assert tokens == [*opening, "Yo", "<|im_end|>", newline]
    assert rendered.assistant_mask == [0] * 10 + [1, 1] + [0]


def test_every_answer_of_several_turns_is_taught_and_nothing_else(tiny_tokenizer):
    messages = [{"role": "system", "content": "Yo"}, user("Yo"), assistant("Yo"), user("Hi"), assistant("Yo Hi")]
    assert taught_by(tiny_tokenizer, messages) == ["Yo<|im_end|>", "Yo Hi<|im_end|>"]


def test_answers_in_a_row_are_told_apart(tiny_tokenizer):
    assert taught_by(tiny_tokenizer, [user("Hi"), assistant("Yo"), assistant("Yo")]) == ["Yo<|im_end|>"] * 2


def test_thoughts_that_the_template_strips_are_not_taught(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINK_STRIPPED)
    first, last = assistant("<think>hm</think>\n\nYo"), assistant("<think>ha</think>\n\nHi")
    messages = [user("Hi"), first, user("Yo"), last]
    assert taught_by(tokenizer, messages) == ["Yo<|im_end|>", "<think>ha</think>\n\nHi<|im_end|>"]


def test_the_opening_of_a_thought_is_taught_where_the_assistant_writes_it(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    thought = assistant("<think>\nha\n</think>\n\nYo")
    spoken = {**assistant("Yo"), "reasoning_content": "ha"}
    for answer in (thought, spoken):
        assert taught_by(tokenizer, [user("Hi"), answer]) == ["<think>\nha\n</think>\n\nYo<|im_end|>"]
    assert taught_by(tokenizer, [user("Hi"), thought, user("Yo"), spoken]) == [
        "Yo<|im_end|>",
        "<think>\nha\n</think>\n\nYo<|im_end|>",
    ]


def test_what_stands_in_the_prompt_in_place_of_a_thought_is_not_taught(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    options = thinking(tokenizer, False)
    assert options == {"enable_thinking": False}
    rendered = render(tokenizer, [user("Hi"), assistant("Yo")], **options)
    assert taught(tokenizer, rendered.input_ids, rendered.assistant_mask) == ["Yo<|im_end|>"]
    prompt = encode_prompt(tokenizer, [user("Hi")], **options)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("think", [True, False])
def test_thinking_needs_a_template_that_knows_of_it(tiny_tokenizer, think):
    assert thinking(tiny_tokenizer, None) == {}
    with pytest.raises(SlipstreamError, match="no option enable_thinking; leave think unset"):
        thinking(tiny_tokenizer, think)


@pytest.mark.parametrize("template", [CHATML, CLOSED_BY_THE_USER, THINK_STRIPPED, THINKING])
def test_prompts_that_end_where_the_answer_begins_are_fine(tiny_tokenizer, template):
    require_generation_prompt(with_template(tiny_tokenizer, template))


def test_a_template_without_generation_prompt_is_an_error_that_says_what_it_must_write(tiny_tokenizer):
    with pytest.raises(SlipstreamError, match="no generation prompt: add_generation_prompt must write 'assistant: '"):
        require_generation_prompt(with_template(tiny_tokenizer, NO_GENERATION_PROMPT))


def test_text_behind_the_end_of_turn_is_not_taught(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, TEXT_BEHIND_THE_END)
    assert taught_by(tokenizer, [user("Hi"), assistant("Yo"), user("Hi"), assistant("Hi")]) == [
        "Yo<|im_end|>",
        "Hi<|im_end|>",
    ]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_an_added_token_behind_the_answer_and_whitespace_is_its_end(tiny_tokenizer, special, space):
    tokenizer = with_template(tiny_tokenizer, CHATML.replace("<|im_end|>", f"{space}<|end|>"))
    tokenizer.add_tokens([AddedToken("<|end|>", special=special)], special_tokens=special)
    messages = [user("Hi"), assistant("Yo"), user("Hi"), assistant("Hi")]
    assert taught_by(tokenizer, messages) == [f"Yo{space}<|end|>", f"Hi{space}<|end|>"]
    cut = render(tokenizer, messages, finished=False)
    assert taught(tokenizer, cut.input_ids, cut.assistant_mask) == [f"Yo{space}<|end|>", "Hi"]
    assert cut.input_ids == render(tokenizer, messages).input_ids


def test_the_next_turns_opening_ends_an_answer_where_nothing_else_does(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, ENDED_BY_THE_NEXT)
    assert taught_by(tokenizer, [user("Hi"), assistant("Yo"), user("Hi"), assistant("Hi")]) == ["Yo<|im_start|>", "Hi"]


CALLED = {**assistant(""), "tool_calls": [{"name": "f"}]}
TALK_WITH_TOOLS = [user("Hi"), CALLED, {"role": "tool", "content": "5"}, CALLED, user("Yo"), assistant("Yo")]


@pytest.mark.parametrize("template", [CALLS_BEHIND_TEXT, CALLS_IN_PLACE_OF_TEXT])
def test_calls_of_tools_are_taught_up_to_the_end_of_their_turn(tiny_tokenizer, template):
    tokenizer = with_template(tiny_tokenizer, template)
    call = "<call>f</call><|im_end|>"
    assert taught_by(tokenizer, TALK_WITH_TOOLS) == [call, call, "Yo<|im_end|>"]
    cut = render(tokenizer, TALK_WITH_TOOLS[:4], finished=False)
    assert taught(tokenizer, cut.input_ids, cut.assistant_mask) == [call, "<call>f</call>"]
    assert tokenizer.decode(cut.input_ids) == tokenizer.apply_chat_template(TALK_WITH_TOOLS[:4], tokenize=False)


def test_text_beside_a_call_is_taught_with_it(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, CALLS_BEHIND_TEXT)
    assert taught_by(tokenizer, [user("Hi"), {**CALLED, "content": "Yo"}]) == ["Yo\n<call>f</call><|im_end|>"]


def test_calls_whose_end_the_template_does_not_tell_are_not_taught_but_what_stands_beside_them(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, CALLS_BEHIND_TEXT.replace("<|im_end|>", "<|im_end|> bye"))
    assert taught_by(tokenizer, TALK_WITH_TOOLS) == ["Yo<|im_end|>"]
    tokenizer = with_template(tiny_tokenizer, CALLS_IN_PLACE_OF_TEXT.replace("assistant\n{% endif", "Yo{% endif"))
    assert taught_by(tokenizer, TALK_WITH_TOOLS) == ["Yo<|im_end|>"]


def test_a_template_that_drops_answers_is_an_error(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, USERS_ONLY)
    with pytest.raises(SlipstreamError, match="drops the assistant's message 1"):
        render(tokenizer, [user("Hi"), assistant("Yo")])


def test_a_tokenizer_without_template_is_an_error(tiny_tokenizer):
    with pytest.raises(SlipstreamError, match="has no chat template"):
        render(with_template(tiny_tokenizer, None), [user("Hi"), assistant("Yo")])


def test_what_the_template_refuses_is_told_in_its_own_words(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "{{ raise_exception('no system role here') }}")
    with pytest.raises(SlipstreamError, match="no system role here"):
        render(tokenizer, [user("Hi"), assistant("Yo")])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_the_masked_tokens_decode_to_the_answers_and_all_tokens_to_the_rendering(tiny_tokenizer, turns):
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    rendered = render(tiny_tokenizer, messages)
    spans = taught(tiny_tokenizer, rendered.input_ids, rendered.assistant_mask)
    assert spans == [f"{answer}<|im_end|>" for _, answer in turns]
    whole = tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    assert tiny_tokenizer.decode(rendered.input_ids) == whole


def test_text_is_as_it_was_written_where_the_tokenizer_would_clean_it_up(tiny_tokenizer):
    tidy = copy.deepcopy(tiny_tokenizer)
    tidy.clean_up_tokenization_spaces = True
    ids = encode(tidy, "print(a , b) n't 's<|im_end|>")
    assert written(tidy, ids) == "print(a , b) n't 's"
    assert written(tidy, ids, special=True) == "print(a , b) n't 's<|im_end|>"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, answer=TEXT)
def test_a_prompt_is_what_stands_before_the_answer(tiny_tokenizer, question, answer):
    rendered = render(tiny_tokenizer, [user(question), assistant(answer)])
    prompt = encode_prompt(tiny_tokenizer, [user(question)])
    assert rendered.input_ids[: rendered.assistant_mask.index(1)] == prompt


def test_user_turn_is_what_the_template_puts_around_a_question(tiny_tokenizer):
    opening, closing = user_turn(tiny_tokenizer)
    assert tiny_tokenizer.decode(opening) == "<|im_start|>user\n"
    assert tiny_tokenizer.decode(closing) == "<|im_end|>"
    marked = sentencepiece("prepend", MISTRAL)
    assert encode_prompt(marked, [user("Hi")])[-1:] == user_turn(marked)[1]


def in_pieces(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """ChatML, every piece tokenized alone, as is right where a tokenizer does not mark the beginning of a text."""
    ids: list[int] = []
    mask: list[int] = []
    outside = ""
    for message in messages:
        opening, content = f"{outside}<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
        taught = message["role"] == "assistant"
        for text, learned in ((opening, 0), (content, 1)) if taught else ((opening + content, 0),):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, mask = ids + piece, mask + [learned] * len(piece)
        outside = "\n"
    rest = tokenizer(outside, add_special_tokens=False)["input_ids"]
    return ids + rest, mask + [0] * len(rest)


def test_byte_level_tokens_of_the_shipped_conversations_are_those_of_their_pieces(tiny_tokenizer):
    for (_, row), _ in zip(read()[0].rows(), range(50), strict=False):
        rendered = render(tiny_tokenizer, row["messages"])
        assert (rendered.input_ids, rendered.assistant_mask) == in_pieces(tiny_tokenizer, row["messages"])


@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL, LLAMA_2])
@pytest.mark.parametrize("marks", ["prepend", "always", "first"])
def test_only_the_beginning_of_a_text_is_marked_as_one(marks, template):
    tokenizer = sentencepiece(marks, template)
    messages = [user("Hi there"), assistant("Yo hello"), user("Hi"), assistant("Yo")]
    rendered = render(tokenizer, messages)
    assert rendered.input_ids == encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    for turns in (1, 3):
        prompt = encode_prompt(tokenizer, messages[:turns])
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.assistant_mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


@pytest.mark.parametrize("marks", ["prepend", "always", "first"])
def test_no_token_reaches_from_the_prompt_into_the_answer(marks):
    tokenizer = sentencepiece(marks, SPACE_BEFORE_THE_ANSWER)
    rendered = render(tokenizer, [user("Hi"), assistant("Yo")])
    prompt = encode_prompt(tokenizer, [user("Hi")])
    assert rendered.input_ids[: len(prompt)] == prompt
    tokens = tokenizer.convert_ids_to_tokens(rendered.input_ids[len(prompt) - 1 :])
    assert tokens[0] == "▁"
    assert "".join(tokens).startswith("▁Yo</s>")


@pytest.mark.parametrize("max_length", [1, 12, 13, 14, 30])
def test_tokens_up_to_a_length_are_the_first_of_all(tiny_tokenizer, max_length):
    messages = [user("Hi"), assistant("Yo"), user("Hi"), assistant("Yo hello")] * 3
    short, whole = render(tiny_tokenizer, messages, max_length=max_length), render(tiny_tokenizer, messages)
    assert max_length <= len(short.input_ids) < len(whole.input_ids)
    assert short.input_ids == whole.input_ids[: len(short.input_ids)]
    assert short.assistant_mask == whole.assistant_mask[: len(short.input_ids)]


def test_the_text_that_is_tokenized_grows_with_the_turns_and_not_with_their_square(tiny_tokenizer, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(template, "encode", lambda tokenizer, text: seen.append(len(text)) or encode(tokenizer, text))

    def tokenized(turns: int, **options: Any) -> int:
        seen.clear()
        render(tiny_tokenizer, [user("Hi " * 300), assistant("Yo " * 300)] * turns, **options)
        return sum(seen)

    assert tokenized(9) - tokenized(6) == tokenized(6) - tokenized(3)
    assert tokenized(10, max_length=100) == tokenized(9, max_length=100) < tokenized(2)


# --- draft vocabulary ---


def tokens_of(*ids: int) -> Dataset:
    """One row: a token 9 that is not the assistant's, then the assistant's ids."""
    return Dataset.from_list([{"input_ids": [9, 9, 9, 9, *ids], "mask": [0] * 4 + [1] * len(ids)}]).with_format("numpy")


def test_the_draft_vocabulary_is_the_assistants_most_frequent_tokens_ascending():
    tokens = tokens_of(7, 7, 7, 3, 3, 5)
    assert draft_vocabulary(tokens, 2, vocab_size=10).tolist() == [3, 7]
    assert draft_vocabulary(tokens, 3, vocab_size=10).tolist() == [3, 5, 7]


def test_tokens_that_must_be_in_push_out_the_rarest():
    tokens = tokens_of(7, 7, 7, 3, 3, 5)
    assert draft_vocabulary(tokens, 2, vocab_size=10, always=[8]).tolist() == [7, 8]


def test_where_few_tokens_occur_the_lowest_unused_ids_fill_the_vocabulary_and_a_note_says_so(capsys):
    assert draft_vocabulary(tokens_of(7, 3), 2, vocab_size=10).tolist() == [3, 7]
    assert capsys.readouterr().err == ""
    assert draft_vocabulary(tokens_of(7, 3), 5, vocab_size=10).tolist() == [0, 1, 2, 3, 7]
    assert "2 distinct tokens, fewer than the draft vocabulary (5)" in capsys.readouterr().err
    assert draft_vocabulary(tokens_of(7, 3), 99, vocab_size=10).tolist() == list(range(10))


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(0, 19), min_size=1, max_size=60), size=st.integers(1, 25))
def test_no_other_vocabulary_of_that_size_covers_more(ids, size):
    chosen = draft_vocabulary(tokens_of(*ids), size, vocab_size=20)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == min(size, 20)
    best = sum(count for _, count in Counter(ids).most_common(size)) / len(ids)
    assert coverage(tokens_of(*ids), chosen, 20) == pytest.approx(best)


# --- batches ---

LENGTHS = (3, 9, 4, 4, 12, 2, 7, 30, 5, 5, 6, 2, 8, 3, 11)


def rows_in(batches: Batches, epoch: int) -> Counter[int]:
    """How often each row occurs in an epoch."""
    span = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    return Counter(int(row[0]) - 1 for i in span for row in batches[i].input_ids)


def test_every_row_comes_once_in_an_epoch():
    assert rows_in(Batches(rows_of(*LENGTHS), 24, seed=0), 0) == Counter(range(len(LENGTHS)))
    even = Batches(rows_of(*[5] * 13), 24, seed=0)
    assert [rows_in(even, epoch) for epoch in range(3)] == [Counter(range(13))] * 3


def test_packed_batches_hold_every_row_once_and_little_else():
    batches = Batches(rows_of(*LENGTHS), 24, seed=0, packed=True)
    filled = [batches[i] for i in range(batches.per_epoch)]
    seen = Counter(int(batch.input_ids[0, start]) - 1 for batch in filled for start in batch.starts[0].unique())
    assert seen == Counter(range(len(LENGTHS)))
    sizes = sorted(batch.input_ids.numel() for batch in filled)
    assert sum(sizes) == sum(LENGTHS)  # no padding
    assert sizes[-1] == 30  # of the row that is longer than a batch
    assert max(sizes[:-1]) <= 24
    assert len(sizes) == 1 + -(-(sum(LENGTHS) - 30) // 24)  # not one batch more than the tokens need
    for batch in filled:
        (ids,), (starts,) = batch.input_ids, batch.starts
        assert torch.equal(ids, ids[starts])  # a row of these holds one number over and over
        begins = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
        assert torch.equal(starts == torch.arange(len(ids)), begins)
    packed = batches[3]
    assert packed.mask.shape == packed.input_ids.shape
    assert Batches(rows_of(*LENGTHS), 24, seed=0)[3].starts is None


def test_the_same_seed_gives_the_same_batches_in_whatever_order_they_are_asked_for():
    def ids(batches: Batches, order: range) -> dict[int, list[list[int]]]:
        return {i: batches[i].input_ids.tolist() for i in order}

    first, again, other = (Batches(rows_of(*LENGTHS), 24, seed) for seed in (1, 1, 2))
    span = 2 * first.per_epoch
    assert ids(first, range(span)) == ids(again, range(span - 1, -1, -1))
    assert ids(first, range(span)) != ids(other, range(span))


def test_epochs_differ_in_their_order():
    batches = Batches(rows_of(*LENGTHS), 24, seed=0)
    first, second = ([batches[e * batches.per_epoch + i].input_ids.tolist() for i in range(3)] for e in (0, 1))
    assert first != second


@pytest.mark.parametrize("limit", [3, 99])
def test_a_limited_set_of_batches_comes_whole_in_every_pass_in_another_order(limit):
    every, some = Batches(rows_of(*LENGTHS), 24, seed=0), Batches(rows_of(*LENGTHS), 24, seed=0, limit=limit)
    count = min(limit, every.per_epoch)
    assert some.per_epoch == count
    wanted = [every[i].input_ids.tolist() for i in range(count)]
    passes = [[some[count * e + i].input_ids.tolist() for i in range(count)] for e in range(4)]
    assert all(sorted(one) == sorted(wanted) for one in passes)
    assert len({str(one) for one in passes}) > 1


def test_a_batch_holds_no_more_padded_tokens_than_asked_for_unless_one_row_does():
    batches = Batches(rows_of(*LENGTHS), 24, seed=0)
    sizes = [batches[i].input_ids.shape for i in range(batches.per_epoch)]
    assert all(rows * width <= 24 for rows, width in sizes if rows > 1)
    assert [tuple(size) for size in sizes if size[0] * size[1] > 24] == [(1, 30)]


def test_batches_are_of_few_lengths_and_none_is_longer_than_the_longest_row():
    lengths = torch.randint(20, 301, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = Batches(rows_of(*lengths), 1024, seed=0)
    sizes = [tuple(batches[i].input_ids.shape) for i in range(batches.per_epoch)]
    longest = [max(lengths[row] for row in batches.rows(i)) for i in range(batches.per_epoch)]
    for (rows, width), most in zip(sizes, longest, strict=True):
        assert most <= width <= max(lengths)
        assert width % 32 == 0 or width in (1024 // rows, max(lengths))
    assert len(set(sizes)) < len(set(longest)) / 2


def test_rows_are_padded_on_the_right_with_zeros_under_no_mask():
    batch = Batches(rows_of(2, 4, masked=2), 8, seed=0)[0]
    order = batch.input_ids[:, 0].argsort()
    assert batch.input_ids[order].tolist() == [[1, 1, 0, 0], [2, 2, 2, 2]]
    assert batch.mask[order].tolist() == [[True, True, False, False], [False, False, True, True]]
    assert batch.input_ids.dtype == torch.long
    assert batch.mask.dtype == torch.bool


# --- prompts ---


def by_group(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row)
    return groups


def test_topic_prompts_are_distinct_filled_in_and_the_seeds_own():
    rows = topic_prompts(400, seed=3)
    texts = [row["turns"][0] for row in rows]
    assert len(rows) == len(set(texts)) == len({row["question_id"] for row in rows}) == 400
    assert not any("{" in text or "}" in text for text in texts)
    assert rows == topic_prompts(400, seed=3)
    other = {row["turns"][0] for row in topic_prompts(400, seed=4)}
    assert len(other & set(texts)) < 200


def test_more_topic_prompts_extend_fewer_in_every_group():
    few, many = by_group(topic_prompts(100, seed=0)), by_group(topic_prompts(300, seed=0))
    assert few.keys() == many.keys()
    assert all(many[group][: len(rows)] == rows for group, rows in few.items())


@pytest.mark.parametrize("count", [1, 7, 33, 333])
def test_about_as_many_topic_prompts_come_as_were_asked_for(count):
    assert abs(len(topic_prompts(count, seed=0)) - count) <= 2


class Writer:
    """Samples as a target that writes these prompts, a batch after the other, and then the last ones for ever."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *batches: list[str]) -> None:
        self.tokenizer, self.batches, self.asked = tokenizer, batches, 0

    def __call__(self, prompts: list[list[int]], temperatures: list[float], **_: Any) -> list[list[int]]:
        texts = self.batches[min(self.asked, len(self.batches) - 1)]
        self.asked += 1
        assert len(prompts) == len(temperatures) == len(texts)
        return [encode(self.tokenizer, f"{text}<|im_end|>") for text in texts]


def test_a_target_that_writes_no_new_prompt_is_asked_a_while_and_no_longer(tmp_path, tiny_tokenizer):
    out, writer = tmp_path / "own.jsonl", Writer(tiny_tokenizer, ["hello you", "hello me"], ["hello me", "Hi"])
    for asked in (21, 20):  # a second time it goes on from what there is
        writer.asked = 21 - asked
        with pytest.raises(
            SlipstreamError, match=r"tiny wrote no new prompt in 20 batches of 2, after 2 of 3; .*--own 2"
        ):
            self_prompts("tiny", writer, tiny_tokenizer, count=3, seed=1, batch_size=2, out=out)
        assert writer.asked == 21
    assert [row["turns"] for row in read_prompts(out)] == [["hello you"], ["hello me"]]
