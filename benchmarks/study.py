"""What the studies here share: prompts, answers that survive an interruption, intervals over prompts, tables."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse import auto_cli

import slipstream
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.data.journal import digest
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import mean_interval
from slipstream.decode.plan import Contender, Plan, measure
from slipstream.decode.report import markdown_line, require_figures
from slipstream.decode.tasks import read_tasks
from slipstream.decode.trace import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from slipstream.decode.evaluate import Record

    Row = dict[str, Any]
    Stated = tuple[float, list[float] | None]  # a value and its 95 % interval


@dataclass(frozen=True)
class Study:
    """What is decoded, and where the answers are kept.

    Attributes:
        draft: A head's folder.
        out: Folder for answers, table and figure; the same command again goes on where it was interrupted.
        target: The target model.
        prompts: Task files, "[a.jsonl, b.jsonl]"; default: the held-out prompts that ship with the package.
        limit: First prompts of each file; only first turns are asked.
        tokens: New tokens an answer.
        batch_size: Prompts that are answered together.
        dtype: Of target and head.
        device: `cpu` or `cuda`.
        seed: Of the draws; the i-th prompt, in the order of answering, draws from seed + i.
    """

    draft: str
    out: Path
    target: str = "smollm2-135m-instruct"
    prompts: list[Path] | None = None
    limit: int = 10
    tokens: int = 64
    batch_size: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        require_figures()

    @cached_property
    def decoder(self) -> Decoder:
        """The target with the head and its policy."""
        return slipstream.load(self.target, self.draft, dtype=self.dtype, device=self.device)

    @cached_property
    def rows(self) -> list[Row]:
        """The prompts."""
        return first_turns(self.prompts, self.limit)

    @property
    def begun(self) -> dict[str, Any]:
        """What answers kept in the folder depend on."""
        return {
            "target": self.target,
            "draft": fingerprint(self.decoder.drafter),
            "dtype": self.dtype,
            "prompts": digest([[row["task"], row["turns"]] for row in self.rows]),
            "tokens": self.tokens,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def variant(self, **changes: Any) -> Decoder:
        """The decoder with some fields of its policy changed."""
        return Decoder(self.decoder.target, self.decoder.drafter, replace(self.decoder.policy, **changes))

    def answers(self, pairs: Mapping[str, tuple[Decoder, str]], temperature: float = 0.0) -> dict[str, list[Record]]:
        """Records by prompt of each decoder with its rule; all answer a prompt before the next one comes.

        Raises:
            SlipstreamError: If the folder holds answers of other settings.
        """
        plan = Plan(
            temperatures=(temperature,), batch_sizes=(self.batch_size,), max_new_tokens=self.tokens, seed=self.seed
        )
        contenders = [Contender(rule, None, decoder) for decoder, rule in pairs.values()]
        compared = [
            [name, {**decoder.policy.to_dict(), "measured": None}, decoder.policy.rule(rule).to_dict()]
            for name, (decoder, rule) in pairs.items()
        ]
        begun = self.begun | {"temperature": temperature, "compared": digest(compared)}
        records = measure(contenders, self.rows, plan, self.out / f"answers-{temperature:g}.jsonl", self.out, begun)
        return dict(zip(pairs, records[plan.settings[0]], strict=True))


def show(out: Path, figure: str, *tables: str) -> None:
    """Print tables, and keep them and a figure (SVG) in a folder."""
    text = "\n\n".join(tables)
    write_atomic(out / "table.md", text + "\n")
    write_atomic(out / "figure.svg", figure)
    print(text)


def first_turns(prompts: Sequence[Path] | None, limit: int) -> list[Row]:
    """The first rows of each task file, or of the shipped prompts, with their first turns alone."""
    return [{**row, "turns": row["turns"][:1]} for row in read_tasks(prompts or [], limit)]


def sums(records: Sequence[Record]) -> np.ndarray:
    """Tokens emitted in rounds, rounds, regret, all tokens, relaxed ones; [prompts, 5]."""
    return np.array(
        [[sum(r.accept_lengths), len(r.accept_lengths), r.regret, r.tokens, r.relaxed] for r in records], float
    )


def tau(counts: np.ndarray) -> Stated:
    """Acceptance length, from `sums`."""
    return mean_interval(counts[:, 0].tolist(), counts[:, 1].tolist(), 0)


def regret(counts: np.ndarray) -> Stated:
    """Nats per token, from `sums`."""
    return mean_interval(counts[:, 2].tolist(), counts[:, 3].tolist(), 0)


def relaxed(counts: np.ndarray) -> float:
    """Share of tokens that were relaxed, from `sums`."""
    return float(counts[:, 4].sum() / counts[:, 3].sum())


def speed(records: Sequence[Record]) -> float:
    """Tokens per second."""
    return sum(r.tokens for r in records) / sum(r.seconds for r in records)


def mean(values: Sequence[float] | np.ndarray) -> Stated:
    """Of one value per prompt."""
    return mean_interval(list(values), [1.0] * len(values), 0)


def resamples(count: int, samples: int = 2000) -> np.ndarray:
    """Prompts of each sample of a bootstrap, [samples, count]."""
    return np.random.default_rng(0).integers(count, size=(samples, count))


def words(stated: Stated, digits: int = 2) -> str:
    """A value and its interval, `1.94 [1.80, 2.08]`; NaN is a dash."""
    value, bounds = stated
    if math.isnan(value):
        return "–"
    span = f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else ""
    return f"{value:.{digits}f}{span}"


def table(names: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns hold words."""
    ruler = "|" + "|".join(["---"] * left + ["--:"] * (len(names) - left)) + "|"
    return "\n".join([markdown_line(names), ruler, *map(markdown_line, lines)])


def run(main: Callable[..., None]) -> None:
    """The command line of a script; bad input ends it with one line."""
    try:
        auto_cli(main, as_positional=False)
    except SlipstreamError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
