"""Objectives and kinds of heads at equal data and steps: acceptance length under the exact rule and under a relaxed one.

    python benchmarks/objectives.py --out runs/objectives --variants '["lk_lambda", "lk_margin"]' --seeds '[0, 1, 2]'

Every head answers the same prompts, greedily and at temperature 1; intervals are over prompts and seeds. In the figure they are
those of the difference to the first variant, laid around its acceptance length. Heads and what was measured with them stay in
the folder: an interrupted run goes on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from plots import Part, draw_points
from scipy.stats import t as student
from study import first_turns, resamples, run, show, sums, table

from slipstream.configs.files import write_atomic
from slipstream.configs.progress import progress
from slipstream.configs.recipe import DataSettings, DistillSettings, HeadSettings, Recipe, TrainSettings
from slipstream.data.batches import Batches
from slipstream.data.conversations import load
from slipstream.data.journal import digest
from slipstream.data.vocabulary import draft_vocabulary
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import answer_batch
from slipstream.decode.policy import Policy
from slipstream.decode.report import require_figures
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.features import OnlineFeatures
from slipstream.distill.heads import load_head, new_head, save_head
from slipstream.distill.target import Captured, Target, load_target
from slipstream.train.trainer import Trainer

if TYPE_CHECKING:
    from study import Stated

FEATURE = {"feature_weight": 1.0}
LK_LAMBDA = DistillSettings(objectives={"lk_lambda": 1.0})
VARIANTS: dict[str, tuple[HeadSettings, DistillSettings]] = {
    "forward_kl": (HeadSettings(), DistillSettings()),
    "lk_lambda": (HeadSettings(), LK_LAMBDA),
    "lk_margin": (HeadSettings(), DistillSettings(objectives={"lk_margin": 1.0})),
    "forward_kl + margin_mass": (HeadSettings(), DistillSettings(objectives={"forward_kl": 1.0, "margin_mass": 0.5})),
    "forward_kl + tree_hinge": (HeadSettings(), DistillSettings(objectives={"forward_kl": 1.0, "tree_hinge": 0.1})),
    "lk_lambda + tree_hinge": (HeadSettings(), DistillSettings(objectives={"lk_lambda": 1.0, "tree_hinge": 0.1})),
    "eagle1": (
        HeadSettings(kind="eagle1"),
        DistillSettings(objectives={"forward_kl": 0.1}, steps=1, noise=0.2, **FEATURE),
    ),
    "hass": (HeadSettings(kind="eagle1"), DistillSettings(objectives={"forward_kl": 0.1, "top_k": 1.0}, **FEATURE)),
    "parallel": (HeadSettings(kind="parallel"), LK_LAMBDA),
}
TREE = TreeShape(3, 4, 16)
BATCH = 4  # prompts answered together


def trained(
    name: str, seed: int, target: Target, steps: int, batches: int, margin: float, out: Path, kept: dict[int, Captured]
) -> Path:
    """The folder of one head, trained if it is not there."""
    folder = out / f"{name.replace(' ', '')}-{steps}-{batches}-{margin:g}-{seed}"
    if (folder / "draft").is_dir():
        return folder
    head_settings, distill = VARIANTS[name]
    data = DataSettings(batches=batches)
    tokens = load(data, target.chat_tokenizer)
    vocabulary = draft_vocabulary(tokens, head_settings.draft_vocab_size, target.vocab_size, target.stop_ids())
    recipe = Recipe(
        data=data,
        head=head_settings,
        distill=replace(distill, keep_features=True, relaxed_threshold=margin),
        train=TrainSettings(max_steps=steps, seed=seed),
    )
    head = new_head(target, vocabulary, head_settings, seed=seed)
    trainer = Trainer(recipe, target, head, Batches(tokens, data.batch_tokens, 0, batches), folder / "train")
    assert isinstance(trainer.features, OnlineFeatures)
    trainer.features.kept = kept  # the same batches for all heads that read the same layers
    trainer.run()
    result = trainer.result()
    assert result is not None
    save_head(result, folder / "draft", {"target": target.name})
    return folder


def measured(
    folder: Path, target: Target, cases: dict[str, tuple[Verifier, float]], rows: list[dict[str, Any]], tokens: int
) -> dict[str, list[list[float]]]:
    """The first four of `sums` of each prompt, by rule and temperature."""
    asked = [[row["turns"] for row in rows], [[name, *rule.to_dict().items(), t] for name, (rule, t) in cases.items()]]
    place = folder / f"measured-{digest([*asked, tokens, str(TREE)])}.json"
    if not place.is_file():
        head = load_head(folder / "draft", dtype=target.dtype)
        decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TREE))
        got: dict[str, list[list[float]]] = {name: [] for name in cases}
        with progress(f"decode with {folder.name}", len(cases) * len(rows), "answers") as advance:
            for name, (rule, temperature) in cases.items():
                for group in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
                    records = answer_batch(
                        decoder, rule, group, max_new_tokens=tokens, temperature=temperature, seed=len(got[name])
                    )
                    got[name] += sums(records)[:, :4].tolist()
                    advance(len(group))
        write_atomic(place, json.dumps(got))
    return dict(json.loads(place.read_text()))


def tau(counts: np.ndarray) -> np.ndarray:
    """Acceptance lengths, prompts pooled; [.., prompts, 4] gives [..]."""
    return counts[..., 0].sum(-1) / counts[..., 1].sum(-1)


def difference(ours: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Acceptance length above another's, and its 95 % interval over prompts and seeds; [prompts, seeds, 4] each.

    The variance over prompts, which both answer, is a paired bootstrap's; each side's seeds add that of their mean (one
    seed alone adds none). The interval is Student's, its degrees of freedom Welch's and Satterthwaite's.
    """
    picks = resamples(len(ours))
    spread = tau(ours[picks].sum(-2)) - tau(base[picks].sum(-2))
    parts = [(spread.var(), len(ours) - 1)]
    parts += [
        (tau(runs.swapaxes(0, 1)).var(ddof=1) / runs.shape[1], runs.shape[1] - 1)
        for runs in (ours, base)
        if runs.shape[1] > 1
    ]
    parts = [(variance, free) for variance, free in parts if variance]
    total = sum(variance for variance, _ in parts)
    value = float(tau(ours.sum(1)) - tau(base.sum(1)))
    if not parts:
        return value, value, value
    freedom = total**2 / sum(variance**2 / free for variance, free in parts)
    half = float(student.ppf(0.975, freedom) * np.sqrt(total))
    return value, value - half, value + half


def compared(counts: dict[str, dict[str, np.ndarray]]) -> str:
    """The table: by case and variant [prompts, seeds, 4], the first variant being what the others are compared with."""
    lines = []
    for case, by_name in counts.items():
        first = next(iter(by_name.values()))
        for name, mine in by_name.items():
            value, low, high = difference(mine, first)
            total = mine.sum((0, 1))
            alone = ", ".join(f"{length:.3f}" for length in tau(mine.swapaxes(0, 1)))
            change = "–" if mine is first else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append([case, name, f"{total[0] / total[1]:.3f}", alone, change, f"{total[2] / total[3]:.4f}"])
    columns = ["decoding", "variant", "acceptance length", "by seed", "over the first (95 %)", "regret (nats/token)"]
    return table(columns, lines, left=2)


def drawn(case: str, by_name: dict[str, np.ndarray], seeds: list[int]) -> Part:
    """Acceptance lengths of one case: all seeds of a variant, and each where there are several."""
    first = next(iter(by_name.values()))
    base = float(tau(first.sum(1)))
    lines: dict[str, dict[str, Stated]] = {}
    for name, mine in by_name.items():
        _, low, high = difference(mine, first)
        bounds = None if mine is first else [base + low, base + high]
        each = zip(seeds, tau(mine.swapaxes(0, 1)), strict=True) if len(seeds) > 1 else ()
        lines[name] = {"all seeds": (float(tau(mine.sum(1))), bounds)}
        lines[name] |= {f"seed {seed}": (float(length), None) for seed, length in each}
    return Part(case, lines, base)


def main(
    out: Path,
    variants: list[str] = ["lk_lambda", "forward_kl", "lk_margin"],  # noqa: B006 (jsonargparse copies defaults)
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    steps: int = 300,
    batches: int = 100,
    margin: float = 0.5,
    prompts: list[Path] | None = None,
    limit: int = 20,
    tokens: int = 64,
) -> None:
    """Print a Markdown table, and draw it; the first variant is what the others are compared with.

    Args:
        out: Folder for heads and results, table and figure.
        variants: Of `VARIANTS`.
        seeds: Of each.
        steps: Optimizer steps of each.
        batches: Micro-batches they all learn from.
        margin: Of the relaxed rule, nats.
        prompts: Spec-Bench JSONL files; default: the held-out prompts that ship with the package.
        limit: First prompts of each file; only first turns are asked.
        tokens: New tokens an answer.
    """
    require_figures()
    relaxed = Verifier("mars", "margin", margin)
    cases = {
        "exact, T=0": (Verifier(), 0.0),
        f"{relaxed.label}, T=0": (relaxed, 0.0),
        "exact, T=1": (Verifier(), 1.0),
        f"{relaxed.label}, T=1": (relaxed, 1.0),
    }
    rows = first_turns(prompts, limit)
    target = load_target("smollm2-135m-instruct")
    kept: dict[tuple[int, ...], dict[int, Captured]] = {}
    results: dict[str, list[dict[str, list[list[float]]]]] = {}
    for name in variants:
        last = target.config.num_hidden_layers
        reading = target.reading([last] if VARIANTS[name][0].kind == "eagle1" else target.layer_ids)
        memory = kept.setdefault(tuple(reading.layer_ids), {})
        folders = [trained(name, seed, reading, steps, batches, margin, out, memory) for seed in seeds]
        results[name] = [measured(folder, reading, cases, rows, tokens) for folder in folders]
    counts = {
        case: {name: np.array([run[case] for run in runs]).swapaxes(0, 1) for name, runs in results.items()}
        for case in cases
    }
    figure = draw_points(
        f"Acceptance length by objective, intervals of the difference to {variants[0]}",
        [drawn(case, by_name, seeds) for case, by_name in counts.items()],
    )
    show(out, figure, compared(counts))


if __name__ == "__main__":
    run(main)
