"""Forwards through `torch.compile`: on a CPU one graph for all sizes, on a card one for each of a few, run as CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64)
"""Tokens of a static forward: each size has a graph of its own, so that few shall occur."""

_GRAPHS = 64  # of one function: one per size of tree and of cache


def require_compiler(device: torch.device) -> None:
    """Make sure that something can be compiled for a device.

    Raises:
        SlipstreamError: If nothing can: on a CPU that takes a C++ compiler with Python's headers.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever goes wrong in a tool chain: no compiler, no headers, no OpenMP
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A compiler's own words stand below its command line.
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
        raise SlipstreamError(f"nothing can be compiled for {device} here, decode without: {reason}") from error


@dataclass(frozen=True)
class Compilation:
    """How forwards of a few tokens over a cache are compiled.

    Attributes:
        static: Whether every shape has a graph of its own, as CUDA graphs must; the head's forwards are compiled as well.
            Otherwise one graph of the target serves trees and caches of all sizes, and is kept on disk for the next
            process. (A head is too small on a CPU: its graphs took as long as its eager forwards.)
    """

    static: bool

    @classmethod
    def on(cls, device: torch.device) -> Compilation:
        """The way that is the faster one on a device."""
        return cls(device.type != "cpu")

    def size(self, tokens: int, most: int = 0) -> int:
        """Tokens to which a forward is filled up, `most` being what is to be expected of the next ones.

        A static one to the least of `SIZES` that holds them, if any does.
        """
        if not self.static:
            return max(2, tokens)  # of a single token torch would make a graph apart
        wanted = max(tokens, most)
        return next((n for n in SIZES if n >= wanted), wanted)

    def vary(self, x: Tensor, *dims: int) -> None:
        """Say that these dimensions of an input are other ones in other calls."""
        if not self.static:
            torch._dynamo.maybe_mark_dynamic(x, list(dims))

    def apply(self, method: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """A method, compiled for an object whose weights stay as they are.

        As CUDA graphs it writes in place to tensors marked by `TreeCache.mark_static` only, and its outputs lie in memory
        that the next call of any compiled function takes again: what is needed longer has to be copied.
        """
        # Guarding each module on every call would cost a tenth of a small forward.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        function = _apart(method)
        # Beyond the limit, 8 by default, torch would go on without compiling and say so in a log only.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        if not self.static:
            from slipstream.distill.joining import JoinSiblings  # inductor imports slowly

            return torch.compile(function, options={**options, "post_grad_custom_pre_pass": JoinSiblings()})
        if device.type == "cuda":
            options["triton.cudagraphs"] = True
        return torch.compile(function, dynamic=False, options=options)


STATIC = Compilation(static=True)


def _apart(method: Callable[..., Any]) -> MethodType:
    """The same with code of its own: torch keeps graphs by code, and without guards gives one model's to another."""
    assert isinstance(method, MethodType)
    inner = method.__func__
    own = FunctionType(
        inner.__code__.replace(), inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__
    )
    return MethodType(own, method.__self__)
