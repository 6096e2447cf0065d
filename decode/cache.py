"""A key-value cache in which a tree can be tried: written behind the committed tokens, then kept in part or dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK = 256  # buffers grow by this many tokens


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer in preallocated buffers [B, heads, capacity, d].

    `update` appends behind what was written; `commit` makes a path of it permanent; `rollback` forgets it.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0  # committed tokens
        self.written = 0  # committed and tentative tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def _grow(self, needed: int) -> None:
        assert self.keys is not None and self.values is not None
        extra = -(-needed // _BLOCK) * _BLOCK - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, Q, d] and return everything written so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.written + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._grow(end)
        self.keys[:, :, self.written : end] = key_states
        self.values[:, :, self.written : end] = value_states
        self.written = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def commit(self, path: Sequence[int]) -> None:
        """Keep the tentative tokens at `path` (indices behind the committed ones, ascending), drop the others."""
        assert self.keys is not None and self.values is not None
        start, end = self.length, self.length + len(path)
        if list(path) != list(range(len(path))):
            source = torch.tensor(path, device=self.keys.device) + start
            self.keys[:, :, start:end] = self.keys[:, :, source]
            self.values[:, :, start:end] = self.values[:, :, source]
        self.length = self.written = end

    def rollback(self) -> None:
        """Drop the tentative tokens."""
        self.written = self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.written + query_length, 0

    def get_seq_length(self) -> int:
        return self.written

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class TreeCache(Cache):
    """One `TreeLayer` per layer of the target."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[TreeLayer() for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.layers[0].length

    def commit(self, path: Sequence[int]) -> None:
        """Keep the tentative tokens at `path` in every layer."""
        for layer in self.layers:
            layer.commit(path)
