"""Task files: Spec-Bench's rows and those of HumanEval and GSM8K; what is missing is told with file and line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.tasks import read_prompts, read_tasks, require_references

if TYPE_CHECKING:
    from pathlib import Path

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """Return 1."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}
GSM8K = {"question": "How many?", "answer": "Two and two.\n#### 4"}
TALK = {"question_id": 9, "category": "writing", "turns": ["Hi", "Yo"]}


def write(folder: Path, *rows: Any, name: str = "mine") -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))  # empty lines count, and are passed over
    return file


def test_rows_of_others_become_turns(tmp_path):
    code, number, talk = read_prompts(write(tmp_path, HUMANEVAL, GSM8K, TALK))
    assert code["question_id"] == "HumanEval/0"
    assert code["turns"][0].endswith(f"```python\n{HUMANEVAL['prompt']}```")
    assert code["test"] == HUMANEVAL["test"]
    assert (number["question_id"], number["turns"], number["reference"]) == (3, ["How many?"], [GSM8K["answer"]])
    assert talk == TALK


def test_a_row_without_an_id_has_its_line_and_one_without_a_category_has_none(tmp_path):
    _, row = read_prompts(write(tmp_path, TALK, {"turns": ["Hi"]}))
    assert row == {"question_id": 3, "category": "", "turns": ["Hi"]}


@pytest.mark.parametrize("missing", ["task_id", "prompt", "test", "entry_point"])
def test_a_field_missing_from_a_humaneval_row_is_named(tmp_path, missing):
    file = write(tmp_path, TALK, {k: v for k, v in HUMANEVAL.items() if k != missing})
    with pytest.raises(SlipstreamError, match=f":3: a HumanEval row needs '{missing}'"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "How many?"}, "a GSM8K row needs 'question' and 'answer'"),
        ({"turns": []}, 'needs "turns"'),
        ({"turns": ["Hi", 3]}, 'needs "turns"'),
        ({"prompt": "Hi"}, 'needs "turns"'),
        ({**TALK, "category": 3}, '"category" must be a string'),
        ({**TALK, "reference": [3]}, '"reference" must be a list of strings'),
        ({**TALK, "turns": ["Hi \ud83d"]}, r"holds '\\ud83d', half of a surrogate pair"),
        ({**TALK, "category": "\ud83d"}, "holds"),
        ({**TALK, "reference": ["\ud83d"]}, "holds"),
        ({**TALK, "test": "pass"}, '"test" needs "prompt" and "entry_point"'),
    ],
)
def test_what_a_row_lacks_is_told_with_its_line(tmp_path, row, message):
    file = write(tmp_path, TALK, row)
    with pytest.raises(SlipstreamError, match=f"{file}:3: {message}"):
        read_prompts(file)


def test_a_row_that_is_nested_too_deeply_is_told_with_its_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"turns": ' + "[" * 100_000)
    with pytest.raises(SlipstreamError, match=f"{file}:1: nested too deeply"):
        read_prompts(file)


def test_a_mark_at_the_beginning_of_a_file_costs_no_row(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(TALK), encoding="utf-8-sig")
    assert read_prompts(file) == [TALK]


def test_the_task_of_one_file_is_the_category_and_of_several_the_file(tmp_path):
    mixed = write(tmp_path, TALK, {**TALK, "category": "math"}, {"turns": ["Hi"]}, name="mixed")
    plain = write(tmp_path, GSM8K, GSM8K, name="gsm8k")
    assert [row["task"] for row in read_tasks([mixed])] == ["writing", "math", "all"]
    both = read_tasks([mixed, plain], limit=2)
    assert [row["task"] for row in both] == ["mixed/writing", "mixed/math", "gsm8k", "gsm8k"]
    assert [row["place"] for row in both] == [f"{mixed}:1", f"{mixed}:3", f"{plain}:1", f"{plain}:3"]
    assert len(read_tasks([])) == len(read_prompts())


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    files = [write(tmp_path, TALK), write(tmp_path / "other", TALK)]
    with pytest.raises(SlipstreamError, match="two task files are named 'mine'"):
        read_tasks(files)


def test_a_missing_reference_is_told_with_its_line(tmp_path):
    require_references(read_tasks([write(tmp_path, HUMANEVAL, GSM8K, {**TALK, "reference": ["a", "b"]})]))
    for row, message in ((TALK, "no reference"), ({**TALK, "reference": "a"}, "1 references for 2 turns")):
        file = write(tmp_path, GSM8K, row)
        with pytest.raises(SlipstreamError, match=f"{file}:3: {message}; --score needs"):
            require_references(read_tasks([file]))
