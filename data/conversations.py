"""Conversations from files: read through `datasets`, checked, and turned into token ids with the assistant's mask."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.data.template import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def shipped() -> Path:
    """The conversations that come with the package: the embedded target's own answers."""
    return Path(str(files("slipstream.data") / "conversations.parquet"))


def read(path: str | Path | None = None) -> Dataset:
    """Conversations from a JSON, JSONL or Parquet file, one `messages` list a row; None reads the shipped ones.

    Raises:
        SlipstreamError: If the file is missing, of another kind, or holds no conversations.
    """
    file = shipped() if path is None else Path(path).expanduser()
    if not file.is_file():
        raise SlipstreamError(f"conversations {str(file)!r} do not exist")
    if file.suffix not in _READERS:
        raise SlipstreamError(f"{file} must end in one of {', '.join(_READERS)}")
    if not file.stat().st_size:
        raise SlipstreamError(f"{file} is empty")
    try:
        rows = load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise SlipstreamError(f"{file} cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from error
    if "messages" not in rows.column_names:
        raise SlipstreamError(f"{file} has no column 'messages', but {', '.join(rows.column_names)}")
    return rows


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of `input_ids` and `mask` (1 on the assistant's tokens), cut at `max_length`; rows that teach nothing go.

    An answer that was cut short (`finished` false) has no end-of-turn token of its own, and none is taught.

    Raises:
        SlipstreamError: If a row's messages are none, or no row has an assistant turn.
    """

    def convert(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        if not _are_messages(row["messages"]):
            raise SlipstreamError(f"conversation {number + 1}: 'messages' must be a list of {{role, content}} texts")
        rendered = render(tokenizer, row["messages"])
        mask = list(rendered.assistant_mask)
        last = max((i for i, m in enumerate(mask) if m), default=None)
        if row.get("finished") is False and last is not None and rendered.input_ids[last] in tokenizer.all_special_ids:
            mask[last] = 0
        return {"input_ids": rendered.input_ids[:max_length], "mask": mask[:max_length]}

    tokens = rows.map(convert, with_indices=True, remove_columns=rows.column_names, desc="tokenize")
    tokens = tokens.filter(lambda row: sum(row["mask"]) > 1, desc="filter")
    if not len(tokens):
        raise SlipstreamError(
            "no conversation has an assistant turn within max_length; nothing can be learned from them"
        )
    return tokens.with_format("numpy")


def pack(journal: Path, out: Path) -> None:
    """A journal of conversations as a small Parquet file (zstd), without the journal's own columns."""
    rows = read(journal)
    keep = ("id", "category", "messages", "temperature", "finished", "tokens")
    table = rows.select_columns([name for name in keep if name in rows.column_names]).with_format("arrow")[:]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", compression_level=19)
    write_atomic(out, buffer.getvalue())
