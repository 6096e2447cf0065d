"""A key-value cache in which a tree can be tried: written behind the committed tokens, then kept in part or dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from slipstream.decode.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from slipstream.distill.compilation import Compilation
    from slipstream.distill.target import Target

_BLOCK = 256  # buffers grow by this many tokens


def fixed_capacity(tokens: int) -> int:
    """Slots of a cache of fixed size: few sizes occur, since every one may have compiled graphs of its own."""
    size = 256
    while size < tokens:
        size *= 2
    return size


class Rows:
    """How many tokens each row of a batch has committed: on the host, and as a tensor on the device.

    Attributes:
        lengths: One per row.
        tensor: The same, [B]; it stays where it is until rows leave.
        even: Whether all are equal.
        compiled: How the forwards are that read this, if they are compiled: none may read a length.
        behind: Tokens written behind each row's committed ones where they are, [].
        slots: Empty but for its size, the slots that layers hand out to such forwards: of a tensor that may be a symbol.
            Where shapes are static they hand out all they have.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.compiled: Compilation | None = None
        self.slots = torch.empty(0, device=device)
        self.tensor = torch.zeros(batch, dtype=torch.long, device=device)
        self.behind = torch.zeros((), dtype=torch.long, device=device)
        self.set([0] * batch)

    def set(self, lengths: list[int]) -> None:
        """Replace the lengths."""
        self.lengths = lengths
        self.even = len(set(lengths)) == 1
        new = to_device(lengths, self.tensor.device)
        self.tensor = self.tensor.copy_(new) if len(new) == len(self.tensor) else new


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer in preallocated buffers [B, heads, capacity, d], filled from slot 0.

    `update` writes behind what each row has; what it wrote is tentative until the cache commits a part of it.
    """

    is_sliding = False

    def __init__(self, rows: Rows, capacity: int = 0) -> None:
        super().__init__()
        self.rows = rows
        self.tentative = 0  # tokens written behind each row's committed ones
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def _grow(self, needed: int) -> None:
        assert self.keys is not None and self.values is not None
        extra = -(-needed // _BLOCK) * _BLOCK - self.capacity
        self.capacity += extra
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, Q, d] to every row and return everything up to the longest row's end, as views."""
        if self.rows.compiled is not None:  # nothing below that reads a length: a compiled graph would be bound to it
            assert self.keys is not None and self.values is not None
            # One row, and no scatter: inductor would copy the whole buffers for it.
            at = self.rows.tensor + self.rows.behind + torch.arange(key_states.shape[2], device=key_states.device)
            self.keys.index_copy_(2, at, key_states)
            self.values.index_copy_(2, at, value_states)
            if self.rows.compiled.static:
                return self.keys, self.values
            end = self.rows.slots.shape[0]
            return self.keys[:, :, :end], self.values[:, :, :end]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        end = self.get_seq_length() + count
        if end > self.capacity:
            self._grow(end)
        assert self.keys is not None and self.values is not None
        if self.rows.even:
            self.keys[:, :, end - count : end] = key_states
            self.values[:, :, end - count : end] = value_states
        else:
            self._scatter(key_states, value_states)
        self.tentative += count
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _scatter(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        new = torch.arange(key_states.shape[2], device=key_states.device) + self.tentative
        slots = (self.rows.tensor[:, None] + new)[:, None, :, None]
        self.keys.scatter_(2, slots.expand_as(key_states), key_states)
        self.values.scatter_(2, slots.expand_as(value_states), value_states)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [B, W] to slots `target` [B, W] of each row."""
        assert self.keys is not None and self.values is not None
        for buffer in (self.keys, self.values):
            at = (len(buffer), buffer.shape[1], source.shape[1], buffer.shape[3])
            kept = buffer.gather(2, source[:, None, :, None].expand(at))
            buffer.scatter_(2, target[:, None, :, None].expand(at), kept)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # The first transformers 5 hand over the queries' positions.
        count = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + count, 0

    def get_seq_length(self) -> int:
        return max(self.rows.lengths) + self.tentative

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class TreeCache(Cache):
    """One `TreeLayer` per layer of a model, with the same committed lengths, which may differ between rows.

    Args:
        num_layers: Of the model.
        batch: Rows.
        device: Where the model is.
        capacity: Slots to begin with; more are added as needed.
    """

    def __init__(self, num_layers: int, batch: int = 1, device: torch.device | str = "cpu", capacity: int = 0) -> None:
        self.rows = Rows(batch, torch.device(device))
        self._tentative: list[Tensor] = []  # positions, where a model asks for them
        super().__init__(layers=[TreeLayer(self.rows, capacity) for _ in range(num_layers)])

    @property
    def compiled(self) -> Compilation | None:
        """How the forwards are compiled that take this; they write where the lengths say. `advance` parts two of a round."""
        return self.rows.compiled

    @compiled.setter
    def compiled(self, value: Compilation | None) -> None:
        self.rows.compiled = value
        if value is None:
            return
        if self.rows.tensor.is_cuda:
            self.mark_static()
        for buffer in self._buffers:
            value.vary(buffer, 2)

    @property
    def _buffers(self) -> list[Tensor]:
        """Keys and values of all layers."""
        return [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]

    def mark_static(self) -> None:
        """Promise that what a compiled forward reads and writes here stays where it is.

        inductor runs a function that writes to its inputs without CUDA graphs unless their addresses are static, as those of
        keys and values are; the lengths are spared a copy.
        """
        for tensor in (self.rows.tensor, self.rows.behind, *self._buffers):
            torch._dynamo.mark_static_address(tensor)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each row."""
        return self.rows.lengths

    def hand_out(self, slots: int) -> None:
        """Where `compiled`: let the next forward see so many slots, as many as its mask has."""
        assert self.rows.compiled is not None
        if len(self.rows.slots) != slots:
            self.rows.slots = self.rows.slots.new_empty(slots)
            self.rows.compiled.vary(self.rows.slots, 0)

    def _total(self, tentative: int) -> int:
        """Slots that a forward sees, which ends with the last of so many tentative tokens."""
        static = self.rows.compiled is not None and self.rows.compiled.static
        return self.layers[0].capacity if static else max(self.lengths) + tentative

    def visible(self, tentative: Tensor) -> Tensor:
        """Which slots each query may see: all committed ones of its row, and the tentative ones it is given.

        Args:
            tentative: Bool [B, Q, T], over the tokens behind the committed ones, those of this forward included.

        Returns:
            Bool [B, Q, K], K reaching to the end of the longest row, or of the buffers in graphs of static shapes.
        """
        batch, queries, count = tentative.shape
        total = self._total(count)
        behind = torch.arange(total, device=tentative.device) - self.rows.tensor[:, None]  # [B, K]
        at = behind.clamp(0, count - 1)[:, None].expand(batch, queries, total)
        inside = ((behind >= 0) & (behind < count))[:, None]
        return (behind < 0)[:, None] | (tentative.gather(2, at) & inside)

    def place(self, position_ids: Tensor) -> Tensor:
        """Note the positions [B, Q] of the tokens that come next, and return those of all slots, [B, K]."""
        self._tentative.append(position_ids)
        tentative = torch.cat(self._tentative, 1)
        count = tentative.shape[1]
        total = self._total(count)
        slots = torch.arange(total, device=tentative.device).expand(len(tentative), -1)
        behind = slots - self.rows.tensor[:, None]
        drafted = tentative.gather(1, behind.clamp(0, count - 1))
        return torch.where(behind < 0, slots, drafted)  # a committed token's position is its slot

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the tentative tokens at `paths` (of each row, indices behind the committed ones, ascending), drop the rest."""
        gaps = any(list(path) != list(range(len(path))) for path in paths)
        if gaps and len(paths) == 1 and self.rows.tensor.device.type == "cpu":
            self._move(paths[0])
        elif gaps:
            width = max(len(path) for path in paths)
            padded = [[*path, *range(len(path), width)] for path in paths]
            start = self.rows.tensor[:, None]
            source = to_device(padded, start.device) + start
            target = torch.arange(width, device=start.device) + start
            for layer in self.layers:
                layer.move(source, target)
        self.rows.set([n + len(path) for n, path in zip(self.lengths, paths, strict=True)])
        self.rollback()

    def _move(self, path: Sequence[int]) -> None:
        """Close the gaps before the tentative tokens at `path` of the only row, in all layers at once."""
        buffers = self._buffers
        for source, target, count in _moves(path, self.lengths[0]):
            into = [buffer[:, :, target : target + count] for buffer in buffers]
            torch._foreach_copy_(into, [buffer[:, :, source : source + count] for buffer in buffers])

    def commit_first(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` tentative tokens of row b."""
        self.commit([range(n) for n in counts])

    def advance(self, count: int) -> None:
        """Where `compiled`: let the next forward write behind the `count` tentative tokens of the last one."""
        self.rows.behind += count

    def rollback(self) -> None:
        """Drop the tentative tokens."""
        self._tentative = []
        self.rows.behind.zero_()
        for layer in self.layers:
            layer.tentative = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        index = to_device(rows, self.rows.tensor.device)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        self.rows.set([self.lengths[row] for row in rows])

    def clear(self) -> None:
        """Forget everything; the buffers stay where they are."""
        self.compiled = None
        self.rows.set([0] * len(self.lengths))
        self.rollback()
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()  # what is masked must be finite all the same
                layer.values.zero_()


def _moves(path: Sequence[int], start: int) -> Iterator[tuple[int, int, int]]:
    """Source, target and count of the copies that bring `path` (ascending) into its first slots, all behind `start`.

    In this order nothing is overwritten before it is read, and no copy overlaps itself.
    """
    place = 0
    while place < len(path):
        gap, count = path[place] - place, 1
        while count < gap and place + count < len(path) and path[place + count] == path[place] + count:
            count += 1
        if gap:
            yield start + path[place], start + place, count
        place += count


class FixedCaches:
    """Caches of fixed size for one row, kept from request to request: a CUDA graph is recorded for given addresses.

    Args:
        num_layers: Of the model.
        device: Where the model is.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._num_layers, self._device = num_layers, device
        self._caches: dict[int, TreeCache] = {}

    @classmethod
    def of(cls, target: Target) -> FixedCaches:
        """Those of a target where it is now, which all its decoders share."""
        known: FixedCaches | None = target.__dict__.get("_caches")
        if known is None or known._device != target.device:
            known = target.__dict__["_caches"] = cls(target.config.num_hidden_layers, target.device)
        return known

    def take(self, tokens: int) -> TreeCache:
        """The empty one that holds so many tokens; who had it before is done with it."""
        capacity = fixed_capacity(tokens)
        if capacity not in self._caches:
            self._caches[capacity] = TreeCache(self._num_layers, 1, self._device, capacity)
        self._caches[capacity].clear()
        return self._caches[capacity]


def causal(count: int, batch: int, device: torch.device) -> Tensor:
    """Tentative visibility of `count` tokens that follow one another, [B, Q, Q]."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
