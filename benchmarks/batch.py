"""Batched exact decoding against the same prompts one after another, and what verification itself costs.

python benchmarks/batch.py --draft runs/quickstart/draft
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from jsonargparse import auto_cli
from torch.nn.functional import pad

import slipstream
from slipstream.decode.tasks import encode_first, read_prompts
from slipstream.decode.tree import make_tree
from slipstream.decode.verify import Verifier, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from slipstream.decode.engine import Decoder


def _verification(nodes: int, vocabulary: int, device: torch.device, repeats: int = 21) -> dict[str, float]:
    """Milliseconds of greedy verification, exact and by MARS, and of a plain arg-max over its logits; medians."""
    with device:
        parents = (torch.arange(nodes) // 2)[None]
        tree = make_tree(torch.randint(0, vocabulary, (1, nodes)), parents, torch.zeros(1, nodes), levels=7)
        logits = torch.randn(1, nodes, vocabulary).bfloat16()
    parts: dict[str, Callable[[], object]] = {
        "exact": lambda: verify(Verifier(), tree, logits),
        "MARS": lambda: verify(Verifier("mars"), tree, logits),
        "a plain arg-max": lambda: logits.max(-1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            _wait(device)
            begun = time.perf_counter()
            part()
            _wait(device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: 1000 * median(times) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    """For a card, until it has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pairs(decoder: Decoder, encoded: list[Tensor], batch: int, max_new_tokens: int) -> Tensor:
    """New tokens and seconds of each group of prompts, one by one and together, [groups, 2, 2]."""
    settings, pairs = {"max_new_tokens": max_new_tokens, "verify": "exact"}, []
    for start in range(0, len(encoded) - batch + 1, batch):
        group = encoded[start : start + batch]
        alone = [decoder.generate(ids[None], **settings).stats for ids in group]
        width = max(map(len, group))
        ids = torch.stack([pad(x, (width - len(x), 0)) for x in group])
        mask = torch.stack([pad(torch.ones_like(x), (width - len(x), 0)) for x in group])
        together = decoder.generate(ids, attention_mask=mask, **settings).stats
        one_by_one = [sum(s.new_tokens for s in alone), sum(s.seconds for s in alone)]
        pairs.append([one_by_one, [together.new_tokens, together.seconds]])
    return torch.tensor(pairs)


def main(
    draft: str,
    target: str = "smollm2-135m-instruct",
    batch: int = 4,
    prompts: int = 20,
    max_new_tokens: int = 96,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> None:
    """Print tokens per second of both, and the ratio of each group of prompts.

    Args:
        draft: A head's folder.
        target: The target model.
        batch: Prompts decoded together.
        prompts: How many of the held-out prompts.
        max_new_tokens: Per prompt.
        dtype: Of target and head.
        device: `cpu` or `cuda`.
    """
    decoder = slipstream.load(target, draft, dtype=dtype, device=device)
    encoded = [torch.tensor(encode_first(decoder.target, row)) for row in read_prompts(limit=prompts)]
    for _ in range(2):  # the first time is not counted: a card loads and chooses kernels for every new shape
        pairs = _pairs(decoder, encoded, batch, max_new_tokens)
    speed, *speeds = (pair[:, 0] / pair[:, 1] for pair in (pairs.sum(0), *pairs))
    ratios = [float(each[1] / each[0]) for each in speeds]
    print(
        f"one by one {speed[0]:.1f} tokens/s, batch of {batch} {speed[1]:.1f} tokens/s: {speed[1] / speed[0]:.2f}x "
        f"(groups {min(ratios):.2f} to {max(ratios):.2f})"
    )
    for vocabulary in (decoder.target.vocab_size, 128_000):
        told = ", ".join(
            f"{name} {took:.2f} ms" for name, took in _verification(64, vocabulary, decoder.target.device).items()
        )
        print(f"greedy verification, 64 nodes x {vocabulary}: {told}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
