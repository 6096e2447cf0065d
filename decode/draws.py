"""Random numbers that belong to a row, not to the batch it happens to be in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def uniforms(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers below 1, [B, ..] = `shape`; from each row's own generator, or from the one there is for all."""
    if len(generators) == 1:
        return torch.rand(shape, generator=generators[0], device=device)
    return torch.stack([torch.rand(shape[1:], generator=g, device=device) for g in generators])


def draw(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per node from p [B, N, V], by inverting its distribution function; NaN does not stop it."""
    heights = p.double().cumsum(-1)
    at = uniforms(generators, p.shape[:2], p.device).double()[..., None] * heights[..., -1:]
    return torch.searchsorted(heights, at, right=True)[..., 0].clamp(max=p.shape[-1] - 1)
