"""Prompts to measure on: Spec-Bench's rows, and the rows of HumanEval and GSM8K as their authors publish them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.configs.errors import SlipstreamError
from slipstream.data.messages import require_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from slipstream.distill.target import Target

    Row = dict[str, Any]

PROGRAM_FIELDS = ("task_id", "prompt", "test", "entry_point")
_SHIPPED = Path(str(files("slipstream.data") / "prompts.jsonl"))
_ASK_FOR_CODE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """Rows of one task file, as `question_id, category, turns` and what else they hold; None is the shipped prompts.

    A GSM8K row (`question, answer`) becomes one turn and its reference; a HumanEval row becomes a request for the
    function.

    Raises:
        SlipstreamError: If the file is missing, or a row lacks a field.
    """
    file = Path(path).expanduser() if path is not None else _SHIPPED
    return [row for _, row in _limited(file, limit)]


def encode_first(target: Target, row: Row) -> list[int]:
    """Token ids of a row's first turn, up to the opening of the answer."""
    return target.encode_prompt([{"role": "user", "content": row["turns"][0]}])


def tuning_prompts() -> list[Row]:
    """The prompts that ship for tuning; none of them is among those for measuring."""
    return read_tasks([_SHIPPED.with_name("prompts_tune.jsonl")])


def read_tasks(paths: Sequence[Path], limit: int | None = None) -> list[Row]:
    """Rows of several task files, each with its `task` and its `place` (`file:line`); no paths: the shipped prompts.

    The task of a row is its category. Where there are several files it is the file's name, followed by the category
    (`mt_bench/writing`) where the file has more than one. `limit` is per file.

    Raises:
        SlipstreamError: If a file is missing or named twice, or a row lacks a field.
    """
    chosen = [path.expanduser() for path in paths] or [_SHIPPED]
    stems = [path.stem for path in chosen]
    for stem in stems:
        if stems.count(stem) > 1:
            raise SlipstreamError(f"two task files are named {stem!r}; their tables could not be told apart")
    out = []
    for file in chosen:
        placed = _limited(file, limit)
        several = len({row["category"] for _, row in placed}) > 1
        for number, row in placed:
            parts = [row["category"]] if len(chosen) == 1 else [file.stem, row["category"] if several else ""]
            out.append({**row, "task": "/".join(filter(None, parts)) or "all", "place": f"{file}:{number}"})
    return out


def require_references(rows: Sequence[Row], option: str = "--score") -> None:
    """Make sure that every row of `read_tasks` can be scored, as `option` wants it.

    Raises:
        SlipstreamError: If a row has neither a reference per turn nor a test; it is named.
    """
    for row in rows:
        given, wanted = len(row.get("reference", [])), len(row["turns"])
        if "test" not in row and given < wanted:
            what = f"{given} references for {wanted} turns" if given else "no reference"
            raise SlipstreamError(f'{row["place"]}: {what}; {option} needs "reference", one per turn')


def _limited(file: Path, limit: int | None) -> list[tuple[int, Row]]:
    """The first `limit` rows with their line numbers."""
    if limit is not None and limit < 1:
        raise SlipstreamError(f"limit must be at least 1, not {limit}")
    if not file.is_file():
        raise SlipstreamError(f"prompts {str(file)!r} do not exist")
    rows = list(_rows(file))
    if not rows:
        raise SlipstreamError(f"{file} holds no prompts")
    return rows[:limit]


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlipstreamError(f"{file} is not UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a row may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            require_text(row)
        except json.JSONDecodeError as error:
            raise SlipstreamError(f"{file}:{number}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise SlipstreamError(f"{file}:{number}: nested too deeply") from error
        except SlipstreamError as error:
            raise SlipstreamError(f"{file}:{number}: {error}") from error
        yield number, _checked(_as_turns(row if isinstance(row, dict) else {}), f"{file}:{number}", number)


def _as_turns(row: Row) -> Row:
    """HumanEval's and GSM8K's own rows as Spec-Bench's; any other row as it is."""
    if "turns" not in row and all(isinstance(row.get(field), str) for field in PROGRAM_FIELDS):
        return {"question_id": row["task_id"], **row, "turns": [_ASK_FOR_CODE.format(row["prompt"])]}
    if "turns" not in row and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return {**row, "turns": [row["question"]], "reference": [row["answer"]]}
    return row


def _checked(row: Row, place: str, number: int) -> Row:
    """The row with an id and a category, its reference as a list."""
    if "turns" not in row and ({"task_id", "entry_point", "test"} & set(row)):
        missing = next(field for field in PROGRAM_FIELDS if not isinstance(row.get(field), str))
        raise SlipstreamError(f"{place}: a HumanEval row needs {missing!r}, a string")
    if "turns" not in row and "question" in row:
        raise SlipstreamError(f"{place}: a GSM8K row needs 'question' and 'answer', both strings")
    if not _is_texts(row.get("turns")):
        raise SlipstreamError(f'{place}: needs "turns", a list of user messages')
    row = {"question_id": number, "category": "", **row}
    if not isinstance(row["category"], str):
        raise SlipstreamError(f'{place}: "category" must be a string, not {row["category"]!r}')
    if "reference" in row:
        row["reference"] = [row["reference"]] if isinstance(row["reference"], str) else row["reference"]
        if not _is_texts(row["reference"]):
            raise SlipstreamError(f'{place}: "reference" must be a list of strings, one per turn')
    if "test" in row and not all(isinstance(row.get(field), str) for field in ("prompt", "test", "entry_point")):
        raise SlipstreamError(f'{place}: "test" needs "prompt" and "entry_point" beside it, all strings')
    return row


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
