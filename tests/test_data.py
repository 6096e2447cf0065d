"""What the head learns from: masks from the chat template alone, checked files, full vocabularies, fixed batches."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.configs.errors import SlipstreamError
from slipstream.data.batches import Batches
from slipstream.data.conversations import pack, read, tokenize
from slipstream.data.journal import Journal
from slipstream.data.synthesize import topic_prompts
from slipstream.data.template import encode_prompt, render, user_turn
from slipstream.data.vocabulary import coverage, draft_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

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
NO_SPECIAL_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USERS_ONLY = "{% for m in messages if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True, scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory):
    """The user's own cache of data sets stays as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


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


def rows_of(*lengths: int, masked: int = 1) -> Dataset:
    """Tokenized rows of the given lengths; every token of row i is i + 1."""
    rows = [{"input_ids": [i + 1] * n, "mask": [0] * (n - masked) + [1] * masked} for i, n in enumerate(lengths)]
    return Dataset.from_list(rows).with_format("numpy")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def test_text_behind_the_end_of_turn_is_not_taught(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, TEXT_BEHIND_THE_END)
    assert taught_by(tokenizer, [user("Hi"), assistant("Yo"), user("Hi"), assistant("Hi")]) == [
        "Yo<|im_end|>",
        "Hi<|im_end|>",
    ]


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


# --- conversations ---


def test_an_unfinished_answer_teaches_no_end_of_turn(tiny_tokenizer):
    messages = [user("Hi"), assistant("Yo hello")]
    rows = Dataset.from_list([{"messages": messages, "finished": end} for end in (True, False)])
    whole, cut = tokenize(rows, tiny_tokenizer, max_length=64)
    assert taught(tiny_tokenizer, whole["input_ids"], whole["mask"]) == ["Yo hello<|im_end|>"]
    assert taught(tiny_tokenizer, cut["input_ids"], cut["mask"]) == ["Yo hello"]


def test_only_the_last_of_several_answers_is_unfinished(tiny_tokenizer):
    messages = [user("Hi"), assistant("Yo Hi"), user("Hi"), assistant("Yo hello")]
    (row,) = tokenize(Dataset.from_list([{"messages": messages, "finished": False}]), tiny_tokenizer, max_length=64)
    assert taught(tiny_tokenizer, row["input_ids"], row["mask"]) == ["Yo Hi<|im_end|>", "Yo hello"]


def test_an_unfinished_answer_is_taught_whole_where_no_token_ends_turns(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, NO_SPECIAL_END)
    rows = Dataset.from_list([{"messages": [user("Hi"), assistant("Yo hello")], "finished": False}])
    (row,) = tokenize(rows, tokenizer, max_length=64)
    assert taught(tokenizer, row["input_ids"], row["mask"]) == ["Yo hello"]


def test_tokenize_cuts_rows_and_drops_those_that_teach_nothing(tiny_tokenizer):
    talks = [[user("Hi"), assistant("Yo hello")], [user("Hi")], [user("hello " * 20), assistant("Yo")]]
    rows = Dataset.from_list([{"messages": talk, "finished": end} for talk in talks for end in (True, False)])
    tokens = tokenize(rows, tiny_tokenizer, max_length=13)
    assert [taught(tiny_tokenizer, r["input_ids"], r["mask"]) for r in tokens] == [["Yo hello<|im_end|>"], ["Yo hello"]]
    assert all(len(row["input_ids"]) == len(row["mask"]) == 13 for row in tokens)


def test_tokenize_without_any_answer_is_an_error(tiny_tokenizer):
    with pytest.raises(SlipstreamError, match="no conversation has an assistant turn"):
        tokenize(Dataset.from_list([{"messages": [user("Hi")]}]), tiny_tokenizer, max_length=64)


@pytest.mark.parametrize("messages", ["Hi", ["Hi"], [{"from": "human", "value": "Hi"}], [{"role": "assistant"}]])
def test_rows_that_hold_no_messages_are_an_error(tmp_path, tiny_tokenizer, messages):
    with pytest.raises(SlipstreamError, match="conversation 1: 'messages' must be"):
        tokenize(read(written(tmp_path / "talks.jsonl", {"messages": messages})), tiny_tokenizer, max_length=64)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    rows = [{"messages": [user("Hi"), assistant("Yo\u2028\u0085 ö")], "finished": True}]
    file = tmp_path / f"talks{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False))
    else:
        file.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n")
    assert read(file).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "do not exist"),
        ("talks.txt", "Hi", "must end in one of .json, .jsonl, .parquet"),
        ("talks.jsonl", '{"text": "Hi"}\n', "has no column 'messages', but text"),
        ("broken.jsonl", '{"messages": [\n', "cannot be read"),
        ("broken.parquet", "PAR1", "cannot be read"),
        ("empty.jsonl", "", "is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(SlipstreamError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_packed_conversations_read_back_equal_without_the_journals_column(tmp_path):
    rows = [
        {
            "id": f"q-{i}",
            "category": "chat",
            "messages": [user(f"Hi {i}"), assistant("Yo\u2028 ö\n")],
            "temperature": 0.7,
            "finished": i > 0,
            "tokens": i,
        }
        for i in range(5)
    ]
    with Journal(tmp_path / "talks.jsonl", {}) as journal:
        journal.append(0, rows[:2])
        journal.append(1, rows[2:])
    pack(tmp_path / "talks.jsonl", tmp_path / "talks.parquet")
    assert read(tmp_path / "talks.parquet").to_list() == rows


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


def test_where_few_tokens_occur_the_lowest_unused_ids_fill_the_vocabulary():
    assert draft_vocabulary(tokens_of(7, 3), 5, vocab_size=10).tolist() == [0, 1, 2, 3, 7]
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


def test_a_limited_set_of_batches_comes_whole_in_every_pass_in_another_order():
    every, some = Batches(rows_of(*LENGTHS), 24, seed=0), Batches(rows_of(*LENGTHS), 24, seed=0, limit=3)
    wanted = [every[i].input_ids.tolist() for i in range(3)]
    passes = [[some[3 * e + i].input_ids.tolist() for i in range(3)] for e in range(4)]
    assert all(sorted(one) == sorted(wanted) for one in passes)
    assert len({str(one) for one in passes}) > 1
    assert Batches(rows_of(*LENGTHS), 24, seed=0, limit=99).per_epoch == every.per_epoch


def test_a_batch_holds_no_more_padded_tokens_than_asked_for_unless_one_row_does():
    batches = Batches(rows_of(*LENGTHS), 24, seed=0)
    sizes = [batches[i].input_ids.shape for i in range(batches.per_epoch)]
    assert all(rows * width <= 24 for rows, width in sizes if rows > 1)
    assert [tuple(size) for size in sizes if size[0] * size[1] > 24] == [(1, 30)]


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
