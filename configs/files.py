"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def write_through(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary neighbour, synced and renamed to `path` at the end; a kill leaves the old file or the new one.

    What killed writers of `path` left behind is deleted first; a writer that lives holds a lock on its file.
    """
    _sweep(path)
    handle, name = _locked(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _locked(path: Path) -> tuple[int, str]:
    """A new temporary neighbour, open and locked, where the file system has locks."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else it was swept before it was locked
            return handle, name
        os.close(handle)


def _sweep(path: Path) -> None:
    """Delete the temporary neighbours that no writer holds."""
    for torn in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}"):
        # Not if it is held, gone, a folder, another's, or without locks; NFS locks only what is open for writing.
        with contextlib.suppress(OSError), torn.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            torn.unlink()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave the old one."""
    with write_through(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for place in (temporary, *temporary.rglob("*")):  # safetensors and mkdtemp let nobody else read
            place.chmod(0o755 if place.is_dir() else 0o644)
        if path.exists():
            retired = temporary.with_name(temporary.name + ".old")
            path.rename(retired)
            temporary.rename(path)
            shutil.rmtree(retired)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_writable(folder: Path, needed_mb: int) -> None:
    """Make sure that `folder` can be made, written, and holds `needed_mb` more megabytes.

    Raises:
        SlipstreamError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SlipstreamError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    free = shutil.disk_usage(folder).free // 2**20
    if free < needed_mb:
        raise SlipstreamError(
            f"{folder} has {free} MB free, {needed_mb} MB are needed; free some or give another --out"
        )
