"""Which keys a layer of each kind lets a query see: all that the text allows, those in a window, those of the same chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that there is a mask for."""


def reaches(config: PreTrainedConfig) -> dict[str, int | None]:
    """Tokens in a window or a chunk of each kind of layer that the model has; None where it sees everything."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    sizes = {"sliding_attention": window or None, "chunked_attention": chunk or None}
    kinds = getattr(config, "layer_types", None)
    return {kind: sizes.get(kind) for kind in kinds or ["sliding_attention"]}


def layer_masks(
    config: PreTrainedConfig, dtype: torch.dtype, visible: Tensor, position_ids: Tensor | None, cache: Cache | None
) -> Tensor | dict[str, Tensor]:
    """Additive 4D mask, [B, 1, Q, K]; one per kind of layer where the model has several.

    Args:
        config: The text model's.
        dtype: Of the mask, the model's.
        visible: Bool [B, Q, K], which keys a query may see where nothing limits its reach.
        position_ids: [B, Q]; needed where a kind of layer has a window or chunks.
        cache: The `TreeCache` behind whose tokens the queries stand; None where they are all there is.
    """
    masks = dict.fromkeys(limits := reaches(config), _additive(visible, dtype))
    if any(limits.values()):
        assert position_ids is not None
        keys = position_ids if cache is None else cache.place(position_ids)  # type: ignore[attr-defined]  # a TreeCache
        query, key = position_ids[:, :, None], keys[:, None, :]
        for kind, size in limits.items():
            if size is not None:
                # In chunks of 8, token 9 sees token 8 and not token 7.
                near = query // size == key // size if kind == "chunked_attention" else query - key < size
                masks[kind] = _additive(visible & near, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
