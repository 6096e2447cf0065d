"""Attention of the unrolled head: causal over the first step's keys, diagonal over the later steps' own rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


_Starts = tuple["Tensor", "list[int]"]
"""Where each row's conversation begins, [1, L], on the device and on the host."""


def block_size(device: str) -> int:
    """Queries of a block: on a CPU its scores stay in a core's cache, elsewhere there are fewer launches."""
    return 64 if device == "cpu" else 512


class UnrollAttention:
    """Keys and values of every step so far; step k may see what it would see when decoding a chain.

    A query of step k at row p sees step 0's keys of rows 0..p and its own row's keys of steps 1..k. Worked example, k=2,
    p=3: keys (0,0) (0,1) (0,2) (0,3) of step 0, then (1,3) and (2,3).

    Nothing [L, L] is ever held: scores exist for one block of queries at a time, and are made again on the way back.
    Padding must stand on the right, where causality alone hides it from the real rows.

    Args:
        starts: Where each row's conversation begins, [1, L], where several stand one behind the other: step 0's keys before
            it are not seen. None where all are one.
    """

    def __init__(self, starts: Tensor | None = None) -> None:
        self._starts = None if starts is None else (starts, starts[0].tolist())
        self._steps: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # keys and values of a layer

    @torch.compiler.disable  # keeps a state, and its blocks are of many lengths
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from step `len(calls of this layer so far)`.

        Args:
            query: [B, heads, L, d].
            key: [B, groups, L, d]; each serves heads / groups heads in a row.
            value: Likewise.
            layer: Whose keys these are.
        """
        query, key = query.to(value.dtype), key.to(value.dtype)
        keys, values = self._steps.setdefault(layer, ([], []))
        keys.append(key)
        values.append(value)
        out: Tensor = _Blocked.apply(query, keys[0], values[0], _stacked(keys), _stacked(values), self._starts)
        return out


def _stacked(steps: list[Tensor]) -> Tensor:
    """Those of steps 1..k, [k, ..]."""
    return torch.stack(steps[1:]) if len(steps) > 1 else steps[0].new_empty(0, *steps[0].shape)


class _Blocked(torch.autograd.Function):
    """Softmax attention over causal keys [B, groups, L, d] and k of each row's own [k, B, groups, L, d].

    Inside, queries have their group's dimension: [B, groups, heads of a group, L, d].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, starts: _Starts | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, keys, values)
        ctx.starts = starts
        out = torch.empty_like(query)
        grouped = out.unflatten(1, (key.shape[1], -1))
        for at, seen, weights, _ in _weights(query, key, keys, starts):
            causal, own = weights.to(value.dtype).split([seen.stop - seen.start, len(keys)], -1)
            grouped[:, :, :, at] = _product(causal, value[:, :, seen])
            grouped[:, :, :, at] += (own.movedim(-1, 0)[..., None] * values[:, :, :, None, at]).sum(0)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, keys, values = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = grad.unflatten(1, (key.shape[1], -1))
        grad_query, grad_keys, grad_values = torch.empty_like(grad), torch.empty_like(keys), torch.empty_like(values)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for at, seen, weights, block in _weights(query, key, keys, ctx.starts):
            slope = grad[:, :, :, at]
            down = _scores(slope, value, values, at, seen)
            down -= (weights * down).sum(-1, keepdim=True)
            down *= weights
            (causal, own), (down, own_down) = (
                x.to(value.dtype).split([seen.stop - seen.start, len(keys)], -1) for x in (weights, down)
            )
            grad_value[:, :, seen] += causal.flatten(2, 3).transpose(-1, -2) @ slope.flatten(2, 3)
            grad_key[:, :, seen] += down.flatten(2, 3).transpose(-1, -2) @ block.flatten(2, 3)
            grad_values[:, :, :, at] = (own.movedim(-1, 0)[..., None] * slope).sum(3)
            own_down = own_down.movedim(-1, 0)[..., None]
            grad_keys[:, :, :, at] = (own_down * block).sum(3)
            grad_query[:, :, :, at] = _product(down, key[:, :, seen])
            grad_query[:, :, :, at] += (own_down * keys[:, :, :, None, at]).sum(0)
        grad_query *= scale
        grads = (grad_query.flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_keys, grad_values)
        return *grads, None


def _weights(
    query: Tensor, key: Tensor, keys: Tensor, starts: _Starts | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Block by block: its rows, the causal keys they see, what they give to these and to their own, its scaled queries.

    Weights are fp32 [B, groups, heads of a group, block, seen + k].
    """
    query = (query * query.shape[-1] ** -0.5).unflatten(1, (key.shape[1], -1))
    length = query.shape[3]
    size = block_size(query.device.type)
    future = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, length, size):
        at = slice(start, min(start + size, length))
        block = query[:, :, :, at]
        rows = block.shape[3]
        seen = slice(0 if starts is None else starts[1][start], at.stop)
        scores = _scores(block, key, keys, at, seen)
        scores[..., start - seen.start : seen.stop - seen.start].masked_fill_(future[:rows, :rows], float("-inf"))
        if starts is not None:
            before = torch.arange(seen.start, seen.stop, device=query.device) < starts[0][0, at, None]
            scores[..., : before.shape[1]].masked_fill_(before, float("-inf"))
        yield at, seen, torch.softmax(scores, -1), block


def _scores(block: Tensor, causal: Tensor, own: Tensor, at: slice, seen: slice) -> Tensor:
    """Products of a block's rows with the causal vectors they see and with their own k, fp32 [.., block, seen + k]."""
    count = seen.stop - seen.start
    scores = block.new_empty(*block.shape[:-1], count + len(own), dtype=torch.float32)
    scores[..., :count] = _product(block, causal[:, :, seen].transpose(-1, -2))
    scores[..., count:] = (block * own[:, :, :, None, at]).sum(-1).movedim(0, -1)
    return scores


def _product(grouped: Tensor, shared: Tensor) -> Tensor:
    """[B, groups, heads, rows, n] times [B, groups, n, m], as one matrix product for all heads of a group."""
    return (grouped.flatten(2, 3) @ shared).unflatten(2, grouped.shape[2:4])
