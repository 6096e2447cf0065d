"""The draft head: EAGLE-3 (arXiv 2503.01840), tensor names as SafeAILab publishes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from slipstream.distill.target import Target


class Attend(Protocol):
    """Attention over whatever keys the caller holds: queries, keys, values [B, heads, Q, d] to [B, heads, Q, d]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class DraftConfig(LlamaConfig):
    """Shape of a head and what it was made for.

    Beside Llama's keys: `draft_vocab_size`, `target_hidden_size`, `eagle_aux_hidden_state_layer_ids` (states *entering*
    these layers, vLLM's convention) and `target_name`.
    """

    model_type = "slipstream_eagle3"

    draft_vocab_size: int = 8192
    target_hidden_size: int = 4096
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    target_name: str = ""
    norm_before_residual: bool = False

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int, **overrides: Any) -> DraftConfig:
        """A head of the target's own width, head size, rope and norms."""
        config = target.config
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape: dict[str, Any] = {
            "vocab_size": target.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
            "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(config)},
            "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
            "target_hidden_size": config.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(target.layer_ids),
            "target_name": target.name,
            "tie_word_embeddings": False,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        }
        return cls(**{**shape, **overrides})


def _rope_theta(config: Any) -> float:
    """The base of the target's rotary embedding (of its full-attention layers, where kinds differ)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta", 10000.0))


class DraftAttention(nn.Module):
    """Self-attention over cat(embedding, feature), 2H wide at the input."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        return self.o_proj(attend(query, key, value).transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    """The one decoder layer of the head."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embedding: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(x, rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftHead(PreTrainedModel):
    """EAGLE-3 draft head; the same forward serves training (unrolled) and decoding (cached), which differ in `attend`.

    Row p takes the feature of token p and the embedding of token p+1, and predicts token p+2. The recurrent feature is
    the layer's output before `norm`.
    """

    config_class = DraftConfig
    base_model_prefix = ""
    config: DraftConfig
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(len(self.layer_ids) * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @property
    def layer_ids(self) -> list[int]:
        """Target layers whose entering states this head reads, low to high."""
        return list(self.config.eagle_aux_hidden_state_layer_ids or [2, 3, 4])

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """Set the draft vocabulary: target ids [Vd], ascending. `d2t` holds offsets: target id = i + d2t[i]."""
        ids = token_ids.to(self.d2t.device)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids] = True

    def vocabulary(self) -> Tensor:
        """Target ids of the draft vocabulary, [Vd]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features [.., A*Ht] to the first step's feature [.., H]."""
        return self.fc(features)

    def forward(self, embedding: Tensor, hidden: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """One draft step.

        Args:
            embedding: [B, Q, Ht], of the token after each row's own.
            hidden: [B, Q, H], fused target features, or the output of the step before.
            position_ids: [B, Q].
            attend: Attention over the caller's keys.

        Returns:
            The recurrent feature [B, Q, H], before the norm.
        """
        return self.midlayer(embedding, hidden, self.rotary(hidden, position_ids), attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary, [.., Vd]."""
        return self.lm_head(self.norm(hidden))

    def check_target(self, target: Target) -> None:
        """Make sure this head was made for `target`.

        Raises:
            SlipstreamError: If name, width, vocabulary or layers differ.
        """
        config = self.config
        if config.target_name and config.target_name != target.name:
            raise SlipstreamError(f"this draft head belongs to target {config.target_name!r}, not to {target.name!r}")
        for what, mine, theirs in (
            ("features of width", config.target_hidden_size, target.config.hidden_size),
            ("a vocabulary of", config.vocab_size, target.vocab_size),
        ):
            if mine != theirs:
                raise SlipstreamError(f"this draft head expects {what} {mine}, but target {target.name!r} has {theirs}")
