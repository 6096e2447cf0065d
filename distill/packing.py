"""Weights in the order in which this CPU's matrix kernels read them: what a small batch waits for is memory, not sums.

oneDNN reorders a weight on every call unless it is given one in its own layout. For SmolLM2-135M in bf16 on two cores that
is a third of the time of a forward over a few tokens (benchmarks/forward.py).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = 8  # tokens the layout is chosen for; it serves one as well as hundreds


@dataclass
class Packing:
    """Whether a model's packed layers use their packed weights; off, they are what they were."""

    on: bool = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use them within a block."""
        self.on = True
        try:
            yield
        finally:
            self.on = False


class _PackedLinear(nn.Linear):
    """A linear layer that holds its weight in a second layout; its parameters and names do not change."""

    packing: Packing
    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.packing.on or x.dtype != torch.bfloat16:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> Packing:
    """Pack the plain linear layers of a model whose weights stay as they are; bf16 on a CPU that knows it, nothing elsewhere.

    Takes the memory of those weights once more. A model that is packed already is left as it is.
    """
    packing = next((layer.packing for layer in model.modules() if isinstance(layer, _PackedLinear)), Packing())
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for layer in model.modules():
        if not supported or type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            continue  # a quantised weight is a tensor of another type, or in a layer of its own
        if layer.weight.dtype == torch.bfloat16 and layer.weight.is_cpu:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
            layer.__class__ = _PackedLinear
            layer.__dict__.update(packing=packing, packed=packed)  # no parameter and no buffer: never saved or moved
    return packing


def fold_rows(layer: nn.Module | None) -> None:
    """Let a frozen output layer take slices of the hidden states as it takes whole ones.

    Of a slice, torch (2.13) makes one product for each row, and on a CPU copies the weight for every one of them, unless
    the weight wants gradients: for SmolLM2-135M 80 ms a row, and 26 GB for 96 rows of a vocabulary of 152k. `generate`
    slices each prompt's last position.
    """
    if layer is not None and _folded not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_folded)


def _folded(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:]
