"""How sure the target is along a text: the distributions that a relaxation threshold cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slipstream.data.template import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.distill.target import Target


def signal_samples(
    target: Target, prompts: Sequence[dict[str, Any]], records: Sequence[Record]
) -> dict[str, list[float]]:
    """`ratio`, `margin` (nats) and `odds` of the runner-up at every position of the target's own first answers."""
    out: dict[str, list[float]] = {"ratio": [], "margin": [], "odds": []}
    for row, record in zip(prompts, records, strict=True):
        prompt = encode_prompt(target.chat_tokenizer, [{"role": "user", "content": row["turns"][0]}])
        ids = torch.tensor([prompt + record.outputs[0]], device=target.device)
        keep = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=target.device)
        values = target.forward(ids, logits_to_keep=keep).logits[0].topk(2).values.float()
        margin = values[:, 0] - values[:, 1]
        out["ratio"] += [round(v, 4) for v in (values[:, 1] / values[:, 0])[values[:, 0] > 0].tolist()]
        out["margin"] += [round(v, 4) for v in margin.tolist()]
        out["odds"] += [round(v, 4) for v in torch.exp(-margin).tolist()]
    return out
