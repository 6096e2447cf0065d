"""What the head is asked to match. Every objective gives one value per row; the trainer masks, weighs and reduces.

All take draft logits over the draft vocabulary [R, Vd] and the target's distribution: `renormalised` over the draft
vocabulary [R, Vd] for the KL, `inside` (the unmasked p at the draft vocabulary, summing to at most 1) for TV and LK.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_BRANCHES = 4  # children a tree expands of a node
_NEVER = -1e4  # finite: infinities would make gradients of rows that do not count NaN


@dataclass(frozen=True)
class Teacher:
    """The target's distribution at R rows, seen from the draft vocabulary.

    Attributes:
        inside: p at the draft vocabulary's tokens, [R, Vd].
        argmax: The target's top token over the full vocabulary, [R].
        covered: Whether that token is in the draft vocabulary, [R].
        acceptable: What a relaxed rule would accept, top token first, as indices of the draft vocabulary, [R, 2]; -1 where
            there is none. None where no rule was given.
    """

    inside: Tensor
    argmax: Tensor
    covered: Tensor
    acceptable: Tensor | None = None

    @property
    def renormalised(self) -> Tensor:
        """p restricted to the draft vocabulary and renormalised, [R, Vd]."""
        return self.inside / self.inside.sum(-1, keepdim=True).clamp(min=1e-9)

    def take(self, rows: Tensor) -> Teacher:
        """The teacher at some of its rows, [R], in fp32."""
        acceptable = None if self.acceptable is None else self.acceptable[rows]
        return Teacher(self.inside.index_select(0, rows).float(), self.argmax[rows], self.covered[rows], acceptable)


def _kl(log_q: Tensor, teacher: Teacher) -> Tensor:
    return -(teacher.inside * log_q).sum(-1) / teacher.inside.sum(-1).clamp(min=1e-9)


def _tv(log_q: Tensor, teacher: Teacher) -> Tensor:
    """Half the L1 distance; what p has outside the draft vocabulary counts. Cheaper than a sum of minima, on a CPU."""
    return 0.5 * ((teacher.inside - log_q.exp()).abs().sum(-1) + 1 - teacher.inside.sum(-1))


def forward_kl(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """Soft cross-entropy `-sum p log q` on the renormalised draft vocabulary (EAGLE-3), [R]."""
    return _kl(torch.log_softmax(draft_logits.float(), -1), teacher)


def overlap(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`alpha = sum min(p, q)` with the unmasked p: the chance that a sampled draft token is accepted, [R]."""
    return torch.minimum(teacher.inside, torch.softmax(draft_logits.float(), -1)).sum(-1)


def total_variation(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`1 - sum min(p, q)`, [R]. Alone it fails from scratch."""
    return _tv(torch.log_softmax(draft_logits.float(), -1), teacher)


def lk_alpha(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`-log alpha` (LK losses, arXiv 2602.23881), [R]."""
    return -overlap(draft_logits, teacher).clamp(min=1e-9).log()


def lk_lambda(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`lam KL + (1 - lam) TV` with `lam = exp(-3 sg[alpha])` per row (LK losses, arXiv 2602.23881), [R]."""
    log_q = torch.log_softmax(draft_logits.float(), -1)
    tv = _tv(log_q, teacher)
    lam = torch.exp(-3 * (1 - tv.detach()))
    return lam * _kl(log_q, teacher) + (1 - lam) * tv


def top_k(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`-sum p log q` over the ten likeliest tokens of p (HASS, arXiv 2408.15766), [R]."""
    p, at = teacher.inside.topk(min(10, teacher.inside.shape[-1]), dim=-1)
    return -(p * torch.log_softmax(draft_logits.float(), -1).gather(-1, at)).sum(-1)


def _at_acceptable(values: Tensor, teacher: Teacher) -> Tensor:
    """Values [R, Vd] at the tokens a relaxed rule would accept, [R, 2]; very low where there is none."""
    if teacher.acceptable is None:
        raise ValueError("margin-aware objectives need a teacher that was told the relaxed rule")
    return values.gather(-1, teacher.acceptable.clamp(min=0)).masked_fill(teacher.acceptable < 0, _NEVER)


def margin_mass(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`-log q(R)`, R the tokens that the relaxed rule would accept: the top one, and the runner-up where it passes, [R].

    Ours; judged against plain KL at the same budget in docs/benchmarks.md. As under every objective, rows whose top token
    is not in the draft vocabulary do not count.
    """
    log_q = torch.log_softmax(draft_logits.float(), -1)
    return -_at_acceptable(log_q, teacher).logsumexp(-1)


def lk_margin(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """`lam KL + (1 - lam) (-log q(R))` with `lam = exp(-3 sg[q(R)])` per row: `margin_mass` on the LK schedule, [R]."""
    log_q = torch.log_softmax(draft_logits.float(), -1)
    mass = _at_acceptable(log_q, teacher).logsumexp(-1)
    lam = torch.exp(-3 * mass.detach().exp())
    return lam * _kl(log_q, teacher) - (1 - lam) * mass


def tree_hinge(draft_logits: Tensor, teacher: Teacher) -> Tensor:
    """By how much the best token of R falls short of the draft's fourth likeliest plus 1 nat, what a tree expands, [R]."""
    logits = draft_logits.float()
    last = logits.topk(min(_BRANCHES, logits.shape[-1]), dim=-1).values[:, -1]
    return (1 + last - _at_acceptable(logits, teacher).amax(-1)).clamp(min=0)


def weighted(weights: Mapping[str, float]) -> Callable[[Tensor, Teacher], Tensor]:
    """The sum of named objectives, each at its weight.

    Raises:
        SlipstreamError: If one is unknown.
    """
    for name in weights:
        if name not in OBJECTIVES:
            raise SlipstreamError(f"unknown objective {name!r}{near(name, OBJECTIVES)}")
    parts = [(OBJECTIVES[name], weight) for name, weight in weights.items()]
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return lambda logits, teacher: torch.stack([weight * part(logits, teacher) for part, weight in parts]).sum(0)


MARGIN_AWARE = ("margin_mass", "lk_margin", "tree_hinge")
"""Those that need to know the relaxed rule."""

OBJECTIVES: dict[str, Callable[[Tensor, Teacher], Tensor]] = {
    "forward_kl": forward_kl,
    "total_variation": total_variation,
    "lk_alpha": lk_alpha,
    "lk_lambda": lk_lambda,
    "top_k": top_k,
    "margin_mass": margin_mass,
    "lk_margin": lk_margin,
    "tree_hinge": tree_hinge,
}
