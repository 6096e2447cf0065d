"""The draft vocabulary: the tokens a head can propose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slipstream.configs.progress import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datasets import Dataset


def draft_vocabulary(tokens: Dataset, size: int, vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """The `size` most frequent assistant tokens, as ascending target ids [size].

    Args:
        tokens: Rows of `input_ids` and `mask`.
        size: At most `vocab_size`. Where fewer distinct tokens occur, the lowest unused ids fill the rest, and a note
            says so.
        vocab_size: V.
        always: Tokens that must be in (end of sequence).
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in tokens:
        np.add.at(counts, row["input_ids"][row["mask"].astype(bool)], 1)
    counts[list(always)] = counts.sum() + 1
    size, distinct = min(size, vocab_size), int(np.count_nonzero(counts))
    if distinct < size:
        console.print(
            f"the answers hold {distinct:,} distinct tokens, fewer than the draft vocabulary ({size:,}); "
            "it is filled up with the lowest other ids"
        )
    ranked = np.argsort(-counts, kind="stable")  # ties, and all unused tokens, by ascending id
    return torch.from_numpy(np.sort(ranked[:size]))


def coverage(tokens: Dataset, vocabulary: Sequence[int] | Tensor, vocab_size: int) -> float:
    """Share of the assistant's tokens that the draft vocabulary holds."""
    member = np.zeros(vocab_size, dtype=bool)
    member[np.asarray(vocabulary)] = True
    inside = total = 0
    for row in tokens:
        ids = row["input_ids"][row["mask"].astype(bool)]
        inside += int(member[ids].sum())
        total += len(ids)
    return inside / max(total, 1)
