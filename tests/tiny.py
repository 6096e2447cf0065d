"""Tiny random targets of many architectures, heads for them, and drafters that are often right."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slipstream.decode.tree import Tree, TreeShape, make_tree
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
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "olmo2": {},
}


def tiny_target(architecture: str = "llama", seed: int = 0, **overrides: object) -> Target:
    """A random fp32 target whose greedy text does not end at once."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**{**_COMMON, **ARCHITECTURES[architecture], **overrides})
    return Target(AutoModelForCausalLM.from_config(config, dtype=torch.float32), name=architecture)


def tiny_head(target: Target, size: int = 64, seed: int = 0):
    """A random head over the lower `size` tokens."""
    return new_head(target, torch.arange(size), seed=seed, from_target=True).eval()


def greedy(target: Target, prompt: Tensor, new: int) -> Tensor:
    """transformers' own greedy output, [1, n + new]."""
    return target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


class OracleDrafter:
    """Knows the right continuation, hides it among wrong siblings, and is wrong from a random depth on."""

    def __init__(self, truth: Tensor, seed: int = 0) -> None:
        self.truth = truth
        self.draw = torch.Generator().manual_seed(seed)

    def reset(self) -> None:
        """Nothing to forget."""

    def propose(self, sequence: Tensor, features: Tensor, shape: TreeShape) -> Tree:
        """A spine of which a random part is true, each spine node with wrong siblings."""
        good = int(torch.randint(0, shape.depth + 1, (), generator=self.draw))
        tokens, parents, spine = [int(sequence[-1])], [0], 0
        for depth in range(shape.depth):
            at = len(sequence) + depth
            true = int(self.truth[at]) if at < len(self.truth) else 5
            right = true if depth < good else (true + 3) % VOCAB
            siblings = [(true + 1) % VOCAB, right, (true + 2) % VOCAB][: max(1, shape.top_k)]
            if right not in siblings:
                siblings[0] = right
            first = len(tokens)
            tokens += siblings
            parents += [spine] * len(siblings)
            spine = first + siblings.index(right)
        count = torch.zeros(len(tokens))
        return make_tree(torch.tensor(tokens), torch.tensor(parents), count, shape.depth)
