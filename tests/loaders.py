"""How other engines load a draft head, after their public code: what they rename, skip in silence, or stop at.

SGLang: `models/llama_eagle3.py` at 03d5a77, `models/llama_eagle.py` at 034b3be, pull request 25454. vLLM:
`models/llama_eagle3.py` at 00bd149, `models/llama_eagle.py` at 00da923, `v1/worker/gpu_model_runner.py`. EAGLE:
`eagle/model/cnets.py` at 148042c. Shapes: H wide, V tokens, Vd drafted, `n` heads and `m` key heads of size d, I wide MLP.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from slipstream.distill.target import Target

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _layer(config: dict[str, Any], width: int) -> dict[str, list[int]]:
    H, d = config["hidden_size"], config["head_dim"]
    return {
        "self_attn.q_proj": [config["num_attention_heads"] * d, width],
        "self_attn.k_proj": [config["num_key_value_heads"] * d, width],
        "self_attn.v_proj": [config["num_key_value_heads"] * d, width],
        "self_attn.o_proj": [H, config["num_attention_heads"] * d],
        "mlp.gate_proj": [config["intermediate_size"], H],
        "mlp.up_proj": [config["intermediate_size"], H],
        "mlp.down_proj": [H, config["intermediate_size"]],
        "post_attention_layernorm": [H],
    }


def parameters(config: dict[str, Any], kind: str, layer: str) -> dict[str, list[int]]:
    """Parameters of an engine's module, as its checkpoint names them, with shapes."""
    H, V = config["hidden_size"], config["vocab_size"]
    if kind == "eagle1":
        first = _layer(config, H)
        shapes = {"fc": [H, 2 * H]}
    else:
        first = _layer(config, 2 * H) | {"input_layernorm": [H], "hidden_norm": [H]}
        shapes = {"fc": [H, 3 * H], "norm": [H], "lm_head": [config["draft_vocab_size"], H]}
    shapes |= {"embed_tokens": [V, H]} | {f"{layer}.{name}": shape for name, shape in first.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _fill(name: str, tensor: Tensor, wanted: dict[str, list[int]]) -> str:
    assert list(tensor.shape) == wanted[name], f"{name}: {list(tensor.shape)}, not {wanted[name]}"
    return name


def sglang(folder: Path, kind: str) -> tuple[set[str], set[str]]:
    """What SGLang's loader filled, and what it passed over without a word."""
    config, tensors = read(folder)
    assert config["architectures"] == [{"eagle3": "LlamaForCausalLMEagle3", "eagle1": "LlamaForCausalLMEagle"}[kind]]
    wanted = parameters(config, kind, {"eagle3": "midlayer", "eagle1": "layers.0"}[kind])
    if kind == "eagle1":
        wanted["fc.bias"] = [config["hidden_size"]]
    filled, skipped = set(), set()
    for name, tensor in tensors.items():
        if kind == "eagle3" and ("d2t" in name or "t2d" in name):
            continue
        if name in wanted and not (kind == "eagle1" and "lm_head" in name):
            filled.add(_fill(name, tensor, wanted))
        else:
            skipped.add(name)
    return set(wanted) - filled, skipped


def vllm(folder: Path, kind: str) -> set[str]:
    """What vLLM's loader left unfilled; an unknown tensor is a KeyError."""
    config, tensors = read(folder)
    if "speculators_model_type" in config:
        config = config["transformer_layer_config"] | {"draft_vocab_size": config["draft_vocab_size"]}
    wanted = parameters(config, kind, "layers.0")
    filled = set()
    for name, tensor in tensors.items():
        if kind == "eagle3" and "t2d" in name:
            continue
        if kind == "eagle3" and "d2t" in name:
            assert list(tensor.shape) == [config["draft_vocab_size"]]
            continue
        if kind == "eagle1" and "embed_tokens." in name:
            continue
        known = name.replace("midlayer.", "layers.0.")
        if known not in wanted:
            raise KeyError(known)
        filled.add(_fill(known, tensor, wanted))
    return set(wanted) - filled


def eagle(folder: Path, kind: str) -> set[str]:
    """What `load_state_dict` of EAGLE's own model would miss; it reads the embeddings from the target for EAGLE-3."""
    config, tensors = read(folder)
    assert "target_hidden_size" not in config  # where the key is, EAGLE looks for the embeddings in the head's file
    wanted = parameters(config, kind, {"eagle3": "midlayer", "eagle1": "layers.0"}[kind])
    if kind == "eagle1":
        wanted |= {"fc.bias": [config["hidden_size"]]} if config["bias"] else {}
    else:
        wanted |= {"d2t": [config["draft_vocab_size"]], "t2d": [config["vocab_size"]]}
    filled = {_fill(name, tensor, wanted) for name, tensor in tensors.items()}
    return set(wanted) - filled


def sglang_layers(config: dict[str, Any]) -> list[int]:
    """Layers before which SGLang captures, since pull request 25454."""
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    return [i + 1 for i in ids] if ids[0] == 1 else list(ids)


def sglang_layers_before(config: dict[str, Any]) -> list[int]:
    """Layers before which SGLang captured until then."""
    return [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]


def vllm_layers(config: dict[str, Any]) -> list[int]:
    """Layers before which vLLM captures."""
    return list(config["eagle_aux_hidden_state_layer_ids"])


def captured_before(target: Target, ids: Tensor, layers: list[int]) -> list[Tensor]:
    """What goes into the target's layers, as the engines tap it: a hook before each layer."""
    states: dict[int, Tensor] = {}

    def tap(layer: int) -> Callable[..., None]:
        def hook(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    inner = target.model.model.layers
    hooks = [inner[i].register_forward_pre_hook(tap(i), with_kwargs=True) for i in layers]
    target.forward(ids)
    for hook in hooks:
        hook.remove()
    return [states[i] for i in layers]
