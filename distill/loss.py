"""The head's loss in chunks of rows: [rows, V] logits never exist for all rows, nor for all unroll steps, at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slipstream.distill.largest import Largest
from slipstream.distill.objectives import Teacher, forward_kl

if TYPE_CHECKING:
    from collections.abc import Callable

    from slipstream.distill.draft import DraftHead
    from slipstream.distill.relaxation import Relaxation

PART = 1024
TEACHER_GROUP = 8  # chunks whose logits the target's output layer gives at once


class Sizes(NamedTuple):
    """How much is computed at once.

    Attributes:
        chunk: Logits of the draft that are compared with the teacher, in fp32.
        group: Rows whose logits are made, and whose slopes become gradients, together: to read and to add to a matrix as
            large as lm_head is not free.
        teacher: Logits of the target, in fp32.
    """

    chunk: int
    group: int
    teacher: int


def sizes(device: str) -> Sizes:
    """On a CPU what stays in its cache in fp32; elsewhere more, as every chunk is a dozen launches."""
    return Sizes(2**20, 1024, 3 * 2**20) if device == "cpu" else Sizes(2**26, 4096, 2**26)


def part_size(vocabulary: int, device: str) -> int:
    """Rows of lm_head whose gradients are made at once: on a CPU they stay in its cache until they are added up."""
    return min(PART, vocabulary) if device == "cpu" else vocabulary


def teach(
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    vocabulary: Tensor,
    membership: Tensor,
    relaxation: Relaxation | None = None,
) -> Teacher:
    """The teacher at R rows. With a relaxed rule it says which tokens that would accept.

    Args:
        logits: Of the target, [r, V], behind its last hidden states [r, Ht].
        hidden: Those states, [R, Ht].
        vocabulary: The draft vocabulary's ids, [Vd].
        membership: Which tokens are in it, bool [V].
        relaxation: The rule.
    """
    inside = hidden.new_empty(len(hidden), len(vocabulary))  # as exact as the logits are
    argmax = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    tokens = torch.empty(len(hidden), 2, dtype=torch.long, device=hidden.device)
    rows = max(1, min(len(hidden), sizes(hidden.device.type).teacher // len(membership)))
    buffer = torch.empty(rows, len(membership), device=hidden.device)
    for first in range(0, len(hidden), TEACHER_GROUP * rows):
        group = logits(hidden[first : first + TEACHER_GROUP * rows])
        if relaxation is not None:
            tokens[first : first + len(group)] = relaxation.acceptable(group)
        for start in range(0, len(group), rows):
            chunk = buffer[: len(group) - start].copy_(group[start : start + rows])
            at = slice(first + start, first + start + len(chunk))
            top, argmax[at] = Largest(chunk).first()
            chunk.sub_(top[:, None]).exp_()
            torch.div(chunk.index_select(1, vocabulary), chunk.sum(-1, keepdim=True), out=inside[at])
    if relaxation is None:
        return Teacher(inside, argmax, membership[argmax])
    place = membership.long().cumsum(0) - 1  # of a target token in the draft vocabulary, whose ids ascend
    known = (tokens >= 0) & membership[tokens.clamp(min=0)]
    return Teacher(inside, argmax, membership[argmax], place[tokens.clamp(min=0)].where(known, -1))


class _Autograd:
    """Any objective at a chunk of rows, and its slopes by autograd.

    Args:
        teacher: Of T positions.
        objective: Gives one value per row.
    """

    def __init__(self, teacher: Teacher, objective: Callable[[Tensor, Teacher], Tensor]) -> None:
        self._teacher = teacher
        self._objective = objective

    def __call__(self, logits: Tensor, top: Tensor, place: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
        """Values of the objective, [r].

        Args:
            logits: Of the draft, [r, Vd]; unless `scale` is None, the slopes of the weighted sum come in their place.
            top: The largest of each row, [r].
            place: And where it stands, [r].
            rows: Whose teacher is each row's, [r].
            scale: Weights of the rows, [r]; 0 where one does not count.
        """
        asked = self._teacher.take(rows)
        if scale is None:
            return self._objective(logits, asked)
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._objective(leaf, asked)
            scaled = (loss * scale).where(scale > 0, 0.0).sum()
        (slopes,) = torch.autograd.grad(scaled, leaf)
        logits.copy_(slopes)
        return loss.detach()


class _ForwardKL(_Autograd):
    """`forward_kl` with the slopes written out, q - p: a few passes over numbers in memory that is taken once.

    Args:
        teacher: Of T positions.
        size: Rows of a chunk, at most.
    """

    def __init__(self, teacher: Teacher, size: int) -> None:
        super().__init__(teacher, forward_kl)
        vocabulary, device = teacher.inside.shape[1], teacher.inside.device
        self._scratch = torch.empty(3, size, vocabulary, dtype=torch.float32, device=device)

    def __call__(self, logits: Tensor, top: Tensor, place: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
        p, q, z = self._scratch[:, : len(rows)]
        p.copy_(self._teacher.inside.index_select(0, rows))
        z.copy_(logits)
        torch.softmax(z, -1, out=q)
        likeliest, inside = q.gather(-1, place[:, None]).squeeze(-1), p.sum(-1)
        mass = inside.clamp(min=1e-9)
        share = inside / mass  # 0 where the whole of p lies outside
        loss = share * (top.float() - likeliest.log()) - z.mul_(p).sum(-1) / mass
        if scale is not None:
            slopes = q.mul_((scale * share)[:, None]).addcmul_(p, (scale / mass)[:, None], value=-1)
            logits.copy_(slopes)
        return loss


class _ChunkedLoss(torch.autograd.Function):
    """An objective over rows; gradients are made chunk by chunk on the way forward (as Liger's fused losses)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        output: Tensor,
        teacher: Teacher,
        rows: Tensor,
        scale: Tensor,
        objective: Callable[[Tensor, Teacher], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:2])
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
        x, weight = hidden.to(dtype), output.to(dtype)
        losses = torch.empty(len(hidden), device=hidden.device)
        guess = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        ctx.grads = [
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, output), ctx.needs_input_grad, strict=False)
        ]
        chunk, most, _ = sizes(kind)
        buffer = torch.empty(min(most, len(x)), len(weight), dtype=dtype, device=x.device)  # of logits, then of slopes
        size, share = max(1, min(chunk // len(weight), len(buffer))), part_size(len(weight), kind)
        compare = _ForwardKL(teacher, size) if objective is forward_kl else _Autograd(teacher, objective)
        for first in range(0, len(x), most):
            group = x[first : first + most]
            slopes = torch.mm(group, weight.T, out=buffer[: len(group)])
            for start in range(0, len(group), size):
                at = slice(first + start, first + min(start + size, len(group)))
                logits = slopes[start : start + size]
                top, guess[at] = Largest(logits).first()
                losses[at] = compare(logits, top, guess[at], rows[at], scale[at] if wanted else None)
            if ctx.grads[0] is not None:
                ctx.grads[0][first : first + len(group)] = torch.mm(slopes, weight)
            if ctx.grads[1] is not None:
                for start in range(0, len(weight), share):
                    part = slice(start, start + share)
                    ctx.grads[1][part] += torch.mm(slopes[:, part].T, group)
        losses.masked_fill_(scale == 0, 0.0)
        ctx.mark_non_differentiable(losses, guess)
        return (losses * scale).sum(), losses, guess

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None  # whose they become need not copy them
        return (*(g if g is None else g.mul_(grad) for g in grads), None, None, None, None)


def head_loss(
    head: DraftHead,
    hidden: Tensor,
    teacher: Teacher,
    rows: Tensor,
    scale: Tensor,
    objective: Callable[[Tensor, Teacher], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of `objective` over rows, and the head's top token of every row.

    Args:
        head: Its output norm and matrix are applied here.
        hidden: Recurrent features, [R, H].
        teacher: The target's distributions, of T positions.
        rows: Which of the T belongs to each row, [R].
        scale: Weights of the rows, [R]; 0 where one does not count.
        objective: Gives one value per row.

    Returns:
        The sum (scalar, differentiable), every row's own value ([R], 0 where it does not count), and the top
        draft-vocabulary index of every row, [R].
    """
    total, losses, guess = _ChunkedLoss.apply(head.normed(hidden), head.lm_head.weight, teacher, rows, scale, objective)
    return total, losses, guess
