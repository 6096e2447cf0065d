"""Where training takes the target's states from: the target itself, or a store."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from slipstream.distill.target import Captured

if TYPE_CHECKING:
    from slipstream.data.batches import Batch, Batches
    from slipstream.distill.store import Store
    from slipstream.distill.target import Target


class Features(Protocol):
    """The target's states of micro-batches."""

    def of(self, index: int, batch: Batch, then: int) -> Captured:
        """States of the index-th batch, on its device; those of `then` will be asked for next."""
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

    def of(self, index: int, batch: Batch, then: int) -> Captured:
        """States of the index-th batch; nothing is done about `then`."""
        if self.kept is None:
            return self._capture(batch)
        place = self.batches.which(index)
        if place not in self.kept:
            self.kept[place] = self._capture(batch)
        return self.kept[place]

    def _capture(self, batch: Batch) -> Captured:
        """States where the batch is; a target that is spread over devices leaves them on its last."""
        return Captured(
            *(values.to(batch.input_ids.device) for values in self.target.capture(batch.input_ids, batch.starts))
        )


class StoredFeatures:
    """States from a store; those of the next batch are read in the background.

    Args:
        store: The store.
        batches: Of the store's conversations.
    """

    def __init__(self, store: Store, batches: Batches) -> None:
        self.store = store
        self.batches = batches
        self._pool = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Captured]] = {}

    def of(self, index: int, batch: Batch, then: int) -> Captured:
        """States of the index-th batch."""
        coming = self._coming.get(index) or self._read(index)
        self._coming = {then: self._read(then)}
        return Captured(*(values.to(batch.input_ids.device) for values in coming.result()))

    def _read(self, index: int) -> Future[Captured]:
        return self._pool.submit(self.store.batch, self.batches.rows(index), self.batches.packed)
