"""How sure the target is: the signals that let a runner-up pass, and their distributions along a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.decode.tasks import encode_first
from slipstream.distill.relaxation import near_top

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.decode.evidence import Evidence
    from slipstream.decode.tree import Tree
    from slipstream.distill.target import Target


def fires(
    signal: str,
    threshold: float,
    rank: int,
    tree: Tree,
    evidence: Evidence,
    processed: Evidence | None,
    price: float = 0.0,
) -> Tensor:
    """Whether a node's token may pass in place of what the target decided at its parent, [B, N].

    It must be among the target's `rank` likeliest there, and its gap to the top within the threshold. The top token itself
    (which at T > 0 need not be the one decided on) is judged by the runner-up's gap.

    Args:
        signal: `ratio` or `margin` on raw logits, `odds` after the processors.
        threshold: Of the signal.
        rank: At least 2.
        tree: N nodes per row.
        evidence: Of the raw logits.
        processed: Of those after the processors; None where there are none.
        price: Tokens that a nat of the raw logits must bring, of a token that brings no more than itself.
    """

    def at_parents(z: Evidence, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest logit, the one that is judged beside it, and the `count`-th largest, [B, N] each."""
        best = z.best(count)
        best = best.gather(1, tree.parents[:, :, None].expand_as(best))
        return best[..., 0], torch.minimum(z.own, best[..., 1]), best[..., -1]

    z = processed if signal == "odds" and processed is not None else evidence
    top, judged, last = at_parents(z, rank)
    passes = near_top(signal, threshold, top, judged) & (z.own >= last)
    if price:
        top, judged, _ = at_parents(evidence, 2)
        passes &= price * (top - judged) <= 1
    return passes


def signal_samples(
    target: Target, prompts: Sequence[dict[str, Any]], records: Sequence[Record]
) -> dict[str, list[float]]:
    """`ratio`, `margin` (nats) and `odds` of the runner-up at every position of the target's own first answers."""
    out: dict[str, list[float]] = {"ratio": [], "margin": [], "odds": []}
    for row, record in zip(prompts, records, strict=True):
        prompt = encode_first(target, row)
        ids = torch.tensor([prompt + record.outputs[0]], device=target.device)
        keep = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=target.device)
        values = target.forward(ids, logits_to_keep=keep).logits[0].topk(2).values.float()
        margin = values[:, 0] - values[:, 1]
        out["ratio"] += [round(v, 4) for v in (values[:, 1] / values[:, 0])[values[:, 0] > 0].tolist()]
        out["margin"] += [round(v, 4) for v in margin.tolist()]
        out["odds"] += [round(v, 4) for v in torch.exp(-margin).tolist()]
    return out
