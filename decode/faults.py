"""Logits that are not finite: where a target's numbers break, found by running the text once more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.distill.target import Target


@torch.no_grad()
def explain(target: Target, row: int, text: Tensor, logits: Tensor) -> str:
    """What is wrong with the token that was to follow a text, in one line.

    Args:
        target: Whose logits they are.
        row: Of the call.
        text: Its tokens without padding, those of the accepted drafts included, [n].
        logits: The raw ones behind it, [V].
    """
    place = f"the logits of row {row} at text position {len(text) - 1}"
    if math.isfinite(float(logits.float().max())):  # a NaN is the largest, and some may be -inf
        return f"{place} are finite, but not behind the logits processors: check whether these leave a token"
    return f"{place} are not finite: {_origin(target, text)}; check the target's weights and dtype"


def _origin(target: Target, text: Tensor) -> str:
    """The first layer with a state that is not finite, and the first of its positions."""
    out = target.model(input_ids=text[None], use_cache=False, output_hidden_states=True, logits_to_keep=1)
    last = len(out.hidden_states) - 1
    for layer, states in enumerate(out.hidden_states):  # [1, n, Ht]: what enters the layers, then what leaves each
        broken = ~states[0].isfinite().all(-1)
        if broken.any():
            name = f"layer {layer - 1}" if layer else "the embedding layer"
            behind = " or the norm behind it" if layer == last else ""
            return f"{name}{behind} is the first whose state is not, at text position {int(broken.int().argmax())}"
    if math.isfinite(float(out.logits.float().max())):
        return "by itself the text has finite ones, so what broke is a draft beside it, or how trees are run"
    return "its output layer is the first to break"
