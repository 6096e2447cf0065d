"""The draft head: EAGLE-3 (arXiv 2503.01840) and its relatives, one module with one config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from slipstream.configs.errors import SlipstreamError
from slipstream.distill.store import weights_fingerprint

if TYPE_CHECKING:
    from slipstream.distill.target import Target


_SCALED = ("linear", "llama3", "yarn")  # rotary embeddings of one set of frequencies for all lengths


class Attend(Protocol):
    """Attention over whatever keys the caller holds: queries, keys, values [B, heads, Q, d] to [B, heads, Q, d]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor: ...


class DraftConfig(LlamaConfig):
    """Shape of a head and what it was made for, beside Llama's keys.

    Attributes:
        kind: `eagle3`; `eagle1` (arXiv 2401.15077; trained over several steps it is HASS, 2408.15766), which predicts the
            target's last state and reads tokens off it with the target's own output matrix; `parallel` (P-EAGLE), whose
            later drafts come from learned mask states in the same pass as the first.
        draft_vocab_size: Vd.
        target_hidden_size: Ht.
        eagle_aux_hidden_state_layer_ids: States *entering* these layers are read (vLLM's convention).
        target_name: The target trained for.
        norm_before_residual: The feature enters the residual stream after its norm (speculators).
        norm_before_fc: One norm over all captured states side by side before `fc`.
        fc_norm: One norm for each captured state before `fc` (EAGLE-3.1).
        norm_output: The recurrent feature is taken after the last norm (EAGLE-3.1).
        fc_bias: Whether `fc` has a bias (EAGLE-1 checkpoints).
    """

    model_type = "slipstream_eagle3"

    kind: str = "eagle3"
    draft_vocab_size: int = 8192
    target_hidden_size: int = 4096
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    target_name: str = ""
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool = False

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int, **overrides: Any) -> DraftConfig:
        """A head with the target's own head size, rope, norms and, unless overridden, width."""
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
            "rope_parameters": _rope(config),
            "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
            "target_hidden_size": config.hidden_size,
            "eagle_aux_hidden_state_layer_ids": layers_read(overrides.get("kind", cls.kind), target),
            "target_name": target.name,
            "tie_word_embeddings": False,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        }
        return cls(**{**shape, **overrides})


def layers_read(kind: str, target: Target) -> list[int]:
    """Layers of the target whose entering states a head of this kind is fed."""
    return [target.config.num_hidden_layers] if kind == "eagle1" else list(target.layer_ids)


def _rope(config: Any) -> dict[str, Any]:
    """The target's rotary embedding (of its full-attention layers, where kinds differ).

    Kinds whose frequencies depend on the length of the text, or that count sections of a head, are left at their base.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    base = float(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") not in _SCALED or rope.get("mrope_section"):
        return {"rope_type": "default", "rope_theta": base}
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}  # a head turns all dimensions
    return {**rope, "rope_theta": base}


class DraftAttention(nn.Module):
    """Self-attention over inputs of any width."""

    def __init__(self, config: DraftConfig, width: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        return self.o_proj(attend(query, key, value, layer).transpose(1, 2).flatten(2))


class DraftMLP(GradientCheckpointingLayer, LlamaMLP):
    """Llama's; with activation checkpointing what is inside is not kept, but made again on the way back."""


class FusedLayer(nn.Module):
    """EAGLE-3's first layer: attention over embedding and feature side by side, embedding first."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config, 2 * config.hidden_size)
        self.mlp = DraftMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def forward(self, embedding: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        normed = self.hidden_norm(hidden)
        x = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        hidden = (normed if self.norm_before_residual else hidden) + self.self_attn(x, rotary, attend, 0)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PlainLayer(nn.Module):
    """A layer on the feature alone: those behind the first, and EAGLE-1's, which has no norm before its attention."""

    def __init__(self, config: DraftConfig, layer: int, *, norm_input: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = DraftAttention(config, config.hidden_size)
        self.mlp = DraftMLP(config)
        norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = norm if norm_input else nn.Identity()
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attend, self.layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftHead(PreTrainedModel):
    """A draft head; the same forward serves training (unrolled) and decoding (cached), which differ in `attend`.

    Row p takes the feature of token p and the embedding of token p+1, and predicts token p+2. The recurrent feature is
    the layers' output before `norm`, unless the config says otherwise. Tensor names are those SafeAILab publishes.

    Attributes:
        trained_on: Fingerprint of the weights of its target, and the dtype these had; None where nobody says.
    """

    config_class = DraftConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    config: DraftConfig
    d2t: Tensor
    t2d: Tensor
    lm_head: nn.Linear
    trained_on: tuple[str, torch.dtype | None] | None = None

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        width, captured = config.hidden_size, len(self.layer_ids) * config.target_hidden_size
        same = config.target_hidden_size == width
        self.embed_proj = nn.Identity() if same else nn.Linear(config.target_hidden_size, width, bias=False)
        if config.kind == "eagle1":
            if not same:
                raise SlipstreamError(
                    f"an eagle1 head is as wide as its target: {config.target_hidden_size}, not {width}"
                )
            self.fc = nn.Linear(2 * width, width, bias=config.fc_bias)
            self.midlayer: nn.Module = PlainLayer(config, 0, norm_input=False)
        else:
            self.fc = nn.Linear(captured, width, bias=config.fc_bias)
            self.midlayer = FusedLayer(config)
        self.layers = nn.ModuleList(PlainLayer(config, i) for i in range(1, config.num_hidden_layers))
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(captured, eps=config.rms_norm_eps)
        if config.fc_norm:
            norms = (LlamaRMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in self.layer_ids)
            self.fc_norm = nn.ModuleList(norms)
        if config.kind == "parallel":
            self.mask_embedding = nn.Parameter(torch.randn(width) * config.initializer_range)
            self.mask_hidden = nn.Parameter(torch.randn(width) * config.initializer_range)
        if config.kind == "eagle1":
            self.norm: nn.Module = nn.Identity()
        else:
            self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @property
    def layer_ids(self) -> list[int]:
        """Target layers whose entering states this head reads, low to high.

        Raises:
            SlipstreamError: If its config does not say.
        """
        if not self.config.eagle_aux_hidden_state_layer_ids:
            raise SlipstreamError(
                f"draft head {self.config.name_or_path!r}: config.json must name eagle_aux_hidden_state_layer_ids"
            )
        return list(self.config.eagle_aux_hidden_state_layer_ids)

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """Set the draft vocabulary: target ids [Vd], ascending. `d2t` holds offsets: target id = i + d2t[i]."""
        ids = token_ids.to(self.d2t.device)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids] = True

    def vocabulary(self) -> Tensor:
        """Target ids of the draft vocabulary, [Vd]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def borrow(self, target: Target) -> None:
        """Take what an `eagle1` head has not of its own, the target's output matrix at the draft vocabulary.

        Raises:
            SlipstreamError: If the target's output layer is not a plain matrix.
        """
        lent = self.__dict__.get("lm_head")
        if self.config.kind != "eagle1" or (lent is not None and lent.weight.device == self.d2t.device):
            return
        output = target.model.get_output_embeddings()
        if not isinstance(output, nn.Linear) or output.bias is not None:
            raise SlipstreamError(
                f"an eagle1 head needs a target whose output layer is a plain matrix, not {target.name}'s"
            )
        with align_module_device(output):  # brings back what accelerate keeps elsewhere
            weight = output.weight[self.vocabulary().to(output.weight.device)].detach().to(self.d2t.device)
        lent = nn.Linear(self.config.hidden_size, len(weight), bias=False, device="meta")
        lent.weight = nn.Parameter(weight, requires_grad=False)
        self.__dict__["lm_head"] = lent  # no submodule: neither saved nor trained

    def checkpoint_activations(self) -> None:
        """Keep no activations of the layers' MLPs while training: gradients make them again, one MLP at a time."""
        enable = getattr(self, "activation_checkpointing_enable", None) or self.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def compile_layers(self) -> None:
        """Let the layers run through `torch.compile`, for batches of any size; attention over the caller's keys does not."""
        for layer in (self.midlayer, *self.layers):
            layer.compile(dynamic=True)

    def fuse(self, features: Tensor) -> Tensor:
        """Target features [.., A*Ht] to the first step's feature [.., H]."""
        if self.config.kind == "eagle1":
            return features
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.split(self.config.target_hidden_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def embed(self, embedding: Tensor) -> Tensor:
        """The target's embeddings [.., Ht] in this head's width and type, [.., H]."""
        return self.embed_proj(embedding.to(self.fc.weight.dtype))

    def masks(self, batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """What stands in for unknown tokens and features in a `parallel` head: embeddings and features [B, Q, H]."""
        shape = (batch, rows, -1)
        return self.mask_embedding.expand(*shape), self.mask_hidden.expand(*shape)

    def forward(self, embedding: Tensor, hidden: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """One draft step.

        Args:
            embedding: [B, Q, H], of the token after each row's own, from `embed`.
            hidden: [B, Q, H], fused target features, or the output of the step before.
            position_ids: [B, Q].
            attend: Attention over the caller's keys.

        Returns:
            The recurrent feature [B, Q, H].
        """
        rotary = self.rotary(hidden, position_ids)
        if self.config.kind == "eagle1":
            hidden = self.midlayer(self.fc(torch.cat([embedding, hidden], dim=-1)), rotary, attend)
        else:
            hidden = self.midlayer(embedding, hidden, rotary, attend)
        for layer in self.layers:
            hidden = layer(hidden, rotary, attend)
        return self.norm(hidden) if self.config.norm_output else hidden

    def normed(self, hidden: Tensor) -> Tensor:
        """What `lm_head` reads of a recurrent feature, [.., H]."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary, [.., Vd]."""
        return self.lm_head(self.normed(hidden))

    def check_target(self, target: Target) -> None:
        """Make sure this head was made for `target`, whatever the path to it is now.

        Raises:
            SlipstreamError: If name and weights, width, vocabulary or layers differ.
        """
        config = self.config
        if config.target_name and not same_place(config.target_name, target.name) and not self._knows(target):
            here = str(target.dtype).removeprefix("torch.")
            weights = "unknown" if self.trained_on is None else f"not these in {here}"
            raise SlipstreamError(
                f"this draft head belongs to target {config.target_name!r}, not to {target.name!r} (the weights it was "
                f"trained on are {weights}); to use it all the same, set target_name in its config.json to {target.name!r}"
            )
        if self.layer_ids != target.layer_ids:
            raise SlipstreamError(
                f"this draft head reads layers {self.layer_ids}, target {target.name!r} was loaded to give "
                f"{target.layer_ids}; use target.reading({self.layer_ids})"
            )
        for what, mine, theirs in (
            ("features of width", config.target_hidden_size, target.config.hidden_size),
            ("a vocabulary of", config.vocab_size, target.vocab_size),
        ):
            if mine != theirs:
                raise SlipstreamError(f"this draft head expects {what} {mine}, but target {target.name!r} has {theirs}")

    def _knows(self, target: Target) -> bool:
        """Whether this head was trained on the weights of `target`."""
        if self.trained_on is None:
            return False
        weights, dtype = self.trained_on
        return weights_fingerprint(target, dtype) == weights


def same_place(first: str, second: str) -> bool:
    """Whether two names of targets are one, or lead to one folder or file."""
    paths = [Path(name).expanduser() for name in (first, second)]
    return first == second or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


AutoConfig.register(DraftConfig.model_type, DraftConfig)
AutoModel.register(DraftConfig, DraftHead)
