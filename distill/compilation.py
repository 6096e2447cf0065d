"""Forwards of fixed shapes through `torch.compile`: packed weights on a CPU, CUDA graphs on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_GRAPHS = 64  # of one function: one per size of tree and of cache


def compile_static(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, compiled anew for every shape of its inputs, for frozen weights on `device`.

    On a card it runs as CUDA graphs. A graph writes in place to tensors marked by `TreeCache.mark_static` only, and its
    outputs lie in memory that the next call of any compiled function takes again: what is needed longer has to be copied.
    """
    # The weights are frozen: guarding each module on every call would cost a tenth of a small forward.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if device.type == "cpu":
        options["freezing"] = True  # packs them as distill/packing.py does; in inference mode inductor does not
    elif device.type == "cuda":
        options["triton.cudagraphs"] = True
    # Beyond the limit, 8 by default, torch would go on without compiling and say so in a log only.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _GRAPHS)
    return torch.compile(function, dynamic=False, options=options)
