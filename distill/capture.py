"""Writing a feature store: which conversations stand in which shard, and shards by any number of processes.

The shards and their content follow from the conversations alone, so that processes need not know of each other, and a store
begun by four may be finished by one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.configs.progress import progress
from slipstream.data.batches import collate, group
from slipstream.distill.store import (
    Manifest,
    Origin,
    Shard,
    checksum,
    conversations_digest,
    digest,
    encode,
    read_index,
    require_same,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datasets import Dataset
    from torch import Tensor

    from slipstream.configs.recipe import DataSettings
    from slipstream.distill.target import Target

SHARD_BYTES = 2**29  # a process holds some three times this; a kill costs at most one shard


def bytes_per_token(target: Target, dtype: str) -> int:
    """What a token takes in a store: its states, its id and its mask."""
    layers = len(target.layer_ids) + 1
    size = 2 * target.config.hidden_size if dtype == "bfloat16" else target.config.hidden_size + 4
    return layers * size + 5


def plan_store(target: Target, tokens: Dataset, data: DataSettings, dtype: str) -> Manifest:
    """The manifest of a store of these conversations, before anything is written.

    Args:
        target: The target whose states are kept.
        tokens: Rows of `input_ids` and `mask`.
        data: How they were read.
        dtype: `bfloat16` or `float8_e4m3fn`.
    """
    limit = SHARD_BYTES // bytes_per_token(target, dtype)
    parts, shards = cut([len(ids) for ids in tokens["input_ids"]], limit), []
    for number, rows in enumerate(parts):
        index = _index(tokens.select(rows))
        file = f"shard-{number:05d}-of-{len(parts):05d}.safetensors"
        shards.append(Shard(file, len(rows), len(index["input_ids"]), conversations_digest(index)))
    return Manifest(target.name, Origin.of(target, data), dtype, shards)


def cut(lengths: Sequence[int], limit: int) -> list[range]:
    """Consecutive rows of at most `limit` tokens, unless one row alone is longer.

    Worked example: lengths 3, 4, 9, 1 with limit 7 make rows 0 and 1, row 2, row 3.
    """
    firsts, size = [0], 0
    for row, length in enumerate(lengths):
        if size and size + length > limit:
            firsts.append(row)
            size = 0
        size += length
    return [range(*ends) for ends in pairwise([*firsts, len(lengths)])]


def _index(part: Dataset) -> dict[str, Tensor]:
    """Lengths [R] of conversations, and their token ids and masks side by side, [T]."""
    rows = list(part)
    return {
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        "input_ids": torch.from_numpy(np.concatenate([row["input_ids"] for row in rows])).int(),
        "mask": torch.from_numpy(np.concatenate([row["mask"] for row in rows])).bool(),
    }


def claim(folder: Path, manifest: Manifest) -> None:
    """Take the folder for a store, or go on with the same one.

    Raises:
        SlipstreamError: If it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise SlipstreamError(f"{folder} is a file; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # Looked at once, and without temporary files: another process may be claiming the folder at this moment.
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    if "manifest.json" in names:
        require_same(folder, Manifest.load(folder), manifest, "give another --out, or what it was begun with")
    elif names:
        raise SlipstreamError(f"{folder} exists and holds no feature store; give another --out")
    else:
        manifest.save(folder)


def missing(folder: Path, manifest: Manifest, numbers: Sequence[int]) -> list[int]:
    """Which of the given shards are not there yet."""
    return [number for number in numbers if not (folder / manifest.shards[number].file).exists()]


def write_shards(
    target: Target, tokens: Dataset, folder: Path, manifest: Manifest, numbers: Sequence[int], batch_tokens: int
) -> None:
    """Write those of the given shards that are missing, each whole or not at all.

    Args:
        target: The target.
        tokens: All conversations of the store.
        folder: Of the store, claimed.
        manifest: Of the store.
        numbers: Shards to write.
        batch_tokens: Padded tokens per forward of the target.

    Raises:
        SlipstreamError: If a state is not finite.
    """
    ends = np.cumsum([shard.rows for shard in manifest.shards])
    wanted = missing(folder, manifest, numbers)
    with progress("capture", sum(manifest.shards[number].tokens for number in wanted), "tokens") as advance:
        for number in wanted:
            shard = manifest.shards[number]
            rows = range(int(ends[number]) - shard.rows, int(ends[number]))
            content = capture_rows(target, tokens, rows, manifest.dtype, batch_tokens)
            write_atomic(folder / shard.file, save(content, {"store": manifest.store_id}))
            advance(shard.tokens)


def capture_rows(
    target: Target, tokens: Dataset, rows: Sequence[int], dtype: str, batch_tokens: int
) -> dict[str, Tensor]:
    """The tensors of a shard of the given conversations.

    Raises:
        SlipstreamError: If a state is not finite.
    """
    part = tokens.select(rows)
    index = _index(part)
    lengths = index["lengths"].numpy()
    ends = lengths.cumsum()
    states: dict[str, Tensor] = {}
    for picked in group(np.arange(len(part)), lengths, batch_tokens):
        batch = collate(part, picked, int(lengths[picked].max()))
        captured = target.capture(batch.input_ids.to(target.device))
        if not all(bool(values.isfinite().all()) for values in captured):
            raise SlipstreamError(
                f"the target's states of conversation {rows[picked[0]] + 1}, or of one captured with it, are not finite "
                f"in {target.dtype}; try --target.dtype bfloat16"
            )
        for name, values in encode(captured, dtype).items():
            if name not in states:
                states[name] = torch.empty(int(ends[-1]), values.shape[-1], dtype=values.dtype)
            for kept, row in zip(values, picked, strict=True):
                states[name][ends[row] - lengths[row] : ends[row]] = kept[: lengths[row]].cpu()
    sums = [
        checksum({name: values[end - length : end] for name, values in states.items()})
        for end, length in zip(ends, lengths, strict=True)
    ]
    return {**states, **index, "checksums": torch.tensor(sums)}


def finish(folder: Path, manifest: Manifest) -> int:
    """Complete the manifest of a store whose shards are all there and right; returns how many are still missing.

    Raises:
        SlipstreamError: If a shard is damaged, or holds other conversations.
    """
    absent = missing(folder, manifest, range(len(manifest.shards)))
    if absent:
        return len(absent)
    indexes = [read_index(folder, shard, manifest.store_id) for shard in manifest.shards]
    shards = [
        replace(shard, checksum=digest(index["checksums"]))
        for shard, index in zip(manifest.shards, indexes, strict=True)
    ]
    replace(manifest, shards=shards).save(folder)
    return 0
