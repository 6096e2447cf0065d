"""Tiny random targets of many architectures, heads for them, and drafters that are often right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slipstream.configs.recipe import HeadSettings
from slipstream.decode.drafters import NoDrafter, Round
from slipstream.decode.tree import Tree, make_tree
from slipstream.distill.draft import DraftHead
from slipstream.distill.heads import new_head
from slipstream.distill.target import Target

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 12},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 48},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "stablelm": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "olmo2": {},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0, 1, 0],
    },
}

HEADS: dict[str, dict[str, Any]] = {  # settings of a recipe's `head`
    "eagle3": {},
    "eagle3, two layers and its norms": {"layers": 2, "norm_output": True, "norm_before_fc": True, "fc_norm": True},
    "eagle3, narrower": {"hidden_size": 16},
    "eagle1": {"kind": "eagle1"},
    "parallel": {"kind": "parallel", "layers": 2},
}


def tiny_target(architecture: str = "llama", seed: int = 0, **overrides: object) -> Target:
    """A random fp32 target whose greedy text does not end at once."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**{**_COMMON, **ARCHITECTURES.get(architecture, {}), **overrides})
    return Target(AutoModelForCausalLM.from_config(config, dtype=torch.float32), name=architecture)


def tiny_head(target: Target, size: int = 64, seed: int = 0, **settings: Any) -> DraftHead:
    """A random head over the lower `size` tokens; settings as in a recipe's `head`."""
    return new_head(target, torch.arange(size), HeadSettings(**settings), seed=seed).eval()


def greedy(target: Target, prompt: Tensor, new: int) -> Tensor:
    """transformers' own greedy output, [1, n + new]."""
    return target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


class OracleDrafter(NoDrafter):
    """Knows each row's right continuation, hides it among wrong siblings, and is wrong from a random depth on."""

    def __init__(self, truth: Tensor, seed: int = 0) -> None:
        self.truth = truth  # [B, S]
        self.draw = torch.Generator().manual_seed(seed)

    def begin(self, batch: int) -> None:
        """All rows are there."""
        self.rows = list(range(batch))

    def keep(self, rows: list[int]) -> None:
        """Only these go on."""
        self.rows = [self.rows[row] for row in rows]

    def propose(self, round: Round) -> Tree:
        """A spine of which a random part is true, each spine node with wrong siblings."""
        width, depth = min(3, max(1, round.shape.top_k)), round.shape.depth
        tokens, parents, spine = [[int(root)] for root in round.roots], [0], 0
        right = torch.randint(0, width, (depth,), generator=self.draw).tolist()
        for level in range(depth):
            for row, length, out in zip(self.rows, round.lengths, tokens, strict=True):
                good = int(torch.randint(0, 3, (), generator=self.draw)) > 0
                at = length + level
                true = int(self.truth[row, at]) if at < self.truth.shape[1] else 5
                out += [(true + 1 + i + (1 if i == right[level] else 0)) % VOCAB for i in range(width)]
                if good:
                    out[-width + right[level]] = true
            parents += [spine] * width
            spine = len(parents) - width + right[level]
        count = torch.zeros(len(tokens), len(parents))
        return make_tree(torch.tensor(tokens), torch.tensor(parents).expand(len(tokens), -1), count, depth)
