"""Progress of long work: a bar with a rate and an ETA on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

console = Console(stderr=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.1f} {task.fields['unit']}/s" if rate else "", style="cyan")


class Advance:
    """Call it with the amount of work done; `note` shows a few words behind the bar."""

    def __init__(self, bar: Progress, total: float | None, label: str, unit: str) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total, unit=unit, note="")
        self.started = time.monotonic()

    def __call__(self, amount: float = 1, note: str = "") -> None:
        self._bar.advance(self._task, amount)
        if note:
            self._bar.update(self._task, note=note)


@contextlib.contextmanager
def progress(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    """A progress bar over `total` units of work (None: nobody knows). Nothing is printed where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar if console.is_terminal else contextlib.nullcontext():  # older rich ends a disabled bar with an empty line
        yield Advance(bar, total, label, unit)
