"""What padding costs: its share of the tokens of micro-batches, by the batches whose conversations are sorted together.

    python benchmarks/padding.py
    python benchmarks/padding.py --rounds 3

The conversations are those that ship with the package, and made-up ones of lengths far apart. No model is run, unless
`--rounds` asks what training gains where rows are padded to a few lengths only, or conversations are packed instead.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from jsonargparse import auto_cli

from slipstream.configs.recipe import DataSettings, DistillSettings, HeadSettings
from slipstream.data import batches
from slipstream.data.batches import MULTIPLE, POOL, Batches
from slipstream.data.conversations import load
from slipstream.distill.gguf import EMBEDDED
from slipstream.distill.heads import new_head
from slipstream.distill.target import load_target, load_tokenizer
from slipstream.distill.unroll import Distillation, labelled_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

SETTINGS = [(512, 1024), (2048, 4096), (2048, 8192)]


def drawn(count: int, max_length: int) -> Dataset:
    """Rows without content: lengths log-normal around 400 tokens, a sixth of them above 1,087, cut at `max_length`."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.0, count).clip(8, max_length).astype(int)
    return Dataset.from_list([{"input_ids": [0] * n, "mask": [1] * n} for n in lengths]).with_format("numpy")


def padding(tokens: Dataset, batch_tokens: int, pool: int, seeds: Iterable[int] = range(3)) -> float:
    """Share of padding to the longest row in an epoch, a mean over seeds."""
    batches.POOL = pool
    shares = []
    for seed in seeds:
        ordered = Batches(tokens, batch_tokens, seed)
        lengths = [ordered.lengths[ordered.rows(index)] for index in range(ordered.per_epoch)]
        shares.append(1 - ordered.lengths.sum() / sum(len(x) * x.max() for x in lengths))
    return float(np.mean(shares))


def trained(module: Distillation, batches: Batches) -> float:
    """Tokens per second of an epoch of training steps, the target's forwards included; padding does not count."""
    decay = torch.tensor([0.8**k for k in range(module.settings.steps)])
    begun = time.perf_counter()
    for index in range(batches.per_epoch):
        batch = batches[index]
        scale = decay / (labelled_rows(batch.mask, len(decay), batch.starts) * decay).sum()
        captured = module.target.capture(batch.input_ids, batch.starts)
        loss, _ = module(batch.input_ids, batch.mask, scale, captured, None, batch.starts)
        loss.backward()
        module.zero_grad()
    return float(batches.lengths.sum() / (time.perf_counter() - begun))


KINDS = {"to the longest": (1, False), f"to a multiple of {MULTIPLE}": (MULTIPLE, False), "packed": (MULTIPLE, True)}


def compared(rounds: int, conversations: int) -> None:
    """Print a Markdown table of epochs over the same conversations, padded and packed, which take turns.

    Every round has other batches: as in training, most of them are of a size that has not come before.
    """
    heads = " | ".join(f"{kind}, tokens/s | over the first" for kind in KINDS)
    print(f"\n| conversations | max_length | batch_tokens | {heads} |")
    print(f"|---|--:|--:|{'--:|--:|' * len(KINDS)}")
    target = load_target(EMBEDDED)
    head = new_head(target, torch.arange(8192), HeadSettings(), seed=0).train()
    module = Distillation(head, target, DistillSettings(), autocast=True)
    for max_length, batch_tokens in SETTINGS[:2]:
        tokens = load(DataSettings(max_length=max_length), target.chat_tokenizer).select(range(conversations))
        speeds = np.empty((rounds, len(KINDS)))
        for turn in range(rounds):
            for place, (batches.MULTIPLE, packed) in enumerate(KINDS.values()):
                speeds[turn, place] = trained(module, Batches(tokens, batch_tokens, turn, packed=packed))
        cells = []
        for own in speeds.T:
            ratios = own / speeds[:, 0]
            cells.append(f"{np.median(own):.0f} | {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]")
        print(f"| {conversations} shipped | {max_length} | {batch_tokens} | {' | '.join(cells)} |", flush=True)


def main(pools: list[int] = [1, 16, 64, 256], rounds: int = 0, conversations: int = 64) -> None:  # noqa: B006 (jsonargparse copies defaults)
    """Print Markdown tables.

    Args:
        pools: Batches whose conversations are sorted together.
        rounds: Times that the embedded target's head is trained on shipped conversations, padded in two ways and packed;
            medians are told, and the range of the ratios. 0 leaves that out.
        conversations: How many of them.
    """
    print(f"| conversations | max_length | batch_tokens | {' | '.join(f'pool of {pool}' for pool in pools)} |")
    print(f"|---|--:|--:|{'--:|' * len(pools)}")
    tokenizer = load_tokenizer(EMBEDDED)
    for name in ("shipped", "drawn"):
        for max_length, batch_tokens in SETTINGS:
            data = DataSettings(max_length=max_length)
            tokens = load(data, tokenizer) if name == "shipped" else drawn(4000, max_length)
            shares = (f"{padding(tokens, batch_tokens, pool):.1%}" for pool in pools)
            print(f"| {name} | {max_length} | {batch_tokens} | {' | '.join(shares)} |", flush=True)
    if rounds:
        batches.POOL = POOL
        compared(rounds, conversations)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
