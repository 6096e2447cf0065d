"""One loop on one process or many: gradients added up, sharded by FSDP2 (`train.shard`), or handed to DeepSpeed.

accelerate launch --config_file configs/launch/ddp.yaml -m slipstream.cli train --config recipe.yaml --out runs/mine
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
from datetime import timedelta
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slipstream.configs.errors import SlipstreamError, out_of_memory
from slipstream.configs.files import write_atomic, write_through
from slipstream.train.optimizer import make_optimizers

if TYPE_CHECKING:
    from pathlib import Path

    from slipstream.configs.recipe import TrainSettings


_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: as long as the first one may take to tokenize the data."""


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AssertionError, UnpicklingError)
"""What reading a damaged checkpoint raises."""


def keep_freed_memory() -> None:
    """Let this process, as long as it lives, keep what its tensors give back, in blocks of up to 32 MiB.

    Otherwise glibc returns it, and fetches it again page by page: for a step over 1,024 tokens of SmolLM2-135M 27,000
    pages, a seventh of its time (docs/benchmarks.md, "A training step"). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the most it takes


def start(settings: TrainSettings, folder: Path) -> Accelerator:
    """Join the other processes of this launch, if there are any; trackers write into `folder`.

    Raises:
        SlipstreamError: If a tracker is not installed, or accelerate was asked for its own FSDP plugin, which does not run
            on CPUs.
    """
    missing = [name for name in settings.trackers if find_spec(name) is None]
    if missing:
        raise SlipstreamError(f"train.trackers needs {missing[0]}: pip install 'slipstream[wandb]'")
    # On CPUs accelerate counts the processes of a launch only if it is told of the CPU, or, for DeepSpeed, of gloo.
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        keep_freed_memory()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu and deepspeed else None, timeout=_PATIENCE)],
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise SlipstreamError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but accelerate sees {accelerator.num_processes}"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SlipstreamError(
            "launch without accelerate's FSDP plugin and set train.shard: it is FSDP2, on CPUs as well"
        )
    return accelerator


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What was written into a run's folder by `torch.save`, on the CPU.

    Its tensors are mapped: all processes of a machine share them, and they are to be copied before the file is replaced.

    Raises:
        SlipstreamError: If it is damaged.
    """
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except _UNREADABLE as error:
        raise _damaged(file) from error


def _damaged(place: Path) -> SlipstreamError:
    return SlipstreamError(f"{place} is damaged or cut short; delete it to go on without it, or give another --out")


class Launch:
    """A module and its optimizers on all processes.

    The loss given to `backward` is this process's part of a sum: gradients are summed over the processes, never averaged.

    Attributes:
        module: What to call; wrapped where the launch needs it.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, settings: TrainSettings) -> None:
        self.accelerator = accelerator
        self.settings = settings
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed and settings.optimizer == "muon":
            raise SlipstreamError("muon needs whole matrices, and DeepSpeed shards them: set train.optimizer adamw")
        if self.deepspeed and settings.shard:
            raise SlipstreamError(
                "train.shard is FSDP2, and DeepSpeed shards by its stage: set train.shard false, or launch with "
                "configs/launch/ddp.yaml"
            )
        if self.deepspeed and settings.ema is not None and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise SlipstreamError(
                "train.ema averages whole weights; it does not go with ZeRO stage 3: launch with stage 2"
            )
        if self.deepspeed and settings.compile and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise SlipstreamError(
                "train.compile needs weights that stay where they are, which ZeRO stage 3 gathers layer by layer: launch "
                "with stage 2"
            )
        module = module.to(accelerator.device)
        if settings.shard:
            if accelerator.num_processes < 2:
                raise SlipstreamError("train.shard needs several processes: accelerate launch --num_processes 2 ...")
            mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
            fully_shard(module, mesh=mesh)
        self.optimizers = make_optimizers(module, settings)
        self.shares = [optimizer.param_groups[0]["lr"] / settings.learning_rate for optimizer in self.optimizers]
        self.module: Any = module
        if self.deepspeed:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["gradient_clipping"] = settings.clip
            config["gradient_accumulation_steps"] = settings.accumulation
            config["train_micro_batch_size_per_gpu"] = 1
            self.module, *self.optimizers = accelerator.prepare(module, *self.optimizers)

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.accelerator.is_main_process

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return self.accelerator.reduce(x.to(self.accelerator.device), "sum")

    def agree(self, yes: bool) -> bool:
        """What the main process says, on all of them."""
        return bool(self.sum(torch.tensor(float(yes and self.main)))) if self.processes > 1 else yes

    def everywhere(self, path: Path) -> bool:
        """Whether a file is there, which all processes must see alike."""
        seen = int(self.sum(torch.tensor(float(path.exists())))) if self.processes > 1 else int(path.exists())
        if 0 < seen < self.processes:
            raise SlipstreamError(
                f"{seen} of {self.processes} processes see {path}; give an --out that all nodes share"
            )
        return seen > 0

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; `last` is the last one before `step`."""
        if self.deepspeed:  # it takes means over processes and micro-batches
            self.module.set_gradient_accumulation_boundary(is_boundary=last)
            self.module.backward(loss * self.processes * self.settings.accumulation)
        elif self.settings.shard:  # a mean over processes
            (loss * self.processes).backward()
        else:
            loss.backward()

    def step(self, rate: float, loss: Tensor) -> float:
        """Clip, step, forget the gradients.

        Args:
            rate: The learning rate.
            loss: This process's part of the step's loss, no graph behind it.

        Returns:
            The gradients' norm before clipping. Where the loss is not finite NaN, and nothing was stepped; where only the norm
            is not, nothing was stepped but under DeepSpeed, which steps before it tells.
        """
        for optimizer, share in zip(self.optimizers, self.shares, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        loss = self.sum(loss)
        if self.deepspeed:
            if not math.isfinite(loss):  # read where its step would wait for the norm; older ones take a NaN norm for 1
                return math.nan
            self.module.step()
            return float(self.module.get_global_grad_norm())
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in parameters:
            if (
                parameter.grad is None
            ):  # masks of a parallel head before it is unrolled: their state must be there to save
                parameter.grad = torch.zeros_like(parameter)
        if self.processes > 1 and not self.settings.shard:
            for parameter in parameters:
                parameter.grad = self.sum(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        length, lost = torch.stack([norm.float(), loss.float()]).tolist()  # one wait for the device
        if not math.isfinite(length + lost):
            return math.nan
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(length)

    def _require_finite(self) -> None:
        """Make sure that there are weights worth keeping, on all processes alike."""
        cut = self.deepspeed and self.module.zero_optimization_partition_weights()
        place = self.accelerator.process_index

        def here(p: Any) -> Tensor:
            """What this process holds of a weight; ZeRO-3 fills the parts up with whatever lay there."""
            if not cut:
                return p.to_local() if isinstance(p, DTensor) else p
            part: Tensor = p.ds_tensor
            return part[: max(0, min(part.numel(), p.ds_numel - place * part.numel()))]

        own = [here(p) for p in self.module.parameters()]
        bad = torch.stack([~torch.isfinite(x.detach()).all() for x in own]).any()
        if self.sum(bad.float()):
            raise SlipstreamError(
                "the head's weights are NaN or infinite, and the checkpoint before was kept; lower train.learning_rate "
                "and give another --out"
            )

    def save(self, place: Path, progress: dict[str, Any]) -> None:
        """Replace the checkpoint; a kill leaves the old one or the new one.

        It is a file, `place`.pt, of whole tensors, which any number of processes can go on from; under DeepSpeed a folder,
        which only as many as wrote it can.

        Raises:
            SlipstreamError: If weights are not finite; the old one stays.
        """
        self._require_finite()
        progress = {**progress, "processes": self.processes, "shares": self.shares}
        if self.deepspeed:
            tag, latest = f"step-{progress['step']}", place / "latest"
            if self.agree(self.main and latest.exists() and latest.read_text().strip() == tag):
                return  # it is this one, and must not be written over
            self.module.save_checkpoint(str(place), tag=tag, client_state=progress, save_latest=False)
            self.accelerator.wait_for_everyone()  # all parts are there before it counts
            if self.main:
                write_atomic(latest, tag)
                for old in place.glob("step-*"):
                    if old.name != tag:
                        shutil.rmtree(old)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        module, optimizers = get_state_dict(self.module, self.optimizers, options=options)
        if self.main:
            state = {"module": module, "optimizers": optimizers, "progress": progress}
            with write_through(place.with_suffix(".pt")) as file:
                torch.save(state, file)
        self.accelerator.wait_for_everyone()

    def load(self, place: Path) -> dict[str, Any] | None:
        """Go on from the checkpoint; returns what `save` was told, None where there is no checkpoint.

        Raises:
            SlipstreamError: If it was written by another kind of launch, or is damaged.
        """
        file = place.with_suffix(".pt")
        if self.deepspeed:
            if self.everywhere(file):
                raise SlipstreamError(
                    f"{file} was not written under DeepSpeed; go on without it, or give another --out"
                )
            if not self.everywhere(place / "latest"):
                return None
            tag = (place / "latest").read_text().strip()
            wrote = len(list((place / tag).glob("*optim_states.pt")))
            if not tag or not wrote:
                raise _damaged(place)
            if wrote != self.processes:
                raise SlipstreamError(
                    f"{place} was written by {wrote} processes under DeepSpeed and goes on with as many"
                )
            try:
                _, progress = self.module.load_checkpoint(str(place), tag=tag)
                return dict(progress)
            except _UNREADABLE as error:
                if out_of_memory(error):
                    raise
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise SlipstreamError(
                    f"{place} cannot be read ({why}); if it is damaged, delete it to go on without it, or give another --out"
                ) from error
        if self.everywhere(place):
            raise SlipstreamError(f"{place} was written under DeepSpeed; go on with it, or give another --out")
        if not self.everywhere(file):
            return None
        state = read_checkpoint(file)
        set_state_dict(
            self.module,
            self.optimizers,
            model_state_dict=state["module"],
            optim_state_dict=state["optimizers"],
            options=StateDictOptions(full_state_dict=True),
        )
        for kept in (kept for optimizer in self.optimizers for kept in optimizer.state.values()):
            own = {name: x.clone() for name, x in kept.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
            kept.update(own)  # which were the file's
        self.shares = state["progress"].get("shares", [1.0] * len(self.shares))  # older versions had no others
        return dict(state["progress"])

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU, by their names in the module; empty on other processes than the main one."""
        if self.deepspeed:
            from deepspeed.runtime.zero import GatheredParameters

            sharded = self.module.zero_optimization_partition_weights()
            with GatheredParameters(list(self.module.parameters()), enabled=sharded):
                whole = {name: x.detach().cpu().clone() for name, x in self.module.module.state_dict().items()}
            return whole if self.main else {}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, _ = get_state_dict(self.module, [], options=options)
        return cast("dict[str, Tensor]", weights)
