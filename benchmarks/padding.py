"""What padding costs: its share of the tokens of micro-batches, by the batches whose conversations are sorted together.

    python benchmarks/padding.py

The conversations are those that ship with the package, and made-up ones of lengths far apart. No model is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from jsonargparse import auto_cli

from slipstream.configs.recipe import DataSettings
from slipstream.data import batches
from slipstream.data.batches import Batches
from slipstream.data.conversations import load
from slipstream.distill.gguf import EMBEDDED
from slipstream.distill.target import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

SETTINGS = [(512, 1024), (2048, 4096), (2048, 8192)]


def drawn(count: int, max_length: int) -> Dataset:
    """Rows without content: lengths log-normal around 400 tokens, a sixth of them above 1,087, cut at `max_length`."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.0, count).clip(8, max_length).astype(int)
    return Dataset.from_list([{"input_ids": [0] * n, "mask": [1] * n} for n in lengths]).with_format("numpy")


def padding(tokens: Dataset, batch_tokens: int, pool: int, seeds: Iterable[int] = range(3)) -> float:
    """Share of padding in an epoch, a mean over seeds."""
    batches.POOL = pool
    shares = []
    for seed in seeds:
        ordered = Batches(tokens, batch_tokens, seed)
        lengths = [ordered.lengths[ordered.rows(index)] for index in range(ordered.per_epoch)]
        shares.append(1 - ordered.lengths.sum() / sum(len(x) * x.max() for x in lengths))
    return float(np.mean(shares))


def main(pools: list[int] = [1, 16, 64, 256]) -> None:  # noqa: B006 (jsonargparse copies defaults)
    """Print a Markdown table.

    Args:
        pools: Batches whose conversations are sorted together.
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


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
