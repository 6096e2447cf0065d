"""Where training takes the target's states from: the target itself, or a store."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from slipstream.data.batches import Batch
from slipstream.distill.target import Captured

if TYPE_CHECKING:
    import torch

    from slipstream.data.batches import Batches
    from slipstream.distill.store import Store
    from slipstream.distill.target import Target


class Features(Protocol):
    """Micro-batches with the target's states of them."""

    def of(self, index: int, then: int) -> tuple[Batch, Captured]:
        """The index-th batch and its states, on the device of training; `then` will be asked for next."""
        ...


class OnlineFeatures:
    """States by the target in this process.

    Args:
        target: The target.
        batches: Of the conversations.
        device: Where batches are wanted.
        keep: Keep the states of a limited set of batches, so that the target runs once per batch and not once per pass.
    """

    def __init__(self, target: Target, batches: Batches, device: torch.device, keep: bool) -> None:
        self.target = target
        self.batches = batches
        self.device = device
        self.kept: dict[int, Captured] | None = {} if keep and batches.limit is not None else None

    def of(self, index: int, then: int) -> tuple[Batch, Captured]:
        """The index-th batch and its states; nothing is done about `then`."""
        batch = Batch(*(values.to(self.device) for values in self.batches[index]))
        if self.kept is None:
            return batch, self._capture(batch)
        place = self.batches.which(index)
        if place not in self.kept:
            self.kept[place] = self._capture(batch)
        return batch, self.kept[place]

    def _capture(self, batch: Batch) -> Captured:
        """States where the batch is; a target that is spread over devices leaves them on its last."""
        return Captured(*(values.to(self.device) for values in self.target.capture(batch.input_ids)))


class StoredFeatures:
    """States from a store; those of the next batch are read in the background.

    Args:
        store: The store.
        batches: Of the store's conversations.
        device: Where batches and states are wanted.
    """

    def __init__(self, store: Store, batches: Batches, device: torch.device) -> None:
        self.store = store
        self.batches = batches
        self.device = device
        self._pool = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Captured]] = {}

    def of(self, index: int, then: int) -> tuple[Batch, Captured]:
        """The index-th batch and its states."""
        batch = Batch(*(values.to(self.device) for values in self.batches[index]))
        coming = self._coming.get(index) or self._read(index)
        self._coming = {then: self._read(then)}
        return batch, Captured(*(values.to(self.device) for values in coming.result()))

    def _read(self, index: int) -> Future[Captured]:
        return self._pool.submit(self.store.batch, self.batches.rows(index))
