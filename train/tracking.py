"""wandb and TensorBoard beside `metrics.jsonl`, through accelerate's trackers."""

from __future__ import annotations

import contextlib
import netrc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from accelerate import Accelerator

    from slipstream.configs.recipe import TrainSettings


def _wandb_key() -> bool:
    """Whether wandb could log in."""
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return known or bool(os.environ.get("WANDB_API_KEY"))


@contextlib.contextmanager
def track(accelerator: Accelerator, settings: TrainSettings, folder: Path) -> Iterator[None]:
    """Run a block with the trackers of the settings; without a key wandb writes its files for a later `wandb sync`."""
    if settings.trackers:
        options = {}
        if "wandb" in settings.trackers:
            mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
            options["wandb"] = {"dir": str(folder), "mode": mode}
        accelerator.init_trackers("slipstream", config={"folder": str(folder)}, init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would end the process group too, which saving still needs
            tracker.finish()
