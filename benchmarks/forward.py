"""A forward of the target as transformers runs it, with packed weights, with attention by blocks as well, and compiled.

Blocks are forced upon few tokens and upon CPUs with AMX too, which the package leaves to torch's kernel.

python benchmarks/forward.py
"""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from jsonargparse import auto_cli

from slipstream.decode.cache import TreeCache, causal, fixed_capacity
from slipstream.distill import blocks
from slipstream.distill.packing import Packing
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from slipstream.distill.target import Target


_MOST = 64  # tokens of a forward behind a context


def _behind(target: Target, context: int) -> Callable[[int], None]:
    """A forward of some tokens behind a context."""
    cache = TreeCache(target.config.num_hidden_layers, capacity=fixed_capacity(context + _MOST))
    target.forward(torch.zeros(1, context, dtype=torch.long), cache=cache)
    cache.commit_first([context])
    cache.compiled = how = target.compiled

    def forward(tokens: int) -> None:
        tokens = how.size(tokens) if how else tokens
        ids = torch.randint(0, target.vocab_size, (1, tokens))
        visible, positions = cache.visible(causal(tokens, 1, ids.device)), torch.arange(tokens)[None] + context
        target.forward(ids, position_ids=positions, visible=visible, cache=cache)
        cache.rollback()

    return forward


def _seconds(forward: Callable[[int], object], tokens: int, *, stock: bool) -> float:
    with ExitStack() as stack:
        if stock:
            stack.enter_context(patch.object(blocks, "used", lambda *_: nullcontext()))
        stack.enter_context(patch.object(blocks, "_kernel_wins", lambda _: False))
        begun = time.perf_counter()
        forward(tokens)
        return time.perf_counter() - begun


def _row(label: str, contenders: list[tuple[Callable[[int], object], bool]], tokens: int, repeats: int) -> None:
    """Medians and middle halves in ms, and how often the last fits into the others; the contenders take turns."""
    rounds = [[_seconds(run, tokens, stock=stock) for run, stock in contenders] for _ in range(repeats + 2)]
    times = 1000 * torch.tensor(rounds[2:])
    quarters = times.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).T.tolist()
    cells = [f"{middle:.1f} [{low:.1f}, {high:.1f}]" for low, middle, high in quarters]
    ratios = [f"{float(ratio):.2f}" for ratio in (times[:, :-1] / times[:, -1:]).median(0).values]
    print(f"| {label} | {' | '.join(cells + ratios)} |", flush=True)


@torch.no_grad()
def main(target: str = "smollm2-135m-instruct", contexts: list[int] = [64, 256], repeats: int = 15) -> None:  # noqa: B006
    """Print Markdown tables of milliseconds: median and, in brackets, the middle half.

    Args:
        target: The target model, in bf16.
        contexts: Tokens before those of the forward.
        repeats: Forwards of each kind.
    """
    plain, packed, compiled = (load_target(target) for _ in range(3))
    plain._packing = Packing()  # nothing packed
    compiled.compile()
    for context in contexts:
        columns = "stock | packed | packed, blocks | compiled | over stock | over packed | over blocks"
        print(f"\n| tokens behind {context} | {columns} |")
        print("|--:" * 8 + "|")
        before, ours, graph = (_behind(one, context) for one in (plain, packed, compiled))
        for tokens in (1, 4, 8, 16, 24, 32, _MOST):
            _row(str(tokens), [(before, True), (ours, True), (ours, False), (graph, True)], tokens, repeats)
    print("\n| whole texts for training | stock | blocks | over stock |\n|--:|--:|--:|--:|")
    for batch, length in ((2, 512), (1, 1024), (1, 2048)):

        def capture(_: int, size: tuple[int, int] = (batch, length)) -> object:
            return plain.capture(torch.randint(0, plain.vocab_size, size))

        _row(f"{batch} x {length}", [(capture, True), (capture, False)], length, max(3, repeats // 3))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
