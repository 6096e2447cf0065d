"""What one generation did, in tokens and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


def mark(device: torch.device) -> Any:
    """Now; on a card, the moment at which it will have done what it was told so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(first: Any, last: Any) -> float:
    """Between two marks; a card must have got to the last one."""
    return first.elapsed_time(last) / 1000 if isinstance(first, torch.cuda.Event) else last - first  # type: ignore[no-any-return]


@dataclass
class Stats:
    """Counts and times of one generation.

    Attributes:
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens emitted, the first one (from the prompt's own forward) included.
        accept_lengths: Tokens emitted in each round, the bonus token included.
        nodes: Tokens verified in all rounds.
        relaxed: Tokens accepted by relaxation.
        regret: Sum of their log p(top) - log p(token), nats.
        target_seconds: In the target's forwards, the prompt's included.
        draft_seconds: In the drafter.
        seconds: All of it, without an observer's own.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    accept_lengths: list[int] = field(default_factory=list)
    nodes: int = 0
    relaxed: int = 0
    regret: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    seconds: float = 0.0

    def count(self, drafting: float, verifying: float, nodes: int) -> None:
        """Add a round's seconds in draft and target, and the nodes it verified."""
        self.draft_seconds += drafting
        self.target_seconds += verifying
        self.nodes += nodes

    @property
    def acceptance_length(self) -> float:
        """tau: tokens emitted per round, pooled over rounds; 1.0 before the first round."""
        return sum(self.accept_lengths) / len(self.accept_lengths) if self.accept_lengths else 1.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall time, the prompt's forward included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def rest_seconds(self) -> float:
        """Neither target nor draft: verification, cache, bookkeeping."""
        return self.seconds - self.target_seconds - self.draft_seconds
