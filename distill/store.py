"""The feature store: a target's states of whole conversations in a folder, read row by row and checked on the way.

A shard is a safetensors file of consecutive conversations, their T tokens one behind the other:

    lengths [R], checksums [R]              of its conversations; crc32 of all the bytes of a conversation's states
    input_ids [T], mask [T]
    features [T, A * Ht], hidden [T, Ht]    as `Captured`; in fp8 with features.scale [T, A] and hidden.scale [T, 1]

`manifest.json` says what the states come from and lists the shards, with a digest of each one's conversations and one of
its checksums: token ids are verified when a store is opened, states when they are read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import align_module_device
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch.nn.functional import pad

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.data.template import fingerprint
from slipstream.distill.target import DTYPES, Captured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from slipstream.configs.recipe import DataSettings
    from slipstream.distill.target import Target

FORMAT = 1

_INDEX = ("lengths", "checksums", "input_ids", "mask")
_FP8_MAX = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class Origin:
    """What states come from; a head can be trained on them where all of it is the same.

    Attributes:
        target_dtype: What the target computed in.
        weights: Fingerprint of the target's weights, whatever the target is called.
        layer_ids: Layers whose entering states are the features.
        template: Fingerprint of the chat template.
        max_length: Longer conversations were cut, tokens.
        think: Whether the template was told that answers think.
    """

    target_dtype: str
    weights: str
    layer_ids: list[int]
    template: str
    max_length: int
    think: bool | None

    @classmethod
    def of(cls, target: Target, data: DataSettings) -> Origin:
        """What states captured now would come from."""
        template = fingerprint(target.chat_tokenizer)
        dtype = str(target.dtype).removeprefix("torch.")
        layers = list(target.layer_ids)
        return cls(dtype, weights_fingerprint(target), layers, template, data.max_length, data.think)


@dataclass(frozen=True)
class Shard:
    """One file of a store.

    Attributes:
        file: Its name.
        rows: Conversations.
        tokens: Tokens of all of them.
        conversations: Digest of their lengths, token ids and masks.
        checksum: Digest of the checksums of their states; empty until the store is finished.
    """

    file: str
    rows: int
    tokens: int
    conversations: str
    checksum: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        target: What the target was called.
        origin: What the states come from.
        dtype: What they are kept in, `bfloat16` or `float8_e4m3fn`.
        shards: In the order of the conversations.
    """

    target: str
    origin: Origin
    dtype: str
    shards: list[Shard]

    @property
    def finished(self) -> bool:
        """Whether every shard was written."""
        return all(shard.checksum for shard in self.shards)

    @property
    def rows(self) -> int:
        """Conversations."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        """All that must be the same for two processes to write one store."""
        conversations = [shard.conversations for shard in self.shards]
        return {**asdict(self.origin), "dtype": self.dtype, "conversations": conversations}

    @property
    def store_id(self) -> str:
        """Stands in every shard, so that shards of several machines can be put together safely."""
        return digest(json.dumps(self.identity).encode())

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest."""
        content = {"format": FORMAT, "rows": self.rows, "tokens": self.tokens, **asdict(self)}
        write_atomic(folder / "manifest.json", json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            SlipstreamError: If there is none, or of another format.
        """
        file = folder / "manifest.json"
        if not file.is_file():
            raise SlipstreamError(f"{folder} holds no feature store: manifest.json is missing")
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise SlipstreamError(f"{file} is of format {content['format']}; this slipstream reads {FORMAT}")
            values = {field.name: content[field.name] for field in fields(cls)}
            values["origin"] = Origin(**values["origin"])
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            if not values["shards"]:
                raise KeyError("shards")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SlipstreamError(f"{file} is no manifest of a feature store ({error})") from error
        return cls(**values)


class Store:
    """A finished store. Token ids and masks are held in memory, 5 bytes a token; states are read when they are asked for.

    Attributes:
        tokens: Rows of `input_ids` and `mask`, as `slipstream.data.conversations.tokenize` gives them.

    Raises:
        SlipstreamError: If the folder holds no finished store, or its token ids are not those that were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        if not self.manifest.finished:
            raise SlipstreamError(f"store {folder} is not finished; give its slipstream capture command again")
        self._dtype = DTYPES[self.manifest.origin.target_dtype]
        indexes = []
        for shard in self.manifest.shards:
            indexes.append(read_index(folder, shard, self.manifest.store_id))
            if digest(indexes[-1]["checksums"]) != shard.checksum:
                raise damaged(folder / shard.file, "its checksums are not those in manifest.json")
        self._shard = np.repeat(np.arange(len(indexes)), [shard.rows for shard in self.manifest.shards])
        self._end = np.concatenate([index["lengths"].cumsum(0).numpy() for index in indexes])
        self._length = np.concatenate([index["lengths"].numpy() for index in indexes])
        self._checksum = np.concatenate([index["checksums"].numpy() for index in indexes])
        table = pa.concat_tables(map(_table, indexes))
        self.tokens = Dataset(table, fingerprint=self.manifest.store_id).with_format("numpy")

    def require(self, target: Target, data: DataSettings) -> None:
        """Make sure that these are `target`'s states of conversations read as `data` says.

        Raises:
            SlipstreamError: If not, naming what differs.
        """
        mine = replace(self.manifest, target=target.name, origin=Origin.of(target, data))
        require_same(self.folder, self.manifest, mine, "give another data.features, or capture again")

    def read(self, row: int) -> Captured:
        """States of one conversation, [L, A * Ht] and [L, Ht], in the target's dtype.

        Raises:
            SlipstreamError: If they are not what was written.
        """
        place = self.folder / self.manifest.shards[self._shard[row]].file
        end = int(self._end[row])
        try:
            with safe_open(place, "pt") as file:
                names = sorted(set(file.keys()) - set(_INDEX))
                states = {name: file.get_slice(name)[end - int(self._length[row]) : end] for name in names}
        except (OSError, SafetensorError) as error:
            raise damaged(place, str(error).splitlines()[0]) from error
        if checksum(states) != self._checksum[row]:
            raise damaged(place, f"the states of conversation {row + 1} do not match their checksum")
        return decode(states, self._dtype)

    def batch(self, rows: Sequence[int], length: int | None) -> Captured:
        """States of several conversations, [B, L, A * Ht] and [B, L, Ht], with zeros up to `length`, or packed (None)."""
        parts = [self.read(row) for row in rows]
        if length is None:
            return Captured(*(torch.cat(states)[None] for states in zip(*parts, strict=True)))
        padded = ([pad(x, (0, 0, 0, length - len(x))) for x in states] for states in zip(*parts, strict=True))
        return Captured(*map(torch.stack, padded))


def weights_fingerprint(target: Target, dtype: torch.dtype | None = None) -> str:
    """Fingerprint of some 64 values of every parameter, on whatever device it lies; as they would be in `dtype`, if given."""
    samples: list[bytes | Tensor] = []
    for prefix, module in target.model.named_modules():
        with align_module_device(module):  # brings back what accelerate keeps elsewhere
            for name, parameter in module.named_parameters(recurse=False):
                samples.append(f"{prefix}.{name} {list(parameter.shape)}".encode())
                parts = [part.flatten() for part in _plain(parameter.detach())]
                samples += [values[:: max(1, len(values) // 64)].to(dtype).float().cpu() for values in parts]
    return digest(*samples)[:16]


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's values: itself, or the parts of a quantised one (torchao)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def require_same(folder: Path, theirs: Manifest, mine: Manifest, advice: str) -> None:
    """Refuse the store in `folder` where anything but its name for the target differs.

    Raises:
        SlipstreamError: If so, naming what differs.
    """
    before, now = theirs.identity, mine.identity
    for key in before:
        if before[key] != now[key]:
            values = "other ones" if key == "conversations" else f"{before[key]!r} there, {now[key]!r} here"
            raise SlipstreamError(
                f"store {folder} of target {theirs.target!r} does not fit target {mine.target!r} and this recipe "
                f"({key}: {values}); {advice}"
            )


def encode(captured: Captured, dtype: str) -> dict[str, Tensor]:
    """States as they are kept: tensors of a shard by name, of the shape [.., width]."""
    if dtype == "bfloat16":
        return {"features": captured.features.bfloat16(), "hidden": captured.hidden.bfloat16()}
    width = captured.hidden.shape[-1]
    kept = {}
    for name, states in captured._asdict().items():
        layers = states.float().unflatten(-1, (-1, width))
        scale = layers.abs().amax(-1).clamp(min=1e-30) / _FP8_MAX
        kept[name] = (layers / scale[..., None]).to(torch.float8_e4m3fn).flatten(-2)
        kept[f"{name}.scale"] = scale
    return kept


def decode(kept: dict[str, Tensor], dtype: torch.dtype) -> Captured:
    """What `encode` was given, in `dtype`.

    A value kept in fp8 is off by at most 1/16 of itself or, where that is more, 1/458752 (448 * 1024) of the largest of its
    layer and token.
    """
    states = []
    for name in Captured._fields:
        values = kept[name]
        if f"{name}.scale" in kept:
            scale = kept[f"{name}.scale"][..., None]
            values = (values.float().unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)
        states.append(values.to(dtype))
    return Captured(*states)


def checksum(states: dict[str, Tensor]) -> int:
    """crc32 of the bytes of all tensors, in the order of their names."""
    value = 0
    for name in sorted(states):
        value = zlib.crc32(states[name].contiguous().view(torch.uint8).numpy().data, value)
    return value


def read_index(folder: Path, shard: Shard, store_id: str) -> dict[str, Tensor]:
    """All of a shard but its states.

    Raises:
        SlipstreamError: If the file is missing, unreadable, of another store, or holds other token ids than it should.
    """
    place = folder / shard.file
    if not place.is_file():
        raise SlipstreamError(f"{place} is missing; give the store's slipstream capture command again")
    try:
        with safe_open(place, "pt") as file:
            if (file.metadata() or {}).get("store") != store_id:
                raise damaged(place, "it belongs to another store")
            index = {name: file.get_tensor(name) for name in _INDEX}
    except (OSError, SafetensorError) as error:
        raise damaged(place, str(error).splitlines()[0]) from error
    if conversations_digest(index) != shard.conversations:
        raise damaged(place, "its token ids are not those in manifest.json")
    return index


def conversations_digest(index: dict[str, Tensor]) -> str:
    """Digest of a shard's lengths, token ids and masks."""
    return digest(*(index[name] for name in ("lengths", "input_ids", "mask")))


def digest(*contents: bytes | Tensor) -> str:
    """sha256 of bytes and tensors, its first half."""
    whole = hashlib.sha256()
    for content in contents:
        whole.update(content if isinstance(content, bytes) else content.numpy().tobytes())
    return whole.hexdigest()[:32]


def damaged(file: Path, why: str) -> SlipstreamError:
    """The error of a shard that is not what was written."""
    return SlipstreamError(f"{file} is damaged: {why}; delete it and give the store's slipstream capture command again")


def _table(index: dict[str, Tensor]) -> pa.Table:
    offsets = np.concatenate([[0], index["lengths"].cumsum(0).numpy()]).astype(np.int32)
    columns = {name: pa.ListArray.from_arrays(offsets, index[name].numpy()) for name in ("input_ids", "mask")}
    return pa.table(columns)
