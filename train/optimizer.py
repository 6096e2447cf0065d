"""What moves the weights: AdamW, or Muon for the matrices inside the head; warm-up and cosine over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from slipstream.configs.recipe import TrainSettings


BESIDE = 0.2  # AdamW's rate beside Muon's: an update of Muon has this size at a rate of 1, AdamW's first ones 1


def make_optimizers(head: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """One optimizer, or two: with `muon`, matrices other than the output layer go to Muon, the rest to AdamW.

    Muon's update is scaled to what AdamW's typically is late in a training (`match_rms_adamw`, Moonlight, arXiv
    2502.16982). A head's training is short: there AdamW's updates are larger, and beside Muon it has a rate of `BESIDE` of the
    peak.
    """
    weights = {name: p for name, p in head.named_parameters() if p.requires_grad}
    inner = {n for n, p in weights.items() if p.ndim == 2 and "lm_head" not in n.split(".")}
    matrices = [p for n, p in weights.items() if n in inner and settings.optimizer == "muon"]
    rest = [p for n, p in weights.items() if n not in inner or settings.optimizer == "adamw"]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        rate = BESIDE * rate if matrices else rate
        optimizers.append(torch.optim.AdamW(rest, lr=rate, betas=settings.betas, weight_decay=decay, fused=True))
    return optimizers


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Rate of step 0 .. total-1: linear warm-up, then a cosine down to 2 % of the peak."""
    warm = max(1, round(total * settings.warmup))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
