"""Where training takes the target's states from: the target itself, or a store."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch

from slipstream.distill.target import Captured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slipstream.data.batches import Batch, Batches
    from slipstream.distill.store import Store
    from slipstream.distill.target import Target


AHEAD = 3  # batches that are read from a store while another is learned from, at once
_SLAB = 2**27  # bytes; blocks of more than 32 MiB are none of glibc's heap


class Slabs:
    """Memory for tensors on a CPU that stay, apart from what steps free and fetch again.

    Among that they would cut it into ever more pieces, all of which malloc looks through: with 3 GB kept a third of a
    step's time (docs/benchmarks.md, "A training step").
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def keep(self, x: Tensor) -> Tensor:
        """A copy that may stay; what lies on another device is left there."""
        if x.device.type != "cpu":
            return x
        size = -(-x.nbytes // 64) * 64  # so that all begin at a cache line
        if size > len(self._left):
            self._left = torch.empty(max(_SLAB, size), dtype=torch.uint8)
        place, self._left = self._left[: x.nbytes], self._left[size:]
        return place.view(x.dtype).view(x.shape).copy_(x)


class Features(Protocol):
    """The target's states of micro-batches."""

    def of(self, index: int, batch: Batch, then: Sequence[int]) -> Captured:
        """States of the index-th batch, on its device; those of `then` will be asked for next, one after the other."""
        ...


class OnlineFeatures:
    """States by the target in this process.

    Args:
        target: The target.
        batches: Of the conversations.
        keep: Keep the states of a limited set of batches, so that the target runs once per batch and not once per pass.
    """

    def __init__(self, target: Target, batches: Batches, keep: bool) -> None:
        self.target = target
        self.batches = batches
        self.kept: dict[int, Captured] | None = {} if keep and batches.limit is not None else None
        self._slabs = Slabs()

    def of(self, index: int, batch: Batch, then: Sequence[int]) -> Captured:
        """States of the index-th batch; nothing is done about `then`."""
        if self.kept is None:
            return self._capture(batch)
        place = self.batches.which(index)
        if place not in self.kept:
            self.kept[place] = Captured(*map(self._slabs.keep, self._capture(batch)))
        return self.kept[place]

    def _capture(self, batch: Batch) -> Captured:
        """States where the batch is; a target that is spread over devices leaves them on its last."""
        return Captured(
            *(values.to(batch.input_ids.device) for values in self.target.capture(batch.input_ids, batch.starts))
        )


class StoredFeatures:
    """States from a store; those of the next batches are read in the background.

    Args:
        store: The store.
        batches: Of the store's conversations.
    """

    def __init__(self, store: Store, batches: Batches) -> None:
        self.store = store
        self.batches = batches
        self._pool = ThreadPoolExecutor(AHEAD)
        self._coming: dict[int, Future[Captured]] = {}

    def of(self, index: int, batch: Batch, then: Sequence[int]) -> Captured:
        """States of the index-th batch."""
        coming = self._coming.get(index) or self._read(index)
        self._coming = {later: self._coming.get(later) or self._read(later) for later in then}
        return Captured(*(values.to(batch.input_ids.device) for values in coming.result()))

    def _read(self, index: int) -> Future[Captured]:
        rows = self.batches.rows(index)
        return self._pool.submit(self.store.batch, rows, None if self.batches.packed else self.batches.width(rows))
