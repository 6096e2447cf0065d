"""slipstream: draft heads that ride on a target's hidden states, decoded in trees, verified exactly or by margin.

import slipstream

decoder = slipstream.load(target, draft)
out = decoder.generate(input_ids, max_new_tokens=256, verify="exact")
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import Drafter, HeadDrafter, ModelDrafter, NGramDrafter, NoDrafter
from slipstream.decode.engine import Decoder, Generation
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.compilation import require_compiler
from slipstream.distill.draft import DraftConfig, DraftHead
from slipstream.distill.heads import is_head, load_head, locate, save_head
from slipstream.distill.target import Target, load_target

__all__ = [
    "Decoder",
    "DraftConfig",
    "DraftHead",
    "Generation",
    "Policy",
    "SlipstreamError",
    "Target",
    "TreeShape",
    "Verifier",
    "load",
    "load_head",
    "load_target",
    "save_head",
]


def load(
    target: str | Path | Target | PreTrainedModel,
    draft: str | Path | DraftHead | Target | PreTrainedModel | Drafter = "none",
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: str | torch.device = "cpu",
    compiled: bool = False,
) -> Decoder:
    """A decoder from a target and a draft; the policy comes from the head's `decode.json`.

    Args:
        target: A folder, GGUF file, hub id, `smollm2-135m-instruct`, a loaded `Target`, or transformers' own model.
        draft: A head's folder or hub id, a loaded `DraftHead`, `ngram` (prompt look-up), a causal LM with the target's
            tokenizer (a folder or hub id, or loaded), a `Drafter`, or `none`.
        dtype: Of the target and the draft, where they are loaded here.
        device: Likewise.
        compiled: Run single prompts through `torch.compile`d forwards, on a card as CUDA graphs. On a
            CPU it takes a C++ compiler and, the first time, a minute.

    Raises:
        SlipstreamError: If something is missing, the draft belongs to another target, or nothing can be compiled here.
    """
    if isinstance(target, PreTrainedModel):
        target = Target(target)
    loaded = target if isinstance(target, Target) else load_target(str(target), dtype=dtype, device=device)
    policy = Policy()
    drafter: Drafter
    if isinstance(draft, (str, Path)) and draft not in ("none", "ngram"):
        folder = locate(draft)
        if is_head(folder):
            draft, policy = load_head(folder, dtype=loaded.dtype, device=loaded.device), Policy.load(folder)
        else:
            draft = load_target(str(draft), dtype=loaded.dtype, device=loaded.device)
    if isinstance(draft, PreTrainedModel) and not isinstance(draft, DraftHead):
        draft = Target(draft)
    if draft == "none":
        drafter = NoDrafter()
    elif draft == "ngram":
        drafter, policy = NGramDrafter(), Policy(tree=TreeShape.chain(10))
    elif isinstance(draft, Target):
        drafter = ModelDrafter(draft, loaded)
    elif isinstance(draft, DraftHead):
        loaded = loaded.reading(draft.layer_ids)
        draft.check_target(loaded)
        drafter = HeadDrafter(draft, loaded)
    elif isinstance(draft, Drafter):
        drafter = draft
    else:
        raise SlipstreamError(f"draft must be a folder, a hub id, a head or a model, not {type(draft).__name__}")
    if compiled and loaded.compiled is None:
        require_compiler(loaded.device)
        loaded.compile()
    return Decoder(loaded, drafter, policy)
