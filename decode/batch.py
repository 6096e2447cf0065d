"""The rows of a call that are still going."""

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
