"""When a token may pass for the target's top one: the one definition that verifier and training share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near

if TYPE_CHECKING:
    from collections.abc import Iterable

    from slipstream.configs.recipe import DistillSettings
    from slipstream.distill.target import Target

SIGNALS = ("ratio", "margin", "odds")


def near_top(signal: str, threshold: float, top: Tensor, judged: Tensor) -> Tensor:
    """Whether a token passes for the top one, by their logits (MARS, arXiv 2601.15498; never by ratio where top <= 0).

    Args:
        signal: `ratio` z2 / z1, `margin` z1 - z2 in nats, or `odds` p2 / p1.
        threshold: Of the signal.
        top: Logits of the top token, of any shape.
        judged: Logits of the other one, of the same shape.
    """
    if signal == "ratio":
        return (top > 0) & (judged > threshold * top)
    if signal == "margin":
        return top - judged <= threshold
    return torch.exp(judged - top) >= threshold


def never_relaxed(target: Target, stops: Iterable[int]) -> list[int]:
    """Tokens that neither pass for another nor are passed over: those that end a text, and special ones."""
    special = [] if target.tokenizer is None else target.tokenizer.all_special_ids
    return sorted({*stops, *special})


@dataclass(frozen=True)
class Relaxation:
    """The rule that a head is trained for: the target's top token, and its runner-up where this lets it pass.

    Attributes:
        signal: `ratio`, `margin` or `odds`.
        threshold: Of the signal.
        never: Tokens that are never relaxed, of `never_relaxed`.
    """

    signal: str
    threshold: float
    never: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: DistillSettings, target: Target) -> Relaxation:
        """The rule of a recipe, for a target.

        Raises:
            SlipstreamError: If its signal is unknown.
        """
        if settings.relaxed_signal not in SIGNALS:
            raise SlipstreamError(
                f"unknown distill.relaxed_signal {settings.relaxed_signal!r}{near(settings.relaxed_signal, SIGNALS)}"
            )
        return cls(settings.relaxed_signal, settings.relaxed_threshold, tuple(never_relaxed(target, target.stop_ids())))

    def acceptable(self, logits: Tensor) -> Tensor:
        """Tokens that would be accepted after target logits [R, V]: the top one and the runner-up or -1, [R, 2]."""
        best = logits.topk(2)
        passes = near_top(self.signal, self.threshold, *best.values.float().unbind(-1))
        passes &= ~torch.isin(best.indices, best.indices.new_tensor(self.never)).any(-1)
        return torch.stack([best.indices[:, 0], best.indices[:, 1].where(passes, -1)], -1)
