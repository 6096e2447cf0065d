"""Batched sampling of a target's own text: rows of one batch may differ in temperature, finished rows leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

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
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
) -> list[list[int]]:
    """Continue each prompt until a stop token (kept) or `max_new_tokens`.

    `generate` keeps finished rows in the batch and has one temperature for all; on two cores that costs a third of the
    speed. The result depends on the seed and the batch, not on the clock.

    Args:
        model: The target.
        prompts: Token ids, one list a row.
        temperatures: One per row; 0 is greedy.
        max_new_tokens: Longest continuation.
        stop_ids: Tokens that end a row.
        seed: Seed of the draws.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    heat = torch.tensor(temperatures, device=model.device)
    stops = torch.tensor(list(stop_ids), device=model.device)
    generator = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    running = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    cache = DynamicCache(config=model.config)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
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
            cache.batch_select_indices(keep)
            rows = [rows[i] for i in keep.tolist()]
            token, mask, heat, position, running = token[keep], mask[keep], heat[keep], position[keep], running[keep]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position[:, -1:] + 1
    return out
