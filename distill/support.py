"""Which models can verify a tree, and texts of what length: what is not so is refused before anything is decoded wrongly."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from slipstream.configs.errors import SlipstreamError
from slipstream.distill.masks import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "hybrid")
_TREE = 512  # slots that are left to a tree where a model counts slots, not positions


def require_support(model: PreTrainedModel, name: str) -> None:
    """Make sure that a tree behind a cached text can be verified with a model.

    Raises:
        SlipstreamError: If it cannot.
    """
    if model.config.is_encoder_decoder:
        raise SlipstreamError(f"{name} is an encoder and a decoder; a target is a causal language model")
    reason = next(_obstacles(model, model.config.get_text_config()), None)
    if reason is not None:
        raise SlipstreamError(f"{name} {reason}")


def require_causal(model: PreTrainedModel, name: str) -> None:
    """Make sure that no token sees a later one: an encoder with a language-model head loads as a causal LM.

    Raises:
        SlipstreamError: If one does.
    """
    with torch.no_grad():
        first, second = model(input_ids=torch.tensor([[1, 1], [1, 2]], device=model.device)).logits[:, 0].float()
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-2):
        raise SlipstreamError(f"target {name!r} is no causal language model: earlier tokens see later ones")


def _obstacles(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[str]:
    """What keeps trees from being verified, as it follows a model's name."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for kind in getattr(config, "layer_types", None) or []:
        if any(word in kind for word in _RECURRENT):
            yield f"has {kind} layers, whose state cannot be rolled back to verify a tree"
        if kind not in KINDS:
            yield f"has {kind} layers; a tree can be masked in {', '.join(KINDS)} layers only"
    if any(part._is_stateful for part in parts):
        yield "keeps a state from token to token, which cannot be rolled back to verify a tree"
    placed = any("position_ids" in inspect.signature(part.forward).parameters for part in parts)
    if not placed or getattr(config, "alibi", False):
        yield "counts positions by tokens in the cache (ALiBi, for one); nodes of a tree need position_ids"
    if getattr(config, "num_kv_shared_layers", 0):
        yield "has layers that share keys and values (num_kv_shared_layers), which the cache of trees has no place for"
    if "local" in getattr(config, "attention_layers", ()):
        yield "has local layers, whose window is counted in tokens of the cache, siblings in a tree included"


def context_of(config: PreTrainedConfig, name: str) -> int:
    """Longest text that a model decodes like `generate`, tokens.

    Frequencies of `longrope` are other ones from a length on, where `generate` computes all keys anew. Llama 4 scales
    queries by their slot in the cache from a length on, and a tree's slots are not its positions.

    Raises:
        SlipstreamError: If the model does not tell.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise SlipstreamError(
            f"the config of {name} has no max_position_embeddings; set it to the tokens of the longest text"
        )
    ropes = _ropes(getattr(config, "rope_parameters", None) or {})
    limits = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    scaled = _scaled_from(config)
    if scaled is not None:
        limits.append(max(1, scaled - _TREE))
    return int(min([longest, *limits]))


def require_row(config: PreTrainedConfig, name: str, tokens: int) -> None:
    """Make sure that several texts in one row leave the states that each leaves alone.

    Raises:
        SlipstreamError: If the row is too long for that.
    """
    scaled = _scaled_from(config)
    if scaled is not None and tokens > scaled:
        raise SlipstreamError(
            f"{name} scales queries by their place in a row from token {scaled} on, and this row of several texts has "
            f"{tokens}: set data.packed to false"
        )


def _scaled_from(config: PreTrainedConfig) -> int | None:
    """Slots from which on queries are scaled by their slot, as Llama 4 does; None where they are not."""
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary parameters of all kinds of layers."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
