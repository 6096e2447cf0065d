"""Append-only JSON lines that survive a kill: work is written in units, and a torn unit is dropped on opening."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, TextIO

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_LATER = ("prompts_digest",)  # files begun by earlier versions lack these settings, and are continued


def _is_unit(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(number, int) for number in value)


def settings_of(path: Path) -> Path:
    """Where a journal's settings lie."""
    return path.with_name(path.name + ".settings.json")


def digest(value: Any) -> str:
    """A short name for a JSON value, by which settings tell whether it is the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Journal:
    """A JSONL file whose rows came in numbered units, each written at once and synced.

    Every row carries `"unit": [number, index, size]`; a unit counts when all its rows are there. What made the file is
    kept beside it (`NAME.settings.json`), so that a file is never continued with other settings.

    Raises:
        SlipstreamError: If the file was made with other settings, or by somebody else, or is being written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or (path.is_file() and not path.stat().st_size)
        if not fresh:
            self._require_same(settings)
        self._file = self._opened()
        try:
            write_atomic(settings_of(path), json.dumps(settings, indent=2))
            self._units = self._recover()
        except BaseException:
            self._file.close()
            raise

    def _require_same(self, settings: dict[str, Any]) -> None:
        """Make sure that the file was begun with these settings."""
        beside = settings_of(self.path)
        if not beside.exists():
            raise SlipstreamError(f"{self.path} exists and was not begun by slipstream; give another --out")
        try:
            before = dict(json.loads(beside.read_text()))
        except (ValueError, TypeError) as error:
            raise SlipstreamError(f"{beside} is damaged, and {self.path} cannot go on; give another --out") from error
        told = {**{k: settings.get(k) for k in _LATER}, **before}
        changed = [k for k in {**told, **settings} if told.get(k) != settings.get(k)]
        if changed:
            raise SlipstreamError(
                f"{self.path} was made with {changed[0]}={told.get(changed[0])!r}, not {settings.get(changed[0])!r}; "
                "give another --out, or the settings it was begun with"
            )

    def _opened(self) -> TextIO:
        """The file to append to; nobody else may have it open, where the file system knows of locks."""
        file = self.path.open("a", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SlipstreamError(f"{self.path} is being written by another process; give another --out") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return file

    def _recover(self) -> dict[int, list[dict[str, Any]]]:
        units: dict[int, list[dict[str, Any]]] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace")
        *lines, torn = text.split("\n")  # not splitlines: a row may hold U+2028; a whole one ends in a newline
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by a kill; its unit is incomplete and goes with it
            if not isinstance(row, dict) or not _is_unit(row.get("unit")):
                raise SlipstreamError(
                    f"{self.path}:{number} is no row of slipstream's; remove it, or give another --out"
                )
            units.setdefault(row["unit"][0], []).append(row)
        whole = {k: rows for k, rows in units.items() if len(rows) == rows[0]["unit"][2]}
        kept = [row for rows in whole.values() for row in rows]
        if torn or len(kept) < len(lines):
            write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
            before, self._file = self._file, self._opened()  # of the new file
            before.close()
        return whole

    @property
    def units(self) -> set[int]:
        """Numbers of the complete units."""
        return set(self._units)

    @property
    def next_unit(self) -> int:
        """The number after the highest complete unit."""
        return max(self._units, default=-1) + 1

    def rows(self) -> list[dict[str, Any]]:
        """All rows of complete units, in the order of their units."""
        return [row for unit in sorted(self._units) for row in self._units[unit]]

    def append(self, unit: int, rows: list[dict[str, Any]]) -> None:
        """Write one unit; on return it is on disk."""
        rows = [{**row, "unit": [unit, i, len(rows)]} for i, row in enumerate(rows)]
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        if rows:
            self._units[unit] = rows

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
