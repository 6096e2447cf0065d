"""Draft heads on the hub: fetched into its cache, pushed from a folder, weights in safetensors only."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # of the client it is built on, whose name changes

from slipstream.configs.errors import SlipstreamError

FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "decode.json", "provenance.json", "README.md"]
"""What a head's folder holds, and all that is ever fetched or pushed: nothing that could carry code."""


def fetch(repo: str) -> Path:
    """The files of a repository in the hub's cache, downloaded where they are new; without a network, what is cached.

    Raises:
        SlipstreamError: If there is no such repository, or it can neither be reached nor is it cached.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except (HTTPError, OSError, ValueError) as error:
        raise SlipstreamError(f"draft {repo!r} is neither a folder nor on the hub: {_line(error)}") from error


def commit(name: str) -> str | None:
    """The commit at which a model's hub id stands in the hub's cache; None for a folder and for what is not there."""
    if name.count("/") != 1 or Path(name).expanduser().exists():
        return None
    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent.name if isinstance(file, str) else None


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a head's folder, making the repository where there is none; returns its address.

    Raises:
        SlipstreamError: If the hub refuses it or cannot be reached.
    """
    hub = HfApi(library_name="slipstream")
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=FILES, commit_message="Upload draft head"
        )
    except (HTTPError, OSError, ValueError) as error:
        raise SlipstreamError(f"cannot push to {repo!r}: {_line(error)}") from error
    return str(address)


def _line(error: Exception) -> str:
    """An error of the hub's client in one line."""
    return " ".join(str(error).split())
