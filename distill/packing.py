"""Weights in the order in which this CPU's matrix kernels read them: what a small batch waits for is memory, not sums.

oneDNN reorders a weight on every call unless it is given one in its own layout. For SmolLM2-135M in bf16 on two cores that
is a third of the time of a forward over a few tokens (benchmarks/forward.py).
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = 8  # tokens the layout is chosen for; it serves one as well as hundreds

# What torch.compile sees of a packed layer: its plain weight, which leads to the packed one. That has no strides of which a
# graph could speak, and a graph that held it could not be kept on disk.
_OPERATORS = torch.library.Library("slipstream", "FRAGMENT")
_OPERATORS.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_OPERATORS.define("packed_linears(Tensor x, Tensor[] weights) -> Tensor")
_Key = tuple[int, int]  # address and rows of a plain weight
_PACKED: dict[_Key, tuple[Tensor, Tensor]] = {}  # plain and packed; while the plain one is held, its address is its own
_JOINED: dict[tuple[_Key, ...], Tensor] = {}  # of several layers, packed


def _key(weight: Tensor) -> _Key:
    return weight.data_ptr(), weight.shape[0]


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = _PACKED.get(_key(weight))
    if known is None:  # it was cast or moved since
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, known[1], bias, "none", [], "")


def _like_packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _packed_linears(x: Tensor, weights: list[Tensor]) -> Tensor:
    key = tuple(map(_key, weights))
    if key not in _JOINED:
        if not all(part in _PACKED for part in key):
            return torch.cat([linear(x, weight) for weight in weights], -1)
        _JOINED[key] = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), _ROWS)
    return torch.ops.mkldnn._linear_pointwise(x, _JOINED[key], None, "none", [], "")


def like_packed_linears(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The shape of what several packed layers make of x."""
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _forget(key: _Key) -> None:
    _PACKED.pop(key, None)
    for joined in list(_JOINED):
        if key in joined:
            _JOINED.pop(joined, None)


_OPERATORS.impl("packed_linear", _packed_linear, "CPU")
_OPERATORS.impl("packed_linear", _like_packed_linear, "Meta")
_OPERATORS.impl("packed_linears", _packed_linears, "CPU")
_OPERATORS.impl("packed_linears", like_packed_linears, "Meta")


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
        if not self.packing.on or x.dtype != torch.bfloat16 or not x.is_cpu:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return torch.ops.slipstream.packed_linear(x, self.weight, self.bias)
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
            _PACKED[_key(layer.weight)] = layer.weight.detach(), packed
            weakref.finalize(layer, _forget, _key(layer.weight))
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
