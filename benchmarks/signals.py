"""Ratio against margin against odds at equal regret: thresholds swept over a trace at T = 0, real runs at T = 1.

    python benchmarks/signals.py --draft runs/quickstart/draft --out runs/signals \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 64 tokens take some 10 minutes at 60 tokens/s: one run to record, ten at T = 1; the replays take seconds. At T = 0
every rule judges the same rounds, so acceptance lengths there are estimates of what runs would give. The odds of a
runner-up at T = 1, and greedily, are exp(-margin): those two signals trace one curve, and differ by their thresholds alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from plots import Panel, draw_curves
from study import Study, regret, relaxed, resamples, run, show, sums, table, tau, words

from slipstream.data.journal import digest
from slipstream.decode.replay import replay
from slipstream.decode.trace import Trace
from slipstream.decode.tune import record_exact
from slipstream.decode.verify import Verifier
from slipstream.distill.relaxation import near_top

if TYPE_CHECKING:
    from study import Stated

SWEPT = {
    "ratio": [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85],
    "margin": [0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0],
    "odds": [0.9, 0.8, 0.6, 0.5, 0.4, 0.25, 0.15, 0.05],
}
SAMPLED = {"ratio": [0.98, 0.95, 0.9], "margin": [0.5, 1.0, 2.0], "odds": [0.6, 0.35, 0.15]}
LEVELS = (0.01, 0.02, 0.05)


def traced(study: Study) -> Trace:
    """The trace of exact greedy answers to all prompts, recorded if it is not there."""
    decoder = study.decoder
    policy = {**decoder.policy.to_dict(), "measured": None}
    path = study.out / f"trace-{digest([study.begun, policy])}.arrow"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        record_exact(decoder, study.rows, path, study.tokens)
    return Trace.open(path, decoder)


def replayed(trace: Trace, rule: Verifier, prompts: int) -> np.ndarray:
    """`sums` of what a rule makes of the recorded rounds, [prompts, 5]."""
    decision = replay(trace, rule).decision
    request = torch.cat([rounds.request for rounds in trace.rounds()])
    drafted = torch.cat([rounds.round > 0 for rounds in trace.rounds()])
    passed = (decision.tags == 1) & (torch.arange(decision.tags.shape[1]) < decision.counts[:, None])  # [R, D]
    columns = [
        decision.counts * drafted,
        drafted,
        (decision.regrets * passed).sum(1),
        decision.counts,
        passed.sum(1),
    ]
    values = torch.stack([column.double() for column in columns], 1)  # [R, 5]
    return torch.zeros(prompts, 5, dtype=torch.double).index_add(0, request, values).numpy()


def runners_up(trace: Trace) -> torch.Tensor:
    """The two largest logits at every position of the recorded answers, [positions, 2]."""
    pairs = []
    for rounds in trace.rounds():
        kept = rounds.path >= 0
        largest = rounds.evidence.best(2)  # [R, N, 2]
        path = rounds.path.clamp(min=0)[:, :, None].expand(-1, -1, 2)
        pairs.append(largest.gather(1, path)[kept])
    return torch.cat(pairs)


def by_regret(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regrets, ascending, and acceptance lengths of the points [K, 5] of a signal, [K] both."""
    regrets, lengths = points[:, 2] / points[:, 3], points[:, 0] / points[:, 1]
    order = np.argsort(regrets, kind="stable")
    return regrets[order], lengths[order]


def at_levels(points: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Acceptance length at each regret, between the points [K, 5] of a signal; NaN beyond the largest."""
    return np.interp(levels, *by_regret(points), right=np.nan)


def equal_regret(curves: dict[str, np.ndarray], levels: tuple[float, ...]) -> dict[str, list[tuple[Stated, Stated]]]:
    """By signal and level: acceptance length, and how much it is above the first signal's; paired over prompts.

    Args:
        curves: `sums` of each signal's thresholds, the exact rule first, [K, prompts, 5].
        levels: Regrets, nats per token.
    """
    prompts = next(iter(curves.values())).shape[1]
    picks = resamples(prompts)
    values = {name: at_levels(curve.sum(1), levels) for name, curve in curves.items()}
    spread = {
        name: np.array([at_levels(curve[:, pick].sum(1), levels) for pick in picks]) for name, curve in curves.items()
    }
    first = next(iter(curves))

    def stated(value: float, samples: np.ndarray) -> Stated:
        """A level that some samples do not reach has no interval."""
        bounds = np.quantile(samples, [0.025, 0.975]) if prompts > 1 and not np.isnan(samples).any() else None
        return value, None if bounds is None else bounds.tolist()

    return {
        name: [
            (
                stated(values[name][i], spread[name][:, i]),
                stated(values[name][i] - values[first][i], spread[name][:, i] - spread[first][:, i]),
            )
            for i in range(len(levels))
        ]
        for name in curves
    }


def line(temperature: str, name: str, threshold: str, fires: str, counts: np.ndarray) -> list[str]:
    """A line of the table of thresholds."""
    costs = [words(tau(counts)), f"{relaxed(counts):.1%}", words(regret(counts), 4)]
    return [temperature, name, threshold, fires, *costs]


def main(
    swept: dict[str, list[float]] = SWEPT,
    sampled: dict[str, list[float]] = SAMPLED,
    levels: tuple[float, ...] = LEVELS,
    **settings: Any,
) -> None:
    """Print two Markdown tables: every threshold, and the signals at equal regret; draw all thresholds.

    Args:
        swept: Thresholds by signal at T = 0.
        sampled: Thresholds by signal at T = 1.
        levels: Regrets at which the signals are compared, nats per token.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    trace = traced(study)
    top, second = runners_up(trace).unbind(1)
    strict = replayed(trace, Verifier(), len(study.rows))
    lines, curves = [line("0", "exact", "", "", strict)], {}
    for signal, thresholds in swept.items():
        points = [replayed(trace, Verifier("mars", signal, value), len(study.rows)) for value in thresholds]
        shares = [float(near_top(signal, value, top, second).float().mean()) for value in thresholds]
        lines += [
            line("0", signal, f"{value:g}", f"{share:.0%}", counts)
            for value, share, counts in zip(thresholds, shares, points, strict=True)
        ]
        curves[signal] = np.stack([strict, *points])
    rules = {(s, value): f"mars:{s}={value:g}" for s, thresholds in sampled.items() for value in thresholds}
    pairs = {text: (study.decoder, text) for text in ["exact", *rules.values()]}
    counts = {text: sums(records) for text, records in study.answers(pairs, temperature=1.0).items()}
    lines.append(line("1", "exact", "", "", counts["exact"]))
    lines += [line("1", s, f"{value:g}", "", counts[text]) for (s, value), text in rules.items()]
    groups = {s: [counts["exact"], *(counts[rules[s, value]] for value in sampled[s])] for s in sampled}
    drawn = {"0": curves, "1": {s: np.stack(group) for s, group in groups.items()}}
    found = {temperature: equal_regret(by_signal, levels) for temperature, by_signal in drawn.items()}
    equal = [
        [temperature, f"{level:g}", s, *(words(stated, 3) for stated in by_level[i])]
        for temperature, by_signal in found.items()
        for i, level in enumerate(levels)
        for s, by_level in by_signal.items()
    ]
    show(
        study.out,
        draw_curves(
            "Acceptance length against regret by signal, greedily and at temperature 1",
            [
                Panel(f"T = {temperature}", {s: list(zip(*by_regret(x.sum(1)), strict=True)) for s, x in group.items()})
                for temperature, group in drawn.items()
            ],
            "regret (nats per token)",
            "acceptance length",
        ),
        table(["T", "signal", "threshold", "fires at", "tau", "relaxed", "regret (nats/token)"], lines, left=2),
        table(["T", "regret (nats/token)", "signal", "tau", "above the first"], equal, left=3),
    )


if __name__ == "__main__":
    run(main)
