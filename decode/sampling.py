"""Batched sampling of a target's own text: rows of one batch may differ in temperature, finished rows leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slipstream.decode.cache import TreeCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.distill.target import Target

_COMPACT_AT = 0.9  # the batch is packed anew once fewer rows than this share are still running


def _draw(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, [R]; by inverse CDF, which costs a tenth of `torch.multinomial` at large vocabularies."""
    scaled = logits.float() / temperatures.clamp(min=1e-4)[:, None]
    cdf = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    u = torch.rand(len(cdf), 1, generator=generator).to(cdf) * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.shape[1] - 1)
    return torch.where(temperatures > 0, drawn, logits.argmax(dim=-1))


@torch.inference_mode()
def sample(
    target: Target,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
) -> list[list[int]]:
    """Continue each prompt until a stop token (kept) or `max_new_tokens`.

    `generate` keeps finished rows in the batch, has one temperature for all, and copies all keys and values for every token.
    The result depends on the seed and the batch, not on the clock.

    Args:
        target: The target.
        prompts: Token ids, one list a row.
        temperatures: One per row; 0 is greedy.
        max_new_tokens: Longest continuation.
        stop_ids: Tokens that end a row.
        seed: Seed of the draws.
    """
    device, lengths = target.device, [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for line, prompt in zip(ids, prompts, strict=True):  # padded on the right, where causality alone hides it
        line[: len(prompt)] = torch.tensor(prompt)
    heat = torch.tensor(temperatures, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    generator = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    running = torch.ones(len(rows), dtype=torch.bool, device=device)
    cache = TreeCache(target.config.num_hidden_layers, len(rows), device)
    if ids.shape[1] > 1:  # all but each row's last token, which is fed as those after it are
        first = torch.zeros(1, dtype=torch.long, device=device)  # logits that nobody reads, of one position
        target.forward(ids[:, :-1].to(device), cache=cache, logits_to_keep=first, features=False)
        cache.commit_first([n - 1 for n in lengths])
    token = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    for _ in range(max_new_tokens):
        own = torch.ones(len(rows), 1, 1, dtype=torch.bool, device=device)
        logits = target.forward(
            token[:, None],
            position_ids=cache.rows.tensor[:, None],
            visible=None if cache.rows.even else cache.visible(own),
            cache=cache,
            features=False,
        ).logits[:, -1]
        cache.commit_first([1] * len(rows))
        token = _draw(logits, heat, generator)
        for row, t, alive in zip(rows, token.tolist(), running.tolist(), strict=True):
            if alive:
                out[row].append(t)
        running &= ~torch.isin(token, stops)
        alive_count = int(running.sum())
        if alive_count == 0:
            break
        if alive_count < _COMPACT_AT * len(rows):
            keep = running.nonzero().squeeze(1)
            cache.keep(keep.tolist())
            rows = [rows[i] for i in keep.tolist()]
            token, heat, running = token[keep], heat[keep], running[keep]
    return out
