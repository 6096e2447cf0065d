"""What the head is asked to match. Every objective gives one value per row; the trainer masks, weighs and reduces.

All take draft logits over the draft vocabulary [R, Vd] and the target's distribution: `renormalised` over the draft
vocabulary [R, Vd] for the KL, `inside` (the unmasked p at the draft vocabulary, summing to at most 1) for TV and LK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Teacher:
    """The target's distribution at R rows, seen from the draft vocabulary.

    Attributes:
        inside: p at the draft vocabulary's tokens, [R, Vd].
        argmax: The target's top token over the full vocabulary, [R].
        covered: Whether that token is in the draft vocabulary, [R].
    """

    inside: Tensor
    argmax: Tensor
    covered: Tensor

    @property
    def renormalised(self) -> Tensor:
        """p restricted to the draft vocabulary and renormalised, [R, Vd]."""
        return self.inside / self.inside.sum(-1, keepdim=True).clamp(min=1e-9)

    def take(self, rows: Tensor) -> Teacher:
        """The teacher at some of its rows."""
        return Teacher(self.inside[rows], self.argmax[rows], self.covered[rows])


def forward_kl(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """Soft cross-entropy `-sum p log q` on the renormalised draft vocabulary (EAGLE-3), [R]."""
    return -(teacher.renormalised * torch.log_softmax(draft_logits.float(), -1)).sum(-1)


def overlap(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`alpha = sum min(p, q)` with the unmasked p: the chance that a sampled draft token is accepted, [R]."""
    return torch.minimum(teacher.inside, torch.softmax(draft_logits.float(), -1)).sum(-1)


def total_variation(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`1 - sum min(p, q)`, [R]. Alone it fails from scratch."""
    return 1 - overlap(draft_logits, teacher)


def lk_alpha(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`-log alpha` (LK losses, arXiv 2602.23881), [R]."""
    return -overlap(draft_logits, teacher).clamp(min=1e-9).log()


def lk_lambda(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`lam KL + (1 - lam) TV` with `lam = exp(-3 sg[alpha])` per row (LK losses, arXiv 2602.23881), [R]."""
    alpha = overlap(draft_logits, teacher)
    lam = torch.exp(-3 * alpha.detach())
    return lam * forward_kl(draft_logits, teacher) + (1 - lam) * (1 - alpha)


OBJECTIVES: dict[str, Callable[[Tensor, Teacher], Tensor]] = {
    "forward_kl": forward_kl,
    "total_variation": total_variation,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
}
