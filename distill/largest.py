"""The largest of many logits.

On a CPU torch's `max` with its place and `topk` look at one logit after the other, while maxima alone are found many at a
time: those of parts tell which parts need looking at. Over 19 rows of 49,152 in bf16 that takes 0.24 ms in place of 0.38
(`max`) and 0.65 (`topk` of three).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_PART = 256


class Largest:
    """The largest of the last dimension, asked for once or several times; NaN counts as the largest.

    Args:
        x: [.., V].
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        whole = x.shape[-1] // _PART * _PART
        self._parts = x[..., :whole].unflatten(-1, (-1, _PART))  # [.., P, part]
        self._tail = x[..., whole:]

    def first(self) -> tuple[Tensor, Tensor]:
        """The largest and its first place, [..], as `x.max(-1)`."""
        if not self._pays(1):
            value, place = self._x.max(-1)
            return value, place
        part = self._maxima.max(-1).indices
        value, place = self._in(part[..., None]).max(-1)
        return value, place + _PART * torch.where(place < _PART, part, self._parts.shape[-2] - 1)

    def values(self, count: int) -> Tensor:
        """The `count` largest in descending order, [.., count], as `x.topk(count).values`."""
        if not self._pays(count):
            return self._x.topk(count).values
        return self._in(self._maxima.topk(count).indices).topk(count).values

    def _pays(self, count: int) -> bool:
        return self._x.is_cpu and self._parts.shape[-2] >= 2 * count

    @cached_property
    def _maxima(self) -> Tensor:
        """Of the parts, [.., P]."""
        return self._parts.amax(-1)

    def _in(self, parts: Tensor) -> Tensor:
        """What stands in some parts [.., n], and behind it the tail, which is in none."""
        chosen = self._parts.gather(-2, parts[..., None].expand(*parts.shape, _PART)).flatten(-2)
        return torch.cat([chosen, self._tail], -1) if self._tail.shape[-1] else chosen
