"""Who is measured on what: drafts, rules, temperatures and batch sizes; measured answer by answer, resumable."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.data.journal import Journal
from slipstream.decode.evaluate import Record, answer_batch, warm_up
from slipstream.decode.recorder import record
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from slipstream.decode.engine import Decoder
    from slipstream.decode.recorder import Recorder

    Row = dict[str, Any]
    Groups = list[list[Record]]  # by contender and prompt


@dataclass(frozen=True)
class Plan:
    """What one run measures: every rule at every temperature and batch size, beside the two baselines.

    Attributes:
        rules: `exact`, `mars`, `mars:margin=0.5`, ..
        temperatures: 0 is greedy.
        batch_sizes: Prompts of one task that are answered together.
        max_new_tokens: Per turn.
        seed: Of draws and intervals; prompt i, in the order of its batch, draws from seed + i.
        score: Whether the answers are scored.
        trace: Whether every round of every draft is recorded.
    """

    rules: tuple[str, ...] = ("exact", "mars")
    temperatures: tuple[float, ...] = (0.0,)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 128
    seed: int = 0
    score: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("rules", "temperatures", "batch_sizes"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise SlipstreamError(f"{name} names {next(v for v in given if given.count(v) > 1)!r} twice")
        for rule in self.rules:
            Verifier.of(rule)
        if any(size < 1 for size in self.batch_sizes):
            raise SlipstreamError(f"batch_size must be at least 1, not {min(self.batch_sizes)}")
        for temperature in self.temperatures:
            if not 0 <= temperature < math.inf:
                raise SlipstreamError(f"temperature must be a number from 0 up, not {temperature:g}")
        if self.seed < 0:
            raise SlipstreamError(f"seed must not be negative, but is {self.seed}")
        if self.max_new_tokens < 1:
            raise SlipstreamError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    @property
    def settings(self) -> list[Setting]:
        """Every temperature with every batch size."""
        return [Setting(*pair) for pair in itertools.product(self.temperatures, self.batch_sizes)]


class Setting(NamedTuple):
    """What all contenders share in one comparison."""

    temperature: float
    batch_size: int


class Contender(NamedTuple):
    """A rule with the draft it judges, and that draft's fingerprint; the baselines have none."""

    rule: str
    draft: str | None
    decoder: Decoder
    fingerprint: str | None = None


class _Unit(NamedTuple):
    """What is measured at once: a batch of prompts, answered by every contender."""

    setting: Setting
    start: int  # place of its first prompt in the order of answering
    batch: list[int]  # places of the prompts among the rows


def measure(
    contenders: Sequence[Contender], rows: Sequence[Row], plan: Plan, path: Path, parts: Path, begun: dict[str, Any]
) -> dict[Setting, Groups]:
    """Records by setting, contender and row; what all answered to a batch of prompts is journalled at `path` together.

    So drift hits them alike, and an interruption does not come between a rule and its baseline. What is resumed is warmed
    up again. A trace of each batch is in `parts` before its answers are in the journal.
    """
    units = _units(rows, plan)
    warm: set[Setting] = set()
    answers: list[Record]
    with Journal(path, begun) as journal, progress("measure", len(units) * len(contenders), "batches") as advance:
        advance(len(journal.units) * len(contenders))
        for number, (setting, start, batch) in enumerate(units):
            if number in journal.units:
                continue
            answers, asked, heat = [], [rows[i] for i in batch], setting.temperature
            if setting not in warm:
                left = [[rows[i] for i in unit.batch] for unit in units[number:] if unit.setting == setting]
                for rule, _, decoder, _ in contenders:
                    warm_up(decoder, rule, left, max_new_tokens=plan.max_new_tokens, temperature=heat)
                warm.add(setting)
            for who, contender in enumerate(contenders):
                rule, _, decoder, _ = contender
                with _watched(contender, _part(parts, number, who) if plan.trace else None) as observer:
                    answers += answer_batch(
                        decoder,
                        rule,
                        asked,
                        max_new_tokens=plan.max_new_tokens,
                        temperature=heat,
                        seed=plan.seed + start,
                        observer=observer,
                    )
                advance()
            journal.append(number, [asdict(answer) for answer in answers])
        kept = journal.rows()
    out: dict[Setting, dict[tuple[int, int], Record]] = {setting: {} for setting in plan.settings}
    for row in kept:
        number, index, _ = row.pop("unit")
        setting, start, batch = units[number]
        who, place = divmod(index, len(batch))
        out[setting][who, batch[place]] = Record.from_dict({**row, "batch": start})
    return {
        setting: [[found[who, i] for i in range(len(rows))] for who in range(len(contenders))]
        for setting, found in out.items()
    }


def trace_parts(
    contenders: Sequence[Contender], rows: Sequence[Row], plan: Plan, parts: Path
) -> dict[tuple[Setting, int], list[tuple[Path, list[int]]]]:
    """What `measure` recorded, as `trace.join` takes it, by setting and contender.

    Requests count the turns of all rows: those of the first row, then those of the second, and so on.
    """
    first = [0, *itertools.accumulate(len(row["turns"]) for row in rows)]
    out: dict[tuple[Setting, int], list[tuple[Path, list[int]]]] = {}
    for number, (setting, _, batch) in enumerate(_units(rows, plan)):
        turns = range(max(len(rows[i]["turns"]) for i in batch))
        numbers = [first[i] + turn for turn in turns for i in batch if turn < len(rows[i]["turns"])]
        for who, contender in enumerate(contenders):
            if contender.draft is not None:
                out.setdefault((setting, who), []).append((_part(parts, number, who), numbers))
    return out


def _units(rows: Sequence[Row], plan: Plan) -> list[_Unit]:
    """All that is measured, in order; a unit's number is its place here."""
    return [
        _Unit(setting, start, batch) for setting in plan.settings for start, batch in _batches(rows, setting.batch_size)
    ]


def _part(parts: Path, unit: int, who: int) -> Path:
    """Where a contender's trace of a unit is."""
    return parts / f"{unit}-{who}.arrow"


def _watched(contender: Contender, path: Path | None) -> AbstractContextManager[Recorder | None]:
    """An observer that records a draft's rounds at `path`, or nobody."""
    if path is None or contender.draft is None:
        return nullcontext()
    path.parent.mkdir(exist_ok=True)
    return record(path, contender.decoder, draft=contender.fingerprint)


def _batches(rows: Sequence[Row], size: int) -> list[tuple[int, list[int]]]:
    """Places of the rows that are answered together, with the place of the first in the order of answering.

    A batch holds rows of one task; those with more turns come first, as `answer_batch` wants it.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    out: list[tuple[int, list[int]]] = []
    start = 0
    for task in tasks:
        mine = sorted((i for i, row in enumerate(rows) if row["task"] == task), key=lambda i: -len(rows[i]["turns"]))
        out += [(start + first, mine[first : first + size]) for first in range(0, len(mine), size)]
        start += len(mine)
    return out
