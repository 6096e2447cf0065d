"""A checkpoint folder as others write it: safetensors or pickled tensors, one file or shards, nothing trusted."""

from __future__ import annotations

import json
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_FILES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SlipstreamError: If there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SlipstreamError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise SlipstreamError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise SlipstreamError(f"{path} holds no JSON object")
    return data


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: one file or shards with an index, safetensors before pickles.

    Raises:
        SlipstreamError: If there are none, a file is damaged or holds more than tensors, or the index is wrong.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise SlipstreamError(f"{folder} holds no weights: neither {' nor '.join(_FILES)}, nor an index of shards")


def read_index(index: Path) -> dict[str, str]:
    """Tensor names and the files they are in, by an index of shards.

    Raises:
        SlipstreamError: If it lists none, or a file that is not in its folder.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise SlipstreamError(f"{index} has no weight_map of tensor names to files")
    for file in listed.values():
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise SlipstreamError(f"{index} names {file!r}, which is not a file beside it; nothing was read")
    return listed


def _read_shards(index: Path) -> dict[str, Tensor]:
    listed = read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        found = _read_file(index.parent / file)
        wanted = {name for name, place in listed.items() if place == file}
        for what, names in (("lacks", wanted - set(found)), ("holds unlisted", set(found) - wanted)):
            if names:
                raise SlipstreamError(f"{index.parent / file} {what} {sorted(names)}, by {index.name}")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SlipstreamError(f"{path} does not exist") from error
    except UnpicklingError as error:
        raise SlipstreamError(f"{path} holds more than tensors, or is damaged; its code was not run") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise SlipstreamError(
            f"{path} cannot be read, it is damaged or cut short: {why or 'it ends too soon'}"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise SlipstreamError(f"{path} is no dictionary of tensors")
    return data
