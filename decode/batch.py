"""The rows of a call that are still going, and what their drafter is still to be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slipstream.decode.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.verify import Token


@dataclass
class Batch:
    """Rows, lists per row: their places in the call, tokens and room.

    Attributes:
        places: Row numbers in the call.
        ids: Tokens decided so far, prompts included, [B, S], padded on the right.
        text: The same on the host, [B, S]: who looks there waits for no card.
        lengths: How many tokens of a row are decided.
        prompts: How many of them are the prompt.
        room: How many more it may get.
    """

    places: list[int]
    ids: Tensor
    text: np.ndarray
    lengths: list[int]
    prompts: list[int]
    room: list[int]

    @classmethod
    def begin(cls, prompts: Sequence[Tensor], room: list[int], device: torch.device) -> Batch:
        """Rows that are prompts [n] only."""
        lengths = [len(prompt) for prompt in prompts]
        size = len(prompts), max(n + left for n, left in zip(lengths, room, strict=True))
        text = np.zeros(size, dtype=np.int64)
        for row, prompt in zip(text, prompts, strict=True):
            row[: len(prompt)] = prompt.cpu()
        return cls(list(range(len(prompts))), to_device(text, device), text, lengths, [*lengths], room)

    def extend(self, new: Sequence[Sequence[Token]]) -> None:
        """Append each row's new tokens."""
        for row, tokens in enumerate(new):
            place = slice(self.lengths[row], self.lengths[row] + len(tokens))
            self.text[row, place] = [token.id for token in tokens]
            self.ids[row, place] = to_device(self.text[row, place], self.ids.device)
            self.lengths[row] += len(tokens)
            self.room[row] -= len(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self.ids, self.text = self.ids[to_device(rows, self.ids.device)], self.text[rows]
        for name in ("places", "lengths", "prompts", "room"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])


@dataclass
class Unread:
    """Target features of decided tokens that the drafter has not read yet.

    Attributes:
        features: [B, m, F]; the real ones of a row come first.
        counts: How many of the m are real, per row.
    """

    features: Tensor
    counts: list[int]

    def add(self, new: Tensor, paths: Sequence[Sequence[int]]) -> None:
        """Put the accepted nodes' [B, N, F] behind them."""
        counts = [n + len(path) for n, path in zip(self.counts, paths, strict=True)]
        behind, width = self.features.shape[1], max(counts)
        index = [[*range(n), *(behind + node for node in path)] for n, path in zip(self.counts, paths, strict=True)]
        padded = to_device([line + [0] * (width - len(line)) for line in index], new.device)
        joined = torch.cat([self.features, new], 1) if behind else new
        self.features = joined.gather(1, padded[:, :, None].expand(-1, -1, new.shape[-1]))
        self.counts = counts

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self.features = self.features[to_device(rows, self.features.device)]
        self.counts = [self.counts[row] for row in rows]

    def clear(self) -> None:
        """The drafter has read them."""
        self.features, self.counts = self.features[:, :0], [0] * len(self.counts)
