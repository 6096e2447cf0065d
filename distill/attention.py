"""Attention of the unrolled head: causal over the first step's keys, diagonal over the later steps' own rows.

The causal part gives its log-sum-exp, by which the diagonal terms are merged (as FlashAttention and ring attention merge
blocks of keys). On the way back it is given the merged output and log-sum-exp: its weights are then those under the common
softmax, and its gradients the whole's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Iterator


def block_size(device: str) -> int:
    """Queries of a block: on a CPU its scores stay in a core's cache, elsewhere there are fewer launches."""
    return 64 if device == "cpu" else 512


def has_amx(x: Tensor) -> bool:
    """Whether torch's own kernel multiplies this type in AMX tiles: there it is faster than blocks of matrix products."""
    return x.is_cpu and x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def avoid_cudnn(device: torch.device) -> None:
    """Keep torch, in this process, from attending by cuDNN where a model lies on a card.

    On Hopper it would be the first choice, and it builds a plan for every new number of queries and keys: one a round.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def attend_masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """torch's own attention [B, heads, Q, d], where `visible` [B, Q, K] says which keys count.

    Of the kernels for a card, the one that takes masks knows no groups of heads: keys and values are laid out for all.
    """
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1), enable_gqa=grouped)


def spans(starts: Tensor) -> list[slice]:
    """The places of the texts of a row, of where each token's begins, [1, L]."""
    first = starts[0].unique_consecutive().tolist()
    return [slice(begin, end) for begin, end in pairwise([*first, starts.shape[1]])]


class UnrollAttention:
    """Keys and values of every step so far; step k may see what it would see when decoding a chain.

    A query of step k at row p sees step 0's keys of rows 0..p and its own row's keys of steps 1..k. Worked example, k=2,
    p=3: keys (0,0) (0,1) (0,2) (0,3) of step 0, then (1,3) and (2,3).

    Nothing [L, L] is ever held: scores exist for one block of queries at a time, and are made again on the way back.
    Padding must stand on the right, where causality alone hides it from the real rows.

    Args:
        starts: Where each row's conversation begins, [1, L], where several stand one behind the other: step 0's keys before
            it are not seen. None where all are one.
        rows: Those of [B, L], counted through, that steps 1.. are taken at, [R], ascending; None where at all of them.
    """

    def __init__(self, starts: Tensor | None = None, rows: Tensor | None = None) -> None:
        self._texts = [slice(None)] if starts is None else spans(starts)
        self._rows = rows
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = {}  # keys and values of a layer

    @torch.compiler.disable  # keeps a state, and its texts are of many lengths
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from step `len(calls of this layer so far)`.

        Args:
            query: [B, heads, L, d]; behind step 0, where `rows` were named, [1, heads, R, d].
            key: [B, groups, L, d], or [1, groups, R, d]; each serves heads / groups heads in a row.
            value: Likewise.
            layer: Whose keys these are.
        """
        query, key = query.to(value.dtype), key.to(value.dtype)
        steps = self._steps.setdefault(layer, [])
        steps.append((key, value))
        kernel = _TorchKernel if has_amx(query) else _BlockKernel
        keys, values = zip(*steps, strict=True)
        out: Tensor = _Merged.apply(kernel, self._texts, self._rows if len(steps) > 1 else None, query, *keys, *values)
        return out


class _Kernel(Protocol):
    """Causal attention of one text.

    `forward` gives the output [B, heads, L, d] and the log-sum-exp of the scores, fp32 [B, heads, L]; `backward` the gradients
    of query, key and value, from an output and a log-sum-exp that may have taken in other keys as well.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _TorchKernel:
    """torch's own for the CPU, which is what `scaled_dot_product_attention` runs there."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        return out, total

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = query.shape[1] // key.shape[1]
        # Every head is given its own keys: it shares its work out by these, and adds up in their type.
        own = (x.repeat_interleave(heads, 1) for x in (key, value))
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        down, *grads = back(grad, query, *own, out, total, 0.0, True)
        grad_key, grad_value = (_grouped(x, key).sum(2) for x in grads)
        return down, grad_key, grad_value


class _BlockKernel:
    """Plain matrix products, one block of queries at a time, for any device."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, total = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        for at, seen, scores, _ in score_blocks(query, key, query.shape[-1] ** -0.5):
            total[:, :, at] = scores.logsumexp(-1)
            weights = scores.sub_(total[:, :, at, None]).exp_().to(value.dtype)
            out[:, :, at] = grouped_product(weights, value[:, :, seen])
        return out, total

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = query.shape[-1] ** -0.5
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        delta = (grad * out).sum(-1, keepdim=True, dtype=torch.float32)
        for at, seen, scores, block in score_blocks(query, key, scale):
            slope = grad[:, :, at]
            weights = scores.sub_(total[:, :, at, None]).exp_()
            down = grouped_product(slope, value[:, :, seen].transpose(-1, -2)).float()
            down = down.sub_(delta[:, :, at]).mul_(weights).to(value.dtype)
            grad_value[:, :, seen] += _of_group(weights.to(value.dtype), key).transpose(-1, -2) @ _of_group(slope, key)
            grad_key[:, :, seen] += _of_group(down, key).transpose(-1, -2) @ _of_group(block, key)
            grad_query[:, :, at] = grouped_product(down, key[:, :, seen])
        grad_query *= scale
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Merged(torch.autograd.Function):
    """Softmax attention over a text's causal keys and any number of each row's own."""

    @staticmethod
    def forward(
        ctx: Any, kernel: type[_Kernel], texts: list[slice], rows: Tensor | None, query: Tensor, *cached: Tensor
    ) -> Tensor:
        key, *keys = cached[: len(cached) // 2]
        value, *values = cached[len(cached) // 2 :]
        whole = _spread(query, rows, key)
        out, total = torch.empty_like(whole), whole.new_empty(whole.shape[:-1], dtype=torch.float32)
        for at in texts:
            out[:, :, at], total[:, :, at] = kernel.forward(whole[:, :, at], key[:, :, at], value[:, :, at])
        out, total = _gathered(out, rows), _gathered(total, rows)
        if keys:
            own = torch.stack([_own_scores(query, key) for key in keys])  # [k, B, heads, L]
            causal, total = total, torch.logaddexp(total, own.logsumexp(0))
            out *= (causal - total).exp().to(out.dtype)[..., None]
            for score, value in zip(own, values, strict=True):
                weight = (score - total).exp().to(out.dtype)
                _grouped(out, value).add_(_grouped(weight[..., None], value) * value[:, :, None])
        ctx.save_for_backward(query, out, total, *cached)
        ctx.kernel, ctx.texts, ctx.rows = kernel, texts, rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, out, total, *cached = ctx.saved_tensors
        key, *keys = cached[: len(cached) // 2]
        value, *values = cached[len(cached) // 2 :]
        whole = [_spread(x, ctx.rows, key) for x in (grad, query, out, total)]  # rows that are none give no gradient
        down, grad_key, grad_value = (torch.empty_like(x) for x in (whole[1], key, value))
        for at in ctx.texts:
            slope, asked, *rest = (x[:, :, at] for x in whole)
            parts = ctx.kernel.backward(slope, asked, key[:, :, at], value[:, :, at], *rest)
            down[:, :, at], grad_key[:, :, at], grad_value[:, :, at] = parts
        down = _gathered(down, ctx.rows)
        grad_keys, grad_values = [grad_key], [grad_value]
        if keys:
            scale = query.shape[-1] ** -0.5
            delta = (grad * out).sum(-1, dtype=torch.float32)
            slope, query = _grouped(grad, keys[0]), _grouped(query, keys[0])
            for key, value in zip(keys, values, strict=True):
                weight = (_own_scores(query.flatten(1, 2), key) - total).exp()
                back = (slope * value[:, :, None]).sum(-1, dtype=torch.float32).flatten(1, 2)
                back = ((back - delta) * weight * scale).to(query.dtype)[..., None]
                back, weight = _grouped(back, key), _grouped(weight.to(query.dtype)[..., None], key)
                _grouped(down, key).add_(back * key[:, :, None])
                grad_keys.append((back * query).sum(2))
                grad_values.append((weight * slope).sum(2))
        return None, None, None, down, *grad_keys, *grad_values


def _spread(x: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """What is known of some rows of [B, L], [1, heads, R, ..], as [B, heads, L, ..] of a tensor like that; 0 elsewhere."""
    if rows is None:
        return x
    batch, _, length, _ = like.shape
    whole = x.new_zeros(batch * length, x.shape[1], *x.shape[3:])
    whole[rows] = x[0].transpose(0, 1)
    return whole.unflatten(0, (batch, length)).transpose(1, 2)


def _gathered(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of [B, heads, L, ..], as [1, heads, R, ..]; its inverse."""
    return x if rows is None else x.transpose(1, 2).flatten(0, 1)[rows][None].transpose(1, 2)


def _grouped(x: Tensor, shared: Tensor) -> Tensor:
    """[B, heads, L, n] with the dimension of their group, [B, groups, heads of a group, L, n]."""
    return x.unflatten(1, (shared.shape[1], -1))


def _own_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled products of each row's queries with its own key, fp32 [B, heads, L]."""
    products = (_grouped(query, key) * key[:, :, None]).sum(-1, dtype=torch.float32)
    return products.flatten(1, 2) * query.shape[-1] ** -0.5


def score_blocks(
    query: Tensor, key: Tensor, scale: float, *, causal: bool = True
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Attention scores [B, heads, block, seen], fp32, for one block of queries at a time.

    Args:
        query: [B, heads, Q, d].
        key: [B, groups, K, d]; each serves heads / groups heads in a row.
        scale: Of the scores.
        causal: Query i sees the keys 0 .. i only.

    Yields:
        The block's queries, the keys they see, their scores, and the block itself, scaled.
    """
    query = query * scale
    size = block_size(query.device.type)
    most = min(size, query.shape[2])
    future = torch.ones(most, most, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, query.shape[2], size):
        at = slice(start, min(start + size, query.shape[2]))
        seen = slice(0, at.stop if causal else key.shape[2])
        block, rows = query[:, :, at], at.stop - start
        scores = grouped_product(block, key[:, :, seen].transpose(-1, -2)).float()
        if causal:
            scores[..., start:].masked_fill_(future[:rows, :rows], float("-inf"))
        yield at, seen, scores, block


def _of_group(x: Tensor, shared: Tensor) -> Tensor:
    """[B, heads, rows, n] as the rows of all heads of a group, [B, groups, heads of a group x rows, n]."""
    return _grouped(x, shared).flatten(2, 3)


def grouped_product(x: Tensor, shared: Tensor) -> Tensor:
    """[B, heads, rows, n] times [B, groups, n, m], as one matrix product for all heads of a group."""
    return (_of_group(x, shared) @ shared).view(*x.shape[:-1], shared.shape[-1])
