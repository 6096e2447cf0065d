"""Micro-batches of whole conversations, in an order the seed fixes: of similar length and padded, or packed into one row."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

POOL = 64  # conversations of a pool of this many batches are sorted by length
MULTIPLE = 32  # of this are the sizes that training fills up, where there is room


class Batch(NamedTuple):
    """Conversations, one a row and padded on the right with 0, or all in one row.

    Attributes:
        input_ids: [B, L].
        mask: The assistant's tokens, bool [B, L].
        starts: Where each token's conversation begins in its row, [1, L]; None where every row is one.
    """

    input_ids: Tensor
    mask: Tensor
    starts: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(None if values is None else values.to(device) for values in self))  # type: ignore[arg-type]


class Batches:
    """Endless micro-batches over a tokenized data set.

    `batches[i]` depends on nothing but the seed and i, so that a resumed run, or one of several processes, reads exactly
    what it should.

    Args:
        tokens: `input_ids` and `mask` per row.
        batch_tokens: Tokens of a batch, padding included, at most, unless one row alone is longer.
        seed: Of the order.
        limit: Use only the first epoch's first batches (all of them, if there are fewer), as they are, in a new order
            every pass; None uses all, and puts them together anew every epoch.
        packed: Put conversations of any length into one row, instead of padding ones of similar length.
    """

    def __init__(
        self, tokens: Dataset, batch_tokens: int, seed: int, limit: int | None = None, *, packed: bool = False
    ) -> None:
        self.tokens = tokens
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.packed = packed
        self.lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        self._epochs: dict[int, list[list[int]]] = {}
        whole = len(self._plan(0))
        self.limit = None if limit is None else min(limit, whole)
        self.per_epoch = self.limit or whole

    @cached_property
    def digest(self) -> str:
        """Of the lengths, token ids and masks of all rows, in their order: what the batches are made of."""
        whole = hashlib.sha256()
        for part in self.tokens.with_format("arrow").iter(1000):
            ids, mask = (part[name].combine_chunks() for name in ("input_ids", "mask"))
            for values in (ids.value_lengths(), ids.flatten(), mask.flatten()):
                whole.update(values.to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        return whole.hexdigest()[:32]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Row indices of each batch of an epoch."""
        if epoch not in self._epochs:
            draw = np.random.default_rng([self.seed, epoch])
            order = draw.permutation(len(self.lengths))
            pool = POOL * max(1, self.batch_tokens // int(self.lengths.max()))
            plan: list[list[int]] = []
            fill = fit if self.packed else group
            for start in range(0, len(order), pool):
                plan += fill(order[start : start + pool], self.lengths, self.batch_tokens)
            # Reading ahead goes to and fro between an epoch and the next.
            self._epochs = {old: kept for old, kept in self._epochs.items() if old == epoch - 1}
            self._epochs[epoch] = [plan[i] for i in draw.permutation(len(plan))]
        return self._epochs[epoch]

    def which(self, index: int) -> int:
        """Which of a limited set of batches the index-th is."""
        assert self.limit is not None
        epoch, place = divmod(index, self.limit)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.limit)[place])

    def rows(self, index: int) -> list[int]:
        """Rows of the data set that the index-th batch holds."""
        if self.limit is not None:
            return self._plan(0)[self.which(index)]
        # Epochs differ a little in their number of batches; index counts in units of the first epoch's, so that a later
        # one's last batches are left out, or its first ones come twice.
        epoch, place = divmod(index, self.per_epoch)
        plan = self._plan(epoch)
        return plan[place % len(plan)]

    def width(self, rows: list[int]) -> int:
        """Tokens that some rows are padded to in one batch: their longest, up to a multiple of 32 that breaks no bound.

        Batches then are of a few sizes. For each new one kernels are prepared and memory is cut anew, which took a seventh of
        a step on a CPU (docs/benchmarks.md, "A training step").
        """
        longest = int(self.lengths[rows].max())
        most = min(self.batch_tokens // len(rows), int(self.lengths.max()))  # the longest of all fits every target
        return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, most))

    def __getitem__(self, index: int) -> Batch:
        rows = self.rows(index)
        return join(self.tokens, rows) if self.packed else collate(self.tokens, rows, self.width(rows))


def group(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Batches of rows of similar length, shortest first, of at most `batch_tokens` padded tokens.

    Args:
        rows: Indices into `lengths`.
        lengths: Tokens of every row of the data set.
        batch_tokens: As in `Batches`.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    for row in rows[np.argsort(lengths[rows], kind="stable")].tolist():
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    return [*batches, batch]


def fit(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Batches of rows of at most `batch_tokens` tokens together: the longest row first, each where it leaves least room.

    Args:
        rows: Indices into `lengths`.
        lengths: Tokens of every row of the data set.
        batch_tokens: As in `Batches`.
    """
    batches: list[list[int]] = []
    rooms: list[int] = []
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        length = int(lengths[row])
        room, place = min(((room, i) for i, room in enumerate(rooms) if room >= length), default=(0, len(batches)))
        if place == len(batches):
            batches.append([])
            rooms.append(room := max(batch_tokens, length))
        batches[place].append(row)
        rooms[place] = room - length
    return batches


def join(tokens: Dataset, rows: list[int]) -> Batch:
    """The packed batch of the given rows, [1, L]."""
    picked = [tokens[i] for i in rows]
    ids, mask = (torch.cat([torch.as_tensor(row[name]) for row in picked]) for name in ("input_ids", "mask"))
    lengths = torch.tensor([len(row["input_ids"]) for row in picked])
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return Batch(ids.long()[None], mask.bool()[None], starts[None])


def collate(tokens: Dataset, rows: list[int], length: int) -> Batch:
    """The batch of the given rows, padded to `length`."""
    picked = [tokens[i] for i in rows]
    ids = torch.zeros(len(picked), length, dtype=torch.long)
    mask = torch.zeros(len(picked), length, dtype=torch.bool)
    for i, row in enumerate(picked):
        ids[i, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        mask[i, : len(row["mask"])] = torch.as_tensor(row["mask"]).bool()
    return Batch(ids, mask)
