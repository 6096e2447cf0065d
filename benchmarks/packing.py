"""What packed weights are worth: one forward of the target over few tokens, as transformers runs it and packed.

python benchmarks/packing.py
"""

from __future__ import annotations

import time

import torch
from jsonargparse import auto_cli

from slipstream.decode.cache import TreeCache, causal
from slipstream.distill.packing import Packing
from slipstream.distill.target import Target, load_target

_COMMITTED = 64


def _seconds(target: Target, cache: TreeCache, tokens: int) -> float:
    ids = torch.randint(0, target.vocab_size, (1, tokens))
    visible, positions = cache.visible(causal(tokens, 1, ids.device), tokens), torch.arange(tokens)[None] + _COMMITTED
    begun = time.perf_counter()
    target.forward(ids, position_ids=positions, visible=visible, cache=cache)
    took = time.perf_counter() - begun
    cache.rollback()
    return took


@torch.inference_mode()
def main(target: str = "smollm2-135m-instruct", repeats: int = 31) -> None:
    """Print a Markdown table of milliseconds: median and, in brackets, the middle half.

    Args:
        target: The target model, in bf16.
        repeats: Forwards of each kind; the two kinds take turns.
    """
    plain, packed = load_target(target), load_target(target)
    plain._packing = Packing()  # nothing packed
    caches = []
    for one in (plain, packed):
        cache = TreeCache(one.config.num_hidden_layers)
        one.forward(torch.zeros(1, _COMMITTED, dtype=torch.long), cache=cache)
        cache.commit_first([_COMMITTED])
        caches.append(cache)
    print("| tokens | plain, ms | packed, ms | ratio |\n|--:|--:|--:|--:|")
    for tokens in (1, 4, 8, 16, 24, 32, 64):
        pairs = [
            [_seconds(one, cache, tokens) for one, cache in zip((plain, packed), caches, strict=True)]
            for _ in range(repeats + 2)
        ]
        times = 1000 * torch.tensor(pairs[2:])
        cells = [
            "{1:.1f} [{0:.1f}, {2:.1f}]".format(*column.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist())
            for column in times.T
        ]
        print(f"| {tokens} | {cells[0]} | {cells[1]} | {float((times[:, 0] / times[:, 1]).median()):.2f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
