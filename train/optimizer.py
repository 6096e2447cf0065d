"""AdamW over the head, warm-up and cosine over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from slipstream.configs.recipe import TrainSettings


def make_optimizer(head: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over every trainable weight."""
    weights = [p for p in head.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        weights, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Rate of step 0 .. total-1: linear warm-up, then a cosine down to 2 % of the peak."""
    warm = max(1, round(total * settings.warmup))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
