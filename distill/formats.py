"""Draft heads for other engines: names of their tensors, keys of their config.json, where the layer ids go.

Read off the loaders: SafeAILab/EAGLE `eagle/model/cnets.py` at 148042c and `ea_model.py` at 2320d52; sgl-project/sglang
`models/llama_eagle3.py` at 03d5a77, `llama_eagle.py` at 034b3be and pull request 25454 (layer ids); vllm-project/vllm
`models/llama_eagle3.py` at 00bd149, `llama_eagle.py` at 00da923 and pull request 42764 (EAGLE-3.1); speculators 0.9.0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from slipstream.distill.draft import DraftConfig, DraftHead
    from slipstream.distill.target import Target

LAYER = "midlayer."
EMBEDDINGS = "embed_tokens.weight"
VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Flags of EAGLE-3 heads with further norms, the same words in every engine that knows them."""


@dataclass(frozen=True)
class Format:
    """What one engine loads of one kind of head.

    Attributes:
        architectures: What `architectures` may say; the first is what we write.
        first: Prefixes of the first layer's tensors that it knows; the first is what we write.
        maps: Which of `d2t` and `t2d` we write; engines with a draft vocabulary take or skip both.
        strict: Whether a tensor it does not know stops it; the others skip such tensors in silence.
        embeddings: Whether `embed_tokens` must be in the file; the others share the target's.
        variants: Whether it knows `VARIANTS` and heads of several layers.
        fc_bias: Whether its `fc` can have a bias.
    """

    architectures: tuple[str, ...]
    first: tuple[str, ...] = (LAYER,)
    maps: tuple[str, ...] = ()
    strict: bool = False
    embeddings: bool = False
    variants: bool = False
    fc_bias: bool = False


FORMATS: dict[str, dict[str, Format]] = {
    "eagle3": {
        "eagle": Format(("LlamaForCausalLM",), maps=("d2t", "t2d")),
        "sglang": Format(("LlamaForCausalLMEagle3",), maps=("d2t",)),
        "vllm": Format(
            ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3", "LlamaForCausalLM", "Eagle3Speculator"),
            first=(LAYER, "layers.0."),
            maps=("d2t",),
            strict=True,
            variants=True,
        ),
        "speculators": Format(
            ("Eagle3Speculator", "Eagle3DraftModel"),
            first=("layers.0.",),
            maps=("d2t", "t2d"),
            embeddings=True,
            variants=True,
        ),
    },
    "eagle1": {
        "eagle": Format(("LlamaForCausalLM",), first=("layers.0.",), embeddings=True, fc_bias=True),
        "sglang": Format(("LlamaForCausalLMEagle",), first=("layers.0.",), fc_bias=True),
        "vllm": Format(("EagleLlamaForCausalLM", "LlamaForCausalLM"), first=("layers.0.",)),
    },
}
ENGINES = tuple(FORMATS["eagle3"])


def outputs_of(layer_ids: list[int]) -> list[int]:
    """Layers whose outputs are the states entering `layer_ids`: entering [2, 15, 27] is the output of [1, 14, 26]."""
    return [i - 1 for i in layer_ids]


def obstacle(config: DraftConfig, name: str) -> str | None:
    """Why a head cannot be served by an engine, if it cannot."""
    form = FORMATS.get(config.kind, {}).get(name)
    if form is None:
        return f"knows no {config.kind} heads" + (" in the layout written here" if config.kind == "parallel" else "")
    if config.hidden_size != config.target_hidden_size:
        return "wants embeddings of the head's width; this narrower head projects the target's"
    found = [flag for flag in VARIANTS if getattr(config, flag)]
    if config.num_hidden_layers > 1:
        found.append(f"{config.num_hidden_layers} layers")
    if config.fc_bias and not form.fc_bias:
        return "has no bias on fc"
    if found and not form.variants:
        return f"knows no heads with {', '.join(found)}"
    if config.norm_before_fc and config.fc_norm:
        return "takes norm_before_fc or fc_norm, not both"
    ids = list(config.eagle_aux_hidden_state_layer_ids or [])
    if config.kind == "eagle3" and name == "eagle" and ids[:1] != [2]:
        return f"captures the states entering layers 2, n//2 and n-3, whatever the head; this one reads {ids}"
    if config.kind == "eagle3" and name == "sglang" and ids[:1] != [2]:
        # since pull request 25454 one is added to the ids only where the first of them is 1
        return f"takes layer ids for outputs only where the first is 1; this head's are {outputs_of(ids)}"
    return None


def wants_embeddings(config: DraftConfig, name: str) -> bool:
    """Whether an engine wants the target's embeddings in the head's file."""
    form = FORMATS.get(config.kind, {}).get(name)
    return form is not None and form.embeddings


def export_head(
    head: DraftHead,
    name: str,
    out: Path,
    *,
    target: Target | None = None,
    drafts: int = 4,
    extras: Mapping[str, str] | None = None,
) -> None:
    """Write a head as one engine loads it, all or nothing.

    Args:
        head: The head, in the dtype wanted.
        name: One of `ENGINES`.
        out: Folder to write.
        target: The head's target; needed where its embeddings go along.
        drafts: Tokens to draft in a row, where the engine's config says it.
        extras: Texts of further files; engines ignore them.

    Raises:
        SlipstreamError: If the engine cannot serve this head, or the target is needed and not there.
    """
    if why := obstacle(head.config, name):
        raise SlipstreamError(f"--to {name}: {name} {why}")
    if wants_embeddings(head.config, name) and target is None:
        raise SlipstreamError(f"--to {name}: {name} wants the target's embeddings in the file; give --target")
    if target is not None:
        head.check_target(target.reading(head.layer_ids))
    tensors = {key: value.contiguous() for key, value in export_tensors(head, name, target).items()}
    config = json.dumps(export_config(head, name, target, drafts), indent=2) + "\n"
    with folder_atomic(out) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for file, text in {"config.json": config, **(extras or {})}.items():
            (temporary / file).write_text(text, encoding="utf-8")


def export_tensors(head: DraftHead, name: str, target: Target | None) -> dict[str, Tensor]:
    """The tensors an engine is given, by its names. The target's embeddings are among them where it is given."""
    config = head.config
    form = FORMATS[config.kind][name]
    whole = config.draft_vocab_size == config.vocab_size
    tensors = {}
    for key, value in head.state_dict().items():
        if key in ("d2t", "t2d"):
            if key in form.maps and not (whole and name == "speculators"):
                tensors[key] = value
        elif key.startswith("layers."):
            _, index, rest = key.split(".", 2)
            tensors[f"layers.{int(index) + 1}.{rest}"] = value
        else:
            tensors[key.replace(LAYER, form.first[0], 1)] = value
    if config.kind == "eagle1" and name == "sglang" and not config.fc_bias:
        tensors["fc.bias"] = torch.zeros_like(tensors["fc.weight"][:, 0])  # its fc has one, random where none is loaded
    if form.embeddings and target is not None:
        tensors[EMBEDDINGS] = target.embeddings.get_parameter("weight").detach().to(tensors["fc.weight"])
    return tensors


def export_config(head: DraftHead, name: str, target: Target | None, drafts: int) -> dict[str, Any]:
    """The config.json an engine is given.

    Both spellings of the layer ids are written: at the top the states *entering* the layers (vLLM, speculators), in
    `eagle_config` the layers they are *outputs of* (SGLang). `slipstream` names the convention once more.
    """
    config, ids = head.config, head.layer_ids
    shared: dict[str, Any] = {
        "architectures": list(FORMATS[config.kind][name].architectures[:1]),
        "torch_dtype": str(head.dtype).removeprefix("torch."),
        "slipstream": {
            "kind": config.kind,
            "target": config.target_name,
            "layer_ids": ids,
            "layer_convention": "states entering these layers, hidden_states[i] of transformers",
        },
    }
    if config.kind == "eagle1":
        # EAGLE takes `bias` for its fc's, the other two for the attention's
        return {**_llama(config), **shared, "bias": config.fc_bias and name == "eagle"}
    shared |= {
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs_of(ids)},
        **{flag: getattr(config, flag) for flag in VARIANTS},  # missing, vLLM takes norm_before_residual for true
    }
    if name == "speculators":
        assert target is not None
        return {**shared, **_speculators(config, target, drafts)}
    return {**_llama(config), **shared}


def _speculators(config: DraftConfig, target: Target, drafts: int) -> dict[str, Any]:
    """What speculators nests, and what it knows the target by."""
    verifier = {
        "name_or_path": target.name,
        "architectures": target.model.config.architectures or [type(target.model).__name__],
    }
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "embed_requires_grad": False,
        "target_hidden_size": config.target_hidden_size,
        "tie_word_embeddings": False,
        "transformer_layer_config": _llama(config),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafts}],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
    }


def _llama(config: DraftConfig) -> dict[str, Any]:
    """The shape of the head in Llama's keys; rope in the spellings of transformers 4 and 5."""
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
        "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "model_type": "llama",
        **{key: getattr(config, key) for key in keys},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "bias": False,
        "tie_word_embeddings": False,
    }
