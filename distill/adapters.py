"""LoRA on a draft head (peft): a new domain for a head that exists, at a fraction of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slipstream.configs.errors import SlipstreamError
from slipstream.distill.draft import DraftConfig, DraftHead

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LoraConfig


_PEFT = "base_model.model."  # what peft's files put before a name


def _lora(head: DraftHead, rank: int) -> LoraConfig:
    """Low-rank updates of every matrix but the output layer, scaled by 2."""
    from peft import LoraConfig  # peft imports slowly

    names = [name for name, layer in head.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)


def add_lora(head: DraftHead, rank: int, seed: int = 0) -> None:
    """Give a head low-rank updates, which begin at nothing; they alone are trained."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(_lora(head, rank), head)


def rebuild(config: DraftConfig, weights: dict[str, Tensor]) -> DraftHead:
    """A head from the weights of a trained one, low-rank updates merged into the matrices they belong to."""
    head = DraftHead(config)
    rank = next((len(x) for name, x in weights.items() if ".lora_A." in name), None)
    if rank is None:
        head.load_state_dict(weights)
        return head
    from peft.tuners.lora import LoraLayer

    add_lora(head, rank)
    head.load_state_dict(weights)
    for name, layer in list(head.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(head.get_submodule(parent), own, layer.get_base_layer())
    return head


def save_adapter(config: DraftConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the low-rank updates alone, in peft's own layout."""
    from safetensors.torch import save_file

    own = {name.replace(".default.", "."): x.contiguous() for name, x in weights.items() if ".lora_" in name}
    updates = {f"{_PEFT}{name}": x for name, x in own.items()}
    rank = next(len(x) for name, x in updates.items() if ".lora_A." in name)
    folder.mkdir(parents=True, exist_ok=True)
    _lora(DraftHead(config), rank).save_pretrained(str(folder))
    save_file(updates, folder / "adapter_model.safetensors")


def merge_adapter(head: DraftHead, folder: Path) -> DraftHead:
    """A head with the updates in a folder merged into it.

    Raises:
        SlipstreamError: If they belong to another head.
    """
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise SlipstreamError(f"{folder} holds no adapter: adapter_model.safetensors is missing")
    updates = {name.removeprefix(_PEFT).replace(".weight", ".default.weight"): x for name, x in load_file(file).items()}
    adapted = {name.rpartition(".lora_")[0] for name in updates}
    weights = {}
    for name, x in head.state_dict().items():
        layer, _, kind = name.rpartition(".")
        weights[f"{layer}.base_layer.{kind}" if layer in adapted else name] = x
    try:
        merged = rebuild(head.config, {**weights, **updates})
    except RuntimeError as error:
        raise SlipstreamError(
            f"the adapter in {folder} belongs to another head: {str(error).splitlines()[-1].strip()}"
        ) from error
    return merged.to(head.device, next(head.parameters()).dtype).eval().requires_grad_(False)
