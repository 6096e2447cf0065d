"""The head's loss in chunks of rows: [rows, V] logits never exist for all rows, nor for all unroll steps, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.distill.objectives import Teacher

if TYPE_CHECKING:
    from collections.abc import Callable

    from slipstream.distill.draft import DraftHead

_CHUNK = 128  # rows; 128 x 8192 fp32 values stay in a CPU's cache


def teacher_from_logits(logits: Tensor, vocabulary: Tensor, membership: Tensor) -> Teacher:
    """The teacher at R rows from target logits [R, V], draft vocabulary ids [Vd] and membership mask [V]."""
    inside = torch.empty(len(logits), len(vocabulary), device=logits.device)
    argmax = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for start in range(0, len(logits), _CHUNK):
        rows = slice(start, start + _CHUNK)
        chunk = logits[rows].float()
        argmax[rows] = chunk.max(-1).indices  # on a CPU faster than argmax
        inside[rows] = (chunk[:, vocabulary] - chunk.logsumexp(-1, keepdim=True)).exp()
    return Teacher(inside, argmax, membership[argmax])


class _ChunkedLoss(torch.autograd.Function):
    """Sum of an objective over rows; gradients are made chunk by chunk on the way forward (as Liger's fused losses)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Tensor,
        output: Tensor,
        head: DraftHead,
        teacher: Teacher,
        rows: Tensor,
        counted: Tensor,
        objective: Callable[[Tensor, Teacher], Tensor],
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), device=hidden.device)
        guess = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        grads = [torch.zeros_like(x) for x in (hidden, norm, output)] if wanted else []
        for start in range(0, len(hidden), _CHUNK):
            at = slice(start, start + _CHUNK)
            with torch.set_grad_enabled(wanted):
                piece = hidden[at].detach().requires_grad_(wanted)
                logits = head.logits(piece)
                values = objective(logits, teacher.take(rows[at]))
                loss = values.where(counted[at], 0.0).sum()
            if wanted:
                parts = torch.autograd.grad(loss, (piece, norm, output))
                grads[0][at] = parts[0]
                grads[1].add_(parts[1])
                grads[2].add_(parts[2])
            total += loss.detach()
            guess[at] = logits.detach().max(-1).indices
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(guess)
        return total, guess

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(g * grad for g in ctx.saved_tensors), None, None, None, None, None)


def head_loss(
    head: DraftHead,
    hidden: Tensor,
    teacher: Teacher,
    rows: Tensor,
    counted: Tensor,
    objective: Callable[[Tensor, Teacher], Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum of `objective` over the counted rows, and the head's top token of every row.

    Args:
        head: Its `norm` and `lm_head` are applied here.
        hidden: Recurrent features, [R, H].
        teacher: The target's distributions, of T positions.
        rows: Which of the T belongs to each row, [R].
        counted: Rows that count in the loss, bool [R].
        objective: Gives one value per row.

    Returns:
        The summed loss (scalar, differentiable) and the top draft-vocabulary index of every row, [R].
    """
    total, guess = _ChunkedLoss.apply(
        hidden, head.norm.weight, head.lm_head.weight, head, teacher, rows, counted, objective
    )
    return total, guess
