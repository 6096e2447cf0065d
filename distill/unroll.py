"""Training-time test: the head is unrolled over its own features, with the true tokens, as it will be when drafting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, smooth_l1_loss

from slipstream.configs.errors import SlipstreamError
from slipstream.data.batches import MULTIPLE
from slipstream.distill.attention import UnrollAttention
from slipstream.distill.loss import head_loss, teach
from slipstream.distill.objectives import MARGIN_AWARE, weighted
from slipstream.distill.relaxation import Relaxation

if TYPE_CHECKING:
    from collections.abc import Callable

    from slipstream.configs.recipe import DistillSettings
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.objectives import Teacher
    from slipstream.distill.target import Captured, Target


@dataclass(frozen=True)
class Unrolled:
    """Sums over the rows of one batch, per unroll step; divide after adding up ranks and micro-batches.

    Attributes:
        total: The objective summed over all rows that count, each step at its weight: a scalar, differentiable.
        loss: Summed objective over rows that count, without gradients, [K].
        rows: Rows that counted in the loss, [K].
        hits: Rows where the draft's top token was the target's and every earlier step hit too, [K].
        tried: Rows with K labels, which the hits are over, a scalar.
        accepted: Draft tokens a chain of K started at each row would keep, [R]; rows in the order of [B, L].
        positions: Where those rows stand: (row of the batch, position), each [R].
    """

    total: Tensor
    loss: Tensor
    rows: Tensor
    hits: Tensor
    tried: Tensor
    accepted: Tensor
    positions: tuple[Tensor, Tensor]


def _labelled(mask: Tensor, starts: Tensor | None, steps: int) -> Tensor:
    """Rows that predict an assistant token of their own conversation, at an unroll step and at the first, bool [K, B, L].

    The mask belongs to the predicted token: at step k row p predicts token p+2+k. Worked example: mask 0 0 0 1 1 (tokens 3
    and 4 are the assistant's) makes rows 1 and 2 count at step 0, and row 1 is the first draft after the prompt.
    """
    rows = torch.stack([_shift(mask, 2 + k) for k in range(steps)])
    if starts is not None:
        rows &= torch.stack([_shift(starts, 2 + k) == starts for k in range(steps)])
    return rows & rows[0]


def unroll(
    head: DraftHead,
    target: Target,
    input_ids: Tensor,
    mask: Tensor,
    *,
    scale: Tensor,
    objective: Callable[[Tensor, Teacher], Tensor],
    noise: float = 0.0,
    feature_weight: float = 0.0,
    relaxation: Relaxation | None = None,
    captured: Captured | None = None,
    generator: torch.Generator | None = None,
    starts: Tensor | None = None,
) -> Unrolled:
    """Run the target and K draft steps over one batch of whole conversations.

    Step k of row p reads the embedding of token p+1+k (a `parallel` head reads its mask for k > 0) and is judged by the
    target's distribution for token p+2+k.

    Args:
        head: The head in training.
        target: The frozen target.
        input_ids: [B, L], padded on the right, or several conversations in one row.
        mask: Bool [B, L], the assistant's tokens; False on padding.
        scale: Weights of the steps, [K].
        objective: Gives one value per row.
        noise: Width of uniform noise on the features (EAGLE-1).
        feature_weight: Of the distance between the head's normed output and the target's last hidden state for the same
            token (EAGLE-1's SmoothL1, in units of that state's size), added to the objective.
        relaxation: The rule that margin-aware objectives are for.
        captured: The target's features and hidden states of this batch; None runs the target.
        generator: Of the noise.
        starts: Where each token's conversation begins in that row, [1, L]; None where every row is one.
    """
    head.borrow(target)
    steps, (batch, length) = len(scale), input_ids.shape
    device = input_ids.device
    valid = _labelled(mask, starts, steps).flatten(1)
    rows = _filled_up(valid[0]).nonzero().squeeze(1)
    valid = valid[:, rows]  # [K, R], as all that follows
    known = valid[0].nonzero().squeeze(1)
    # Teacher rows: token p+2+k is predicted by the target's logits at p+1+k, for all k.
    at = torch.arange(length, device=device) - (0 if starts is None else starts)  # [L], or [1, L]
    needed = torch.zeros(batch, length, dtype=torch.bool, device=device)
    needed[:, :-1] = mask[:, 1:]
    captured = captured or target.capture(input_ids, starts)
    states = captured.hidden[needed]
    with torch.autocast(device.type, enabled=False):  # the teacher has the target's own precision
        teacher = teach(target.logits, states, head.vocabulary(), head.t2d, relaxation)
    index = torch.full((batch, length), -1, device=device)
    index[needed] = torch.arange(len(teacher.argmax), device=device)  # where token position's teacher lies

    features = _noised(captured.features.to(head.fc.weight.dtype), noise, generator)
    embedded = head.embed(target.embeddings(input_ids).to(device))
    hidden = head.fuse(features).to(embedded.dtype)  # under autocast too the residual stream keeps its precision
    row_b, row_p = rows // length, rows % length
    # The token that step k of a row reads, [K, R]; the target's row there predicts the same token as the head's.
    ahead = row_b * length + (row_p + 1 + torch.arange(steps, device=device)[:, None]).clamp(max=length - 1)
    pick = index.flatten()[ahead].where(valid, 0)
    output = drafted(head, embedded, hidden, at.expand(batch, -1), rows, ahead, starts)
    counted = valid & teacher.covered[pick]
    weights = counted * scale[:, None]
    total, losses, guess = head_loss(head, output.flatten(0, 1), teacher, pick.flatten(), weights.flatten(), objective)
    losses = losses.view_as(pick)
    if feature_weight:
        distance = feature_weight * _feature_distance(head.normed(output[counted]), states[pick[counted]])
        total = total + (distance * weights[counted]).sum()
        losses[counted] += distance.detach()
    hits = valid & (head.vocabulary()[guess].view_as(pick) == teacher.argmax[pick])
    survived = hits.cumprod(0)
    lasting = valid.all(0)
    hit = (survived * lasting).sum(1)
    accepted, positions = survived.sum(0)[known], (row_b[known], row_p[known])
    return Unrolled(total, losses.sum(1), counted.sum(1), hit, lasting.sum(), accepted, positions)


def drafted(
    head: DraftHead,
    embedded: Tensor,
    hidden: Tensor,
    position_ids: Tensor,
    rows: Tensor,
    ahead: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Run the head's K steps: the first over all of [B, L], the others at some rows.

    The first step's keys are looked at from other rows too; what later ones make of a row, it alone looks at.

    Args:
        head: The head.
        embedded: Tokens as the head reads them, [B, L, H].
        hidden: Fused features, [B, L, H].
        position_ids: [B, L].
        rows: Those rows, counted through, [R], ascending.
        ahead: The token that step k of a row reads, counted through, [K, R].
        starts: Where each token's conversation begins, [1, L]; None where every row is one.

    Returns:
        The recurrent features at those rows, [K, R, H].
    """
    attend, own = UnrollAttention(starts, rows), position_ids.flatten()[rows][None]
    outputs = [_taken(head(_shift(embedded, 1), hidden, position_ids, attend), rows)]
    for k in range(1, len(ahead)):
        if head.config.kind == "parallel":
            tokens, hidden = head.masks(1, len(rows))
        else:
            tokens, hidden = _taken(embedded, ahead[k]), outputs[-1]
        outputs.append(head(tokens, hidden, own + k, attend))
    return torch.cat(outputs)


def _filled_up(wanted: Tensor) -> Tensor:
    """The rows wanted, bool [n], and as many others as make sizes that come again: a kernel is prepared for each."""
    others = ~wanted
    return wanted | (others & (others.cumsum(0) <= -int(wanted.sum()) % MULTIPLE))


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of x [B, L, H], counted through, as [1, R, H]."""
    return embedding(rows[None], x.flatten(0, 1))


def _noised(features: Tensor, width: float, generator: torch.Generator | None) -> Tensor:
    """Features with uniform noise of a width."""
    if not width:
        return features
    drawn = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
    return features + (drawn - 0.5) * width


def labelled_rows(mask: Tensor, steps: int, starts: Tensor | None = None) -> Tensor:
    """Rows that have a label at each unroll step, of a mask and `starts` as `unroll` takes them, [K]; before it has run.

    The target's top token may lie outside the draft vocabulary in some of them: these add nothing to the loss.
    """
    return _labelled(mask, starts, steps).sum((1, 2))


class Distillation(nn.Module):
    """A head and what it is asked to match, as one module: what a launch wraps and calls once a micro-batch."""

    def __init__(self, head: DraftHead, target: Target, settings: DistillSettings, *, autocast: bool) -> None:
        super().__init__()
        self.head = head
        self.target = target
        self.settings = settings
        if settings.feature_weight and head.config.hidden_size != target.config.hidden_size:
            raise SlipstreamError(
                f"distill.feature_weight compares states of a head of width {head.config.hidden_size} with those of a target "
                f"of {target.config.hidden_size}, which must be equal: leave it out, or leave head.hidden_size out"
            )
        self.objective = weighted(settings.objectives)
        self.relaxation = Relaxation.of(settings, target) if set(settings.objectives) & set(MARGIN_AWARE) else None
        self.autocast = autocast

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        scale: Tensor,
        captured: Captured | None = None,
        generator: torch.Generator | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Unrolled]:
        """`unroll` over as many steps as `scale` [K] has weights: the weighted loss, and its parts without gradients."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            out = unroll(
                self.head,
                self.target,
                input_ids,
                mask,
                scale=scale,
                objective=self.objective,
                noise=self.settings.noise,
                feature_weight=self.settings.feature_weight,
                relaxation=self.relaxation,
                captured=captured,
                generator=generator,
                starts=starts,
            )
        return out.total, replace(out, total=out.total.detach())


def _feature_distance(output: Tensor, aim: Tensor) -> Tensor:
    """SmoothL1 between states [R, H], each in units of its own row of the target's; [R]."""
    size = aim.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return smooth_l1_loss(output.float() / size, aim.float() / size, reduction="none").mean(-1)


def _shift(x: Tensor, by: int) -> Tensor:
    """Row p of the result is row p + `by` of x [B, L, ..]; zeros come in at the end."""
    out = torch.zeros_like(x)
    out[:, : max(0, x.shape[1] - by)] = x[:, by:]
    return out
