"""Conversations of every published shape and place become the same tokens; what is malformed is named and left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset
from datasets import config as datasets_config
from test_data import NO_GENERATION_PROMPT, NO_SPECIAL_END, THINKING, assistant, taught, user, with_template

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings
from slipstream.data.conversations import load, pack, tokenize
from slipstream.data.journal import Journal
from slipstream.data.messages import normalize
from slipstream.data.sources import read

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("datasets_cache")

TALK = {"messages": [user("Hi"), assistant("Yo")]}


def written(path: Path, *rows: Any) -> Path:
    """JSON lines; texts are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def tokens_of(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int = 64, **options: Any) -> Dataset:
    return tokenize(read(path), tokenizer, max_length, **options)


def answers(path: Path | list[Path], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[str]]:
    """What is taught, row by row."""
    rows = tokenize(read(path), tokenizer, 64, **options)
    return [taught(tokenizer, row["input_ids"], row["mask"]) for row in rows]


# --- shapes ---


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Hi"), assistant("Yo")]},
        {"messages": [{**user("Hi"), "name": None}, assistant("Yo")], "conversations": None},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"conversations": [user("Hi"), assistant("Yo")]},
        {"turns": ["Hi"], "answers": ["Yo"]},
        {"instruction": "Hi", "response": "Yo"},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ],
)
def test_every_shape_becomes_the_same_messages(row):
    assert normalize(row) == [user("Hi"), assistant("Yo")]


def test_all_turns_roles_and_what_else_a_message_says_are_kept():
    shared = [("system", "S"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    messages = normalize({"conversations": [{"from": who, "value": text} for who, text in shared]})
    assert messages == [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")]
    assert normalize({"turns": ["a", "c"], "answers": ["b", "d"]}) == messages[1:]
    thought = {**assistant("Yo"), "reasoning_content": "hm"}
    assert normalize({"messages": [user("Hi"), thought]}) == [user("Hi"), thought]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for called in ({"role": "assistant", "tool_calls": calls}, {**assistant(""), "content": None, "tool_calls": calls}):
        assert normalize({"messages": [user("Hi"), called]}) == [user("Hi"), {**assistant(""), "tool_calls": calls}]
    assert normalize({"instruction": "Add", "input": "1 2", "output": "3"}) == [user("Add\n\n1 2"), assistant("3")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ([TALK], "not a JSON object"),
        ({"text": "Hi", "id": 1}, "needs 'messages', .* has text, id"),
        ({"messages": "Hi"}, "'messages' must be a list of messages"),
        ({"messages": []}, "at least one"),
        ({"messages": ["Hi"]}, "'messages' must be a list of {role, content} texts"),
        ({"messages": [{"role": "assistant"}]}, "'messages' must be a list of {role, content} texts"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "'messages' must be a list of {role, content} texts"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "'conversations' must be a list of {from, value} texts"),
        ({"conversations": [{"from": "gtp", "value": "Yo"}]}, "unknown speaker 'gtp'; did you mean 'gpt'"),
        ({"turns": ["Hi", "Yo"], "answers": ["Yo"]}, "same length"),
        ({"turns": ["Hi"]}, "'turns' and 'answers' must be lists of texts"),
        ({"instruction": "Hi"}, "'response' or 'output' must be texts"),
        ({"messages": [user("Hi \ud83d"), assistant("Yo")]}, r"holds '\\ud83d', half of a surrogate pair"),
        ({"\ude00": 1}, r"holds '\\ude00', half of a surrogate pair"),
    ],
)
def test_a_row_of_no_shape_is_an_error_that_says_what_is_wrong(row, message):
    with pytest.raises(SlipstreamError, match=message):
        normalize(row)


# --- places ---


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    rows = [{"messages": [user("Hi"), assistant("Yo\u2028\u0085 ö")], "finished": True}] * 2
    file = tmp_path / f"talks{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif suffix == ".arrow":
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False))
    else:
        written(file, *rows)
    (source,) = read(file)
    assert list(source.rows()) == list(enumerate(rows, 1))
    assert source.name == str(file)


def test_folders_and_lists_are_read_in_order(tmp_path, tiny_tokenizer):
    names = ["b/1.jsonl", "b/2.jsonl", "a.jsonl"]
    first, second, third = (
        written(tmp_path / name, {"instruction": "Hi", "output": text})
        for name, text in zip(names, ("Hi", "Yo", "hello"), strict=True)
    )
    (tmp_path / "b" / "README.md").write_text("not data")
    assert [source.name for source in read(tmp_path / "b")] == [str(first), str(second)]
    assert answers([third, tmp_path / "b"], tiny_tokenizer) == [["hello<|im_end|>"], ["Hi<|im_end|>"], ["Yo<|im_end|>"]]


def test_a_folder_is_read_without_its_books_and_no_conversation_twice(tmp_path, tiny_tokenizer):
    Dataset.from_list([TALK]).save_to_disk(tmp_path / "talks" / "saved")
    for name in ("packed", "lines"):
        with Journal(tmp_path / "talks" / f"{name}.jsonl", {"seed": 1}) as journal:
            journal.append(0, [{**TALK, "id": 1}])
    pack(tmp_path / "talks" / "packed.jsonl", tmp_path / "talks" / "packed.parquet")
    written(tmp_path / "talks" / "mine.jsonl", TALK)
    Dataset.from_list([TALK]).to_parquet(tmp_path / "talks" / "mine.parquet")  # nothing says that these are the same
    names = [source.name.removeprefix(f"{tmp_path}/talks/") for source in read(tmp_path / "talks")]
    arrow = "saved/data-00000-of-00001.arrow"
    assert names == ["lines.jsonl", "mine.jsonl", "mine.parquet", "packed.parquet", arrow]
    assert answers(tmp_path / "talks", tiny_tokenizer) == [["Yo<|im_end|>"]] * 5
    assert [source.name for source in read(tmp_path / "talks" / "packed.jsonl")] == [
        str(tmp_path / "talks" / "packed.jsonl")
    ]


@pytest.mark.parametrize("where", ["", " ", [], ["talks.jsonl", ""]])
def test_no_conversations_at_all_are_refused(where):
    with pytest.raises(SlipstreamError, match=r"data\.conversations names nothing"):
        read(where)


def test_a_mark_at_the_beginning_of_a_file_costs_no_row(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", "\ufeff" + json.dumps(TALK), TALK)
    assert answers(file, tiny_tokenizer) == [["Yo<|im_end|>"]] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_data_set_of_the_hub_is_read_by_name_and_split(tmp_path, tiny_tokenizer, monkeypatch, stream):
    """A folder of that name stands in for the hub."""
    written(tmp_path / "owner" / "talks" / "train.jsonl", TALK)
    written(tmp_path / "owner" / "talks" / "test.jsonl", TALK, TALK)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("owner/talks:train", 1), ("owner/talks:test", 2)):
        assert len(load(DataSettings(conversations=name, stream=stream), tiny_tokenizer)) == rows
    with pytest.raises(SlipstreamError, match=r"owner/talks:tost cannot be read: .*tost.*train"):
        load(DataSettings(conversations="owner/talks:tost", stream=stream), tiny_tokenizer)
    with pytest.raises(SlipstreamError, match=r"'owner/nobody' are neither here nor a data set: .*owner/nobody"):
        read("owner/nobody", stream=stream)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "do not exist"),
        ("talks.txt", "Hi", "must end in one of .json, .jsonl, .parquet"),
        ("talks.jsonl", '{"text": "Hi"}\n', "needs 'messages', 'conversations'"),
        ("broken.jsonl", '{"messages": [\n', "row 1: not a JSON object"),
        ("broken.json", '{"messages": [\n', "cannot be read"),
        ("broken.parquet", "PAR1", "cannot be read"),
        ("latin.jsonl", b"\xff\n", "cannot be read"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n\n", "no conversations"),
        ("folder", {}, "holds no file that ends in one of"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path, tiny_tokenizer, name, content, message):
    file = tmp_path / name
    if isinstance(content, dict):
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SlipstreamError) as caught:
        tokens_of(file, tiny_tokenizer)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- tokens ---


def test_an_unfinished_answer_teaches_no_end_of_turn(tmp_path, tiny_tokenizer):
    messages = [user("Hi"), assistant("Yo Hi"), user("Hi"), assistant("Yo hello")]
    file = written(tmp_path / "talks.jsonl", *({"messages": messages, "finished": end} for end in (True, False)))
    assert answers(file, tiny_tokenizer) == [
        ["Yo Hi<|im_end|>", "Yo hello<|im_end|>"],
        ["Yo Hi<|im_end|>", "Yo hello"],
    ]


def test_an_unfinished_answer_is_taught_whole_where_no_token_ends_turns(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", {"messages": [user("Hi"), assistant("Yo hello")], "finished": False})
    assert answers(file, with_template(tiny_tokenizer, NO_SPECIAL_END)) == [["Yo hello"]]


def test_rows_are_cut_and_those_that_teach_nothing_are_named_and_go(tmp_path, tiny_tokenizer, capsys):
    talks = [[user("Hi"), assistant("Yo hello")], [user("Hi")], [user("hello " * 20), assistant("Yo")]]
    rows = [{"messages": talk, "finished": end} for talk in talks for end in (True, False)]
    file = written(tmp_path / "talks.jsonl", *rows)
    tokens = tokens_of(file, tiny_tokenizer, 13)
    assert [taught(tiny_tokenizer, r["input_ids"], r["mask"]) for r in tokens] == [["Yo hello<|im_end|>"], ["Yo hello"]]
    assert all(len(row["input_ids"]) == len(row["mask"]) == 13 for row in tokens)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"4 of 6 rows have no assistant turn within 13 tokens and are left out: {file} row 3; ")


def test_conversations_without_any_answer_are_an_error(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", {"messages": [user("Hi")]})
    with pytest.raises(SlipstreamError, match=r"no conversation has an assistant turn within 64 tokens"):
        tokens_of(file, tiny_tokenizer)


def test_a_template_without_generation_prompt_is_an_error_before_anything_is_read(tmp_path, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, NO_GENERATION_PROMPT)
    with pytest.raises(SlipstreamError, match="has no generation prompt"):
        tokens_of(written(tmp_path / "talks.jsonl", TALK), tokenizer)


def test_malformed_rows_are_named_counted_and_left_out(tmp_path, tiny_tokenizer, capsys):
    first = written(tmp_path / "first.jsonl", *[TALK] * 30, "{torn", "", TALK)
    second = written(tmp_path / "second.jsonl", *[TALK] * 5, {"messages": "Hi"}, *[TALK] * 5)
    for _ in range(2):  # the second time from the cache
        assert len(answers([first, second], tiny_tokenizer)) == 41
        (note,) = capsys.readouterr().err.splitlines()
        assert note.startswith("2 of 43 rows are malformed and are left out: ")
        assert f"{first} row 31: not a JSON object; {second} row 6: 'messages' must be" in note


def test_half_characters_and_endless_nesting_are_malformed_rows(tmp_path, tiny_tokenizer, capsys):
    half = json.dumps({"messages": [user("Hi"), assistant("Yo \ud83d")]})
    file = written(tmp_path / "talks.jsonl", *[TALK] * 20, half, '{"messages": ' + "[" * 100_000, TALK)
    assert len(answers(file, tiny_tokenizer, malformed=0.1)) == 21
    (note,) = capsys.readouterr().err.splitlines()
    assert f"{file} row 21: holds '\\ud83d', half of a surrogate pair" in note
    assert f"{file} row 22: not a JSON object" in note


def test_more_malformed_rows_than_stated_are_an_error_that_names_the_first(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", *[TALK] * 8, *["{"] * 2)
    with pytest.raises(SlipstreamError) as caught:
        tokens_of(file, tiny_tokenizer)
    said = str(caught.value)
    assert said.startswith("2 of 10 rows are malformed, more than data.malformed (0.05): ")
    assert f"{file} row 9: not a JSON object" in said
    assert len(tokens_of(file, tiny_tokenizer, malformed=0.2)) == 8
    with pytest.raises(SlipstreamError, match="2 of 10 rows"):
        tokens_of(file, tiny_tokenizer, malformed=0.1)
    with pytest.raises(SlipstreamError, match="must be from 0 to 1, not 5"):
        DataSettings(malformed=5)


def test_a_wrong_file_is_not_read_to_its_end(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", *["{"] * 3000)
    with pytest.raises(SlipstreamError, match="1,000 of 1,000 rows are malformed"):
        tokens_of(file, tiny_tokenizer)


def test_what_the_template_refuses_is_a_malformed_row(tmp_path, tiny_tokenizer, capsys):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role [/INST] here') }}{% endif %}"
    tokenizer = with_template(tiny_tokenizer, refusing + tiny_tokenizer.chat_template)
    system = {"messages": [{"role": "system", "content": "Hi"}, *TALK["messages"]]}
    assert len(answers(written(tmp_path / "talks.jsonl", system, TALK), tokenizer, malformed=0.5)) == 1
    assert "row 1: the chat template refuses these messages: no system role [/INST] here" in capsys.readouterr().err


def test_tokens_are_made_anew_when_file_template_or_settings_change_and_only_then(tmp_path, tiny_tokenizer):
    file = written(tmp_path / "talks.jsonl", TALK)

    def made(tokenizer: PreTrainedTokenizerFast = tiny_tokenizer, max_length: int = 64) -> str:
        return tokens_of(file, tokenizer, max_length).cache_files[0]["filename"]

    first = made()
    assert first == made()
    assert first.startswith(str(datasets_config.HF_DATASETS_CACHE))
    assert len({first, made(max_length=63), made(with_template(tiny_tokenizer, THINKING))}) == 3
    written(file, TALK, TALK)
    assert made() != first
    assert len(tokens_of(file, tiny_tokenizer)) == 2


def test_answers_are_learned_from_as_they_were_made(tmp_path, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    thought = assistant("<think>\nha\n</think>\n\nYo")
    rows = {
        think: {"messages": [user("Hi"), thought if think else assistant("Yo")], "think": think}
        for think in (True, False)
    }
    files = {think: written(tmp_path / f"{think}.jsonl", row) for think, row in rows.items()}
    assert answers(files[True], tokenizer, think=True) == [["<think>\nha\n</think>\n\nYo<|im_end|>"]]
    assert answers(files[False], tokenizer, think=False) == [["Yo<|im_end|>"]]
    with pytest.raises(SlipstreamError, match=r"True.jsonl row 1: .* with think true, but data.think is false"):
        tokens_of(files[True], tokenizer, think=False)
    with pytest.raises(SlipstreamError, match=r"with think false, but data.think is null"):
        tokens_of(files[False], tokenizer)
    assert answers(written(tmp_path / "others.jsonl", TALK), tokenizer, think=False) == [["Yo<|im_end|>"]]
    with pytest.raises(SlipstreamError, match="no option enable_thinking"):
        tokens_of(files[True], tiny_tokenizer, think=True)


@pytest.mark.parametrize("think", [None, True])
def test_a_thought_in_a_column_of_that_name_says_nothing_of_how_the_answer_was_made(tmp_path, tiny_tokenizer, think):
    file = written(tmp_path / "talks.jsonl", {**TALK, "think": "hm"}, {**TALK, "think": ""})
    assert len(tokens_of(file, with_template(tiny_tokenizer, THINKING), think=think)) == 2


def test_packed_conversations_read_back_equal_without_the_journals_column(tmp_path):
    rows = [
        {
            "id": f"q-{i}",
            "category": "chat",
            "messages": [user(f"Hi {i}"), assistant("Yo\u2028 ö\n")],
            "temperature": 0.7,
            "think": None,
            "finished": i > 0,
            "tokens": i,
        }
        for i in range(5)
    ]
    with Journal(tmp_path / "talks.jsonl", {}) as journal:
        journal.append(0, rows[:2])
        journal.append(1, rows[2:])
    pack(tmp_path / "talks.jsonl", tmp_path / "talks.parquet")
    (source,) = read(tmp_path / "talks.parquet")
    assert [row for _, row in source.rows()] == rows


def test_rows_that_differ_in_what_they_hold_are_packed_together(tmp_path):
    thought = {**assistant("Yo"), "reasoning_content": "hm"}
    rows = [
        {"id": 1, "messages": [user("Hi"), assistant("Yo")], "temperature": 0, "think": None},
        {"id": "HumanEval/0", "messages": [user("Hi"), thought], "temperature": 0.7, "think": True, "finished": True},
    ]
    with Journal(tmp_path / "talks.jsonl", {}) as journal:
        journal.append(0, rows[:1] * 2901 + rows[1:] * 99)
    pack(tmp_path / "talks.jsonl", tmp_path / "talks.parquet")
    (source,) = read(tmp_path / "talks.parquet")
    packed = [row for _, row in source.rows()]
    assert [row["id"] for row in packed] == ["1"] * 2901 + ["HumanEval/0"] * 99
    assert [normalize(row) for row in (packed[0], packed[-1])] == [row["messages"] for row in rows]
    assert [(row["temperature"], row["think"], row["finished"]) for row in (packed[0], packed[-1])] == [
        (0.0, None, None),
        (0.7, True, True),
    ]


def test_a_journal_without_conversations_is_not_packed(tmp_path):
    with Journal(tmp_path / "talks.jsonl", {}):
        pass
    with pytest.raises(SlipstreamError, match=r"talks.jsonl holds no conversation; .*talks.parquet is not written"):
        pack(tmp_path / "talks.jsonl", tmp_path / "talks.parquet")
