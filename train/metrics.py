"""Training metrics as sums and counts, divided once, after all ranks are added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from slipstream.distill.unroll import Unrolled


class Metrics:
    """Sums over the micro-batches since the last row.

    Attributes:
        tokens: Padded tokens this process has run.
        norm: Gradient norm of the last step, before clipping.
    """

    def __init__(self, steps: int) -> None:
        self.loss = torch.zeros(2)
        self.hits = torch.zeros(steps)
        self.tried = torch.zeros(1)
        self.tokens = 0
        self.norm = 0.0

    def add(self, out: Unrolled, weights: Tensor) -> None:
        """Add a micro-batch; `weights` are its unroll steps', [K] or fewer: what was not unrolled counts as a miss."""
        pair = torch.stack([(out.loss * weights).sum(), (out.rows * weights).sum()])
        self.loss += pair.cpu()
        self.hits[: len(out.hits)] += out.hits.cpu()
        self.tried += out.tried.cpu()

    def row(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The metric row of all processes, whose sums `add_up` adds up.

        `accuracy` is conditional on the prefix surviving; the simulated acceptance length is
        `1 + sum_k P(prefix survives step k)`, from joint prefix hits.
        """
        packed = torch.cat([self.loss, self.hits, self.tried, torch.tensor([float(self.tokens)])])
        packed = add_up(packed).cpu()
        hits, tried = packed[2:-2], packed[-2].clamp(min=1)
        before = torch.cat([tried[None], hits[:-1]]).clamp(min=1)
        return {
            "tokens": int(packed[-1]),
            "loss": float(packed[0] / packed[1].clamp(min=1e-9)),
            "accuracy": [round(v, 4) for v in (hits / before).tolist()],
            "simulated_acceptance_length": 1 + float((hits / tried).sum()),
            "grad_norm": self.norm,
        }
