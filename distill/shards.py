"""A target's layers in shards (FSDP2): a process holds its share of each, and has one whole while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from slipstream.distill.target import Target


def layers_of(target: Target) -> nn.ModuleList:
    """The target's layers: its list of modules with the most weights (experts are lists within one)."""
    lists = [module for module in target.inner.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def shard(target: Target, device: torch.device) -> None:
    """Spread the weights of the target's layers over all processes, and put the rest, whole, on this one's device.

    Embeddings, norms and output layer stay whole because they are used outside a forward of the model, which is where
    shards are gathered. From here on the processes must run the target in step, each with texts of its own.

    Raises:
        SlipstreamError: If there is one process only, or the weights are quantised.
    """
    if getattr(target.model.config, "quantization_config", None) is not None:
        raise SlipstreamError(f"target.shard cannot cut up quantised weights, which {target.name} has")
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes < 2:
        raise SlipstreamError("target.shard needs several processes: accelerate launch --num_processes 2 ...")
    mesh = torch.distributed.init_device_mesh(device.type, (processes,))
    for layer in layers_of(target):  # goes to the device, and leaves its share there
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inner = target.inner
    kind = type(inner)
    # A common root lets one layer be gathered while the one before it runs; it has no shards of its own.
    whole = {parameter for parameter in inner.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(inner, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    inner.__class__ = kind  # by which transformers knows what states a model can give
    target.model.to(device)
