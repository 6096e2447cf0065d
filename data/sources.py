"""Where conversations lie: files, folders and data sets of the hub, opened as rows through `datasets`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetBuilder, load_dataset_builder
from datasets.exceptions import DatasetsError

from slipstream.configs.errors import SlipstreamError
from slipstream.data.journal import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_READERS = {".json": "json", ".jsonl": "text", ".parquet": "parquet", ".arrow": "arrow"}
_BESIDE = ("dataset_info.json", "dataset_dict.json", "state.json")  # what datasets.save_to_disk writes beside the rows
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_UNREADABLE = (DatasetsError, ValueError, ConnectionError, FileNotFoundError)  # pyarrow's errors are ValueErrors


def _told(error: BaseException) -> str:
    """The first line of what went wrong."""
    cause = error.__cause__ or error
    return (str(cause) or repr(cause)).splitlines()[0]


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set on the hub.

    Attributes:
        name: What messages call it.
        builder: Of `datasets`.
        split: Of the builder.
        stream: Read the rows where they lie; otherwise `datasets` first makes a copy of them in its cache.
    """

    name: str
    builder: DatasetBuilder
    split: str = "train"
    stream: bool = True

    @property
    def identity(self) -> str:
        """Changes when the content does: the cache folder is named after the files' times, or the hub's commit."""
        return f"{self.builder.cache_dir}:{self.split}"

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Rows with their numbers, from 1. A line of JSON lines that is no JSON comes as its text, a blank one never.

        Raises:
            SlipstreamError: If the source as a whole cannot be read.
        """
        try:
            if self.stream:
                rows = self.builder.as_streaming_dataset(split=self.split)
            else:
                self.builder.download_and_prepare()
                rows = self.builder.as_dataset(split=self.split)
            lines = self.builder.dataset_name == "text"
            for number, row in enumerate(rows, 1):
                if not lines:
                    yield number, row
                elif row["text"].strip():
                    yield number, _parsed(row["text"])
        except _UNREADABLE as error:
            raise SlipstreamError(f"{self.name} cannot be read: {_told(error)}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line.removeprefix("\ufeff"))  # some editors begin a file with this mark
    except (ValueError, RecursionError):
        return line


def shipped() -> Path:
    """The conversations that come with the package: the embedded target's own answers."""
    return Path(str(files("slipstream.data") / "conversations.parquet"))


def read(where: str | Path | Sequence[str | Path] | None = None, *, stream: bool = False) -> list[Source]:
    """Open files (JSON, JSONL, Parquet, Arrow), folders of them, and data sets of the hub (`owner/name[:split]`).

    Args:
        where: One of these, or several; None reads the conversations that ship with the package.
        stream: Read data sets of the hub over the network instead of downloading them. Files are always streamed, but
            for `.json`, which is one value and is read whole.

    Raises:
        SlipstreamError: If one of them does not exist, is of another kind, or is empty.
    """
    places = [shipped()] if where is None else [where] if isinstance(where, (str, Path)) else where
    if not places or not all(str(place).strip() for place in places):
        raise SlipstreamError("data.conversations names nothing; give files, folders or data sets, or leave it unset")
    return [source for place in places for source in _open(str(place), stream)]


def _open(where: str, stream: bool) -> list[Source]:
    path = Path(where).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _holds_rows(file))
        if not found:
            raise SlipstreamError(f"{path} holds no file that ends in one of {', '.join(_READERS)}")
        return [_open_file(file) for file in found]
    hub = _HUB.fullmatch(where)
    if path.exists() or not hub or path.suffix in _READERS:
        return [_open_file(path)]
    name, split = hub.groups(default="train")
    try:
        return [Source(where, load_dataset_builder(name), split, stream)]
    except _UNREADABLE as error:
        raise SlipstreamError(f"conversations {where!r} are neither here nor a data set: {_told(error)}") from error


def _holds_rows(file: Path) -> bool:
    """Whether a file in a folder is meant to be read; not what keeps books, nor a journal beside its Parquet file."""
    if file.suffix not in _READERS or file.name in _BESIDE or file.name.endswith(".settings.json"):
        return False
    packed = file.with_suffix(".parquet").is_file() and settings_of(file).is_file()
    return file.is_file() and not (file.suffix == ".jsonl" and packed)


def _open_file(file: Path) -> Source:
    if not file.is_file():
        raise SlipstreamError(f"conversations {str(file)!r} do not exist")
    if file.suffix not in _READERS:
        raise SlipstreamError(f"{file} must end in one of {', '.join(_READERS)}")
    if not file.stat().st_size:
        raise SlipstreamError(f"{file} is empty")
    builder = load_dataset_builder(_READERS[file.suffix], data_files=str(file))
    return Source(str(file), builder, stream=file.suffix != ".json")
