"""Attention of the unrolled head: causal over the first step's keys, diagonal over the later steps' own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class UnrollAttention:
    """Keys and values of every step so far; step k may see what it would see when decoding a chain.

    A query of step k at row p sees step 0's keys of rows 0..p and its own row's keys of steps 1..k. Worked example, k=2,
    p=3: keys (0,0) (0,1) (0,2) (0,3) of step 0, then (1,3) and (2,3).

    On a CPU the causal part is a flash attention, and the diagonal is merged into it by its log-sum-exp: nothing [L, L] is
    ever held. Padding must stand on the right, where causality alone hides it from the real rows.

    Args:
        dense: Hold the [L, L + k] scores of the later steps, which runs on any device.
    """

    def __init__(self, *, dense: bool = False) -> None:
        self._dense = dense
        self._steps: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # keys and values of a layer

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from step `len(calls of this layer so far)`; all tensors [B, heads, L, d]."""
        heads = query.shape[1]
        value = _expand(value, heads)
        query, key = query.to(value.dtype), _expand(key, heads).to(value.dtype)
        keys, values = self._steps.setdefault(layer, ([], []))
        keys.append(key)
        values.append(value)
        if len(keys) == 1:
            return scaled_dot_product_attention(query, key, value, is_causal=True)
        own = torch.stack(keys[1:]), torch.stack(values[1:])
        merge = attend_densely if self._dense else _Merged.apply
        return merge(query, keys[0], values[0], *own)


def attend_densely(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention with a diagonal, by its definition: [L, L + k] scores under one softmax.

    Args:
        query: Of one step, [B, heads, L, d].
        key: Of step 0, likewise.
        value: Likewise.
        keys: Of steps 1..k, [k, B, heads, L, d].
        values: Likewise.
    """
    length, scale = query.shape[2], query.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    causal = (query @ key.transpose(-1, -2)).float().masked_fill(future, float("-inf"))
    diagonal = (query * keys).sum(-1).movedim(0, -1).float()  # [B, heads, L, k]
    weights = torch.softmax(torch.cat([causal, diagonal], dim=-1) * scale, dim=-1).to(query.dtype)
    own = weights[..., length:].movedim(-1, 0).unsqueeze(-1) * values
    return weights[..., :length] @ value + own.sum(0)


class _Merged(torch.autograd.Function):
    """`attend_densely` in memory linear in L.

    The flash kernel gives the causal part's output and log-sum-exp; with those of the whole softmax in their place its
    backward gives the causal part's share of the gradients, as in ring attention (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        causal, causal_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=0.0, is_causal=True
        )
        scores = (query.float() * keys.float()).sum(-1) * scale  # [k, B, heads, L]
        lse = torch.logsumexp(torch.cat([causal_lse[None], scores]), dim=0)
        out = (causal_lse - lse).exp()[..., None] * causal.float()
        out += ((scores - lse).exp()[..., None] * values.float()).sum(0)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, keys, values, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, keys, values, out, lse = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, dropout_p=0.0, is_causal=True
        )
        weights = ((query.float() * keys.float()).sum(-1) * scale - lse).exp()  # [k, B, heads, L]
        delta = (grad.float() * out.float()).sum(-1)
        slopes = (weights * ((grad.float() * values.float()).sum(-1) - delta) * scale)[..., None]
        grad_query = grad_query + (slopes * keys.float()).sum(0).to(query.dtype)
        grad_keys = (slopes * query.float()).to(keys.dtype)
        return grad_query, grad_key, grad_value, grad_keys, (weights[..., None] * grad.float()).to(values.dtype)
