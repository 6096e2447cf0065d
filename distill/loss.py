"""The head's loss in chunks of rows: [rows, V] logits never exist for all rows, nor for all unroll steps, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.distill.objectives import Teacher

if TYPE_CHECKING:
    from collections.abc import Callable

    from slipstream.distill.draft import DraftHead
    from slipstream.distill.relaxation import Relaxation

CHUNK = 128  # rows; 128 x 8192 fp32 values stay in a CPU's cache
TEACHER_CHUNK = 64  # rows, of the target's whole vocabulary


def teacher_from_logits(
    logits: Tensor, vocabulary: Tensor, membership: Tensor, relaxation: Relaxation | None = None
) -> Teacher:
    """The teacher at R rows from target logits [R, V], draft vocabulary ids [Vd] and membership mask [V].

    With a relaxed rule it says which tokens that would accept.
    """
    inside = torch.empty(len(logits), len(vocabulary), device=logits.device)
    argmax = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    buffer = torch.empty(TEACHER_CHUNK, logits.shape[-1], device=logits.device)
    for start in range(0, len(logits), TEACHER_CHUNK):
        at = slice(start, start + TEACHER_CHUNK)
        chunk = buffer[: len(logits[at])].copy_(logits[at])
        top, argmax[at] = chunk.max(-1)  # on a CPU faster than argmax
        chunk.sub_(top[:, None]).exp_()
        inside[at] = chunk.index_select(1, vocabulary).div_(chunk.sum(-1, keepdim=True))
    if relaxation is None:
        return Teacher(inside, argmax, membership[argmax])
    tokens = relaxation.acceptable(logits)
    place = membership.long().cumsum(0) - 1  # of a target token in the draft vocabulary, whose ids ascend
    known = (tokens >= 0) & membership[tokens.clamp(min=0)]
    return Teacher(inside, argmax, membership[argmax], place[tokens.clamp(min=0)].where(known, -1))


class _ChunkedLoss(torch.autograd.Function):
    """Sum of an objective over rows; gradients are made chunk by chunk on the way forward (as Liger's fused losses)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output: Tensor,
        teacher: Teacher,
        rows: Tensor,
        counted: Tensor,
        objective: Callable[[Tensor, Teacher], Tensor],
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:2])
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
        x, weight = hidden.to(dtype), output.to(dtype)
        total = torch.zeros((), device=hidden.device)
        guess = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        grads = [
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, output), ctx.needs_input_grad, strict=False)
        ]
        for start in range(0, len(hidden), CHUNK):
            at = slice(start, start + CHUNK)
            logits = torch.mm(x[at], weight.T)
            guess[at] = logits.max(-1).indices
            with torch.set_grad_enabled(wanted):
                logits.requires_grad_(wanted)
                loss = objective(logits, teacher.take(rows[at])).where(counted[at], 0.0).sum()
            if wanted:
                (slope,) = torch.autograd.grad(loss, logits)
                if grads[0] is not None:
                    grads[0][at] = torch.mm(slope, weight)
                if grads[1] is not None:
                    grads[1].add_(torch.mm(slope.T, x[at]))
            total += loss.detach()
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(guess)
        return total, guess

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(g if g is None else g * grad for g in ctx.saved_tensors), None, None, None, None)


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
        head: Its output norm and matrix are applied here.
        hidden: Recurrent features, [R, H].
        teacher: The target's distributions, of T positions.
        rows: Which of the T belongs to each row, [R].
        counted: Rows that count in the loss, bool [R].
        objective: Gives one value per row.

    Returns:
        The summed loss (scalar, differentiable) and the top draft-vocabulary index of every row, [R].
    """
    total, guess = _ChunkedLoss.apply(head.normed(hidden), head.lm_head.weight, teacher, rows, counted, objective)
    return total, guess
