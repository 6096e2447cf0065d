"""Attention by plain matrix products, one block of queries at a time: how a target on a CPU reads texts here.

torch's own kernel for the CPU takes two to three times as long in bf16, which makes a forward over a whole text a third slower,
unless the CPU has AMX, where it is twice as fast as this; for a few tokens behind a context it is the faster one anywhere
(benchmarks/forward.py). Nothing [L, L] is ever held.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.distill.attention import grouped_product, has_amx, score_blocks, spans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ONE = RLock()  # transformers has one place for an attention, whatever the threads
FEW = 64
"""Queries below which torch's kernel is the faster one."""


def _kernel_wins(query: Tensor) -> bool:
    """Whether torch's kernel is the faster one for these queries."""
    return not query.is_cpu or query.shape[2] < FEW or has_amx(query)


class _Texts(NamedTuple):
    """Several texts in one row.

    Attributes:
        spans: Their places.
        causal: Addresses of masks that hide nothing of a text but its future.
    """

    spans: list[slice]
    causal: set[int]

    @classmethod
    def of(cls, starts: Tensor, masks: Sequence[Tensor]) -> _Texts:
        places = spans(starts)
        first, last = [at.start for at in places], [at.stop - 1 for at in places]
        # A sliding window hides the first token from the last, if it hides anything.
        causal = {mask.data_ptr() for mask in masks if bool((mask[0, 0, last, first] == 0).all())}
        return cls(places, causal)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    """Attention with the softmax in fp32.

    Args:
        query: [B, heads, Q, d].
        key: [B, groups, K, d]; each serves heads / groups heads in a row.
        value: [B, groups, K, dv].
        mask: What to add to the scores, or bool, which keys count; broadcasts to [B, heads, Q, K].
        scale: Of the scores.
        causal: Query i sees the keys 0 .. i only.

    Returns:
        [B, heads, Q, dv].
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    for at, seen, scores, _ in score_blocks(query, key, scale, causal=causal):
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., at, :]
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, torch.finfo(scores.dtype).min)
            else:
                scores += part
        out[:, :, at] = grouped_product(torch.softmax(scores, -1).to(value.dtype), value[:, :, seen])
    return out


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    texts: _Texts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which takes what is not for us; of several texts in a row, one by one."""
    special = kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    if texts is not None and attention_mask is not None and not special:
        apart = attention_mask.data_ptr() in texts.causal  # no model has added anything of its own
        parts = []
        for at in texts.spans:
            q, k, v = query[:, :, at], key[:, :, at], value[:, :, at]
            mask = None if apart else attention_mask[..., at, at]
            part, _ = _attention(module, q, k, v, mask, dropout, scaling, apart or is_causal, **kwargs)
            parts.append(part)
        return torch.cat(parts, 1), None
    if _kernel_wins(query) or dropout or special or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale, causal=causal).transpose(1, 2).contiguous(), None


@contextmanager
def used(starts: Tensor | None = None, masks: Sequence[Tensor] = ()) -> Iterator[None]:
    """Let a model of transformers whose attention is `sdpa` run through this, within a block; one thread at a time.

    Args:
        starts: Where each token's text begins, [1, L], where a row holds several: none is then looked at from another.
        masks: What keeps them apart, as the model is given it: added to the scores, [1, 1, L, L].
    """
    ours = _attention if starts is None else partial(_attention, texts=_Texts.of(starts, masks))
    with _ONE:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ours
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
