"""`slipstream train --plan`: what a recipe takes on this machine, or on cards like one that is described."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from slipstream.configs.errors import SlipstreamError
from slipstream.data.conversations import load
from slipstream.distill.store import Store
from slipstream.distill.target import load_tokenizer
from slipstream.distill.unroll import Distillation
from slipstream.train.footprint import size_of
from slipstream.train.plan import Machine, Text, outline, shortages, stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from slipstream.configs.recipe import Recipe
    from slipstream.train.plan import Stage

_SIDE = {"cpu": 1024}  # of the matrices that are multiplied; elsewhere 8192
_UNITS = ((86400, "days"), (3600, "h"), (60, "min"))


def show(recipe: Recipe, out: Path, card: Sequence[float]) -> None:
    """Print what a recipe takes, stage by stage; nothing is written and no weights are read.

    Raises:
        SlipstreamError: If the target's config cannot be read, the head cannot be taught so, a conversation is longer than
            the target's context, or `card` does not describe one.
    """
    target, head = outline(recipe)
    Distillation(head, target, recipe.distill, autocast=False)  # refuses what training would
    try:
        rows = _token_rows(recipe)
    except SlipstreamError as error:
        text, why = Text.unknown(recipe.data), f", as the data cannot be counted here: {error}"
    else:
        target.require_room(max(map(len, rows["input_ids"])))
        text, why = Text.of(rows, recipe.data), ""
    machine = _machine(recipe, out, card)
    plan = stages(recipe, target, head, text, machine)
    said = "as given by --card" if card else "of a matrix product here"
    weights, own = size_of(target.model.parameters()), sum(p.numel() for p in head.parameters())
    print(f"target: {target.name}, {weights / target.dtype.itemsize / 1e6:,.0f} M weights in {recipe.target.dtype}")
    print(f"head: {head.config.kind}, {own / 1e6:,.0f} M weights")
    print(f"data: {text.tokens:,} tokens{why}")
    cards = f"a {machine.kind}" if machine.cards == 1 else f"{machine.cards} times a {machine.kind}"
    print(
        f"machine: processes {machine.processes}, each with {cards} of {_gigabytes(machine.memory)} and "
        f"{machine.flops / 1e12:,.2f} TFLOP/s ({said}); {_gigabytes(machine.disk)} of disk are free"
    )
    table = Table("stage", "memory a process", "disk", "time, at least", "in this recipe", box=None)
    for stage in plan:
        table.add_row(*figures(stage), "yes" if stage.used else "no")
    Console().print(table)
    training = next(stage for stage in plan[2:] if stage.used)
    parts = ", ".join(f"{part} {_gigabytes(size)}" for part, size in training.held.items())
    most = max(training.passing, key=lambda part: training.passing[part])
    print(f"memory of {training.name}: {parts}; for a time {most} {_gigabytes(training.passing[most])}")
    if training.read:
        rate = _gigabytes(training.read / training.seconds)
        print(f"the store is read at {rate} a second in that time, {_gigabytes(training.read)} in all")
    for warning in shortages(recipe, plan, machine):
        print(f"warning: {warning}")
    print("all of this is estimated; time is FLOPs at that speed, and real runs take longer")


def figures(stage: Stage) -> tuple[str, str, str, str]:
    """A stage's name, memory of a process, disk and time."""
    return stage.name, _gigabytes(stage.memory), _gigabytes(stage.disk), _duration(stage.seconds)


def _token_rows(recipe: Recipe) -> Dataset:
    """The recipe's data, if it is on this machine."""
    data = recipe.data
    if data.features is not None:
        return Store(Path(data.features).expanduser()).tokens
    places = (data.conversations,) if isinstance(data.conversations, str) else data.conversations or ()
    for place in places:
        if not Path(place).expanduser().exists():
            raise SlipstreamError(f"{place} is no file or folder here")
    return load(data, load_tokenizer(recipe.target.name))


def _machine(recipe: Recipe, out: Path, card: Sequence[float]) -> Machine:
    """This machine, as the launch shares it out; or cards of so many GB and TFLOP/s."""
    if card and (len(card) not in (2, 3) or not all(0 < n < math.inf for n in card) or any(n % 1 for n in card[2:])):
        raise SlipstreamError(
            "--card takes the GB and the TFLOP/s of a card, such as --card 80 400, and for target.device_map how many a "
            "process has: --card 80 400 8"
        )
    processes, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    folder = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    disk = shutil.disk_usage(folder).free
    spread = recipe.target.device_map is not None
    if card:
        count = int(card[2]) if spread and card[2:] else 1
        return Machine("card", card[0] * 1e9, card[1] * 1e12, disk, processes, _zero_stage(), count)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    count = 1
    if device.type == "cuda":
        count = torch.cuda.device_count() if spread else 1
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local
    dtype = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else torch.float32
    return Machine(device.type, memory, _measured_flops(device, dtype), disk, processes, _zero_stage(), count)


def _zero_stage() -> int:
    """Of DeepSpeed, as `accelerate launch` tells it; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return 0
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        return int(json.loads(Path(file).read_text())["zero_optimization"]["stage"])
    return int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"])


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large matrices, the best of five."""
    side = _SIDE.get(device.type, 8192)
    x = torch.randn(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def _duration(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s"
