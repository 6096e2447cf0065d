"""Attention of the unrolled head: causal over the first step's keys, diagonal over the later steps' own rows."""

from __future__ import annotations

import torch
from torch import Tensor


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class UnrollAttention:
    """Keys and values of every step so far; step k may see what it would see when decoding a chain.

    A query of step k at row p sees step 0's keys of rows 0..p and its own row's keys of steps 1..k. Worked example, k=2,
    p=3: keys (0,0) (0,1) (0,2) (0,3) of step 0, then (1,3) and (2,3).

    The [L, k] diagonal scores are appended to the [L, L] causal ones; no [L, L + k] mask is built. Padding must stand on
    the right, where causality alone hides it from the real rows.
    """

    def __init__(self) -> None:
        self._steps: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # keys and values of a layer

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from step `len(calls of this layer so far)`; all tensors [B, heads, L, d]."""
        heads, length = query.shape[1], query.shape[2]
        key, value = _expand(key, heads), _expand(value, heads)
        keys, values = self._steps.setdefault(layer, ([], []))
        keys.append(key)
        values.append(value)
        if len(keys) == 1:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        scale = query.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        causal = (query @ keys[0].transpose(-1, -2)).float().masked_fill(future, float("-inf"))
        diagonal = torch.stack([(query * k).sum(-1) for k in keys[1:]], dim=-1).float()  # [B, heads, L, k]
        weights = torch.softmax(torch.cat([causal, diagonal], dim=-1) * scale, dim=-1).to(query.dtype)
        out = weights[..., :length] @ values[0]
        own = weights[..., length:].unsqueeze(-1) * torch.stack(values[1:], dim=-2)  # [B, heads, L, k, d]
        return out + own.sum(-2)
