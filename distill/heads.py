"""A head's folder: made, written and read as a whole."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic
from slipstream.configs.recipe import Recipe
from slipstream.distill.draft import DraftConfig, DraftHead, same_place
from slipstream.distill.hub import commit, fetch
from slipstream.distill.shards import layers_of
from slipstream.distill.store import weights_fingerprint
from slipstream.distill.target import DTYPES
from slipstream.distill.tensors import read_index, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.configs.recipe import HeadSettings
    from slipstream.distill.target import Target


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "accelerate", "datasets", "slipstream")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def new_head(target: Target, vocabulary: Tensor, settings: HeadSettings, *, seed: int) -> DraftHead:
    """A head for `target`, before training.

    Args:
        target: Head size, rope, norms and layers are taken from it.
        vocabulary: Target ids of the draft vocabulary, [Vd].
        settings: Kind and shape; `from_target` makes it begin near the target instead of at random.
        seed: Of the random weights.

    Raises:
        SlipstreamError: If transformers has no config of this shape.
    """
    shape = {"hidden_size": settings.hidden_size, "intermediate_size": settings.intermediate_size}
    config = DraftConfig.for_target(
        target,
        len(vocabulary),
        kind=settings.kind,
        num_hidden_layers=settings.layers,
        norm_output=settings.norm_output,
        norm_before_fc=settings.norm_before_fc,
        fc_norm=settings.fc_norm,
        **{name: size for name, size in shape.items() if size is not None},
    )
    if config.hidden_size % config.num_attention_heads:
        raise SlipstreamError(
            f"head.hidden_size must be a multiple of {config.num_attention_heads}, the target's attention heads, not "
            f"{config.hidden_size}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = DraftHead(config)
    head.set_vocabulary(vocabulary)
    head.borrow(target)
    if settings.from_target:
        with torch.no_grad():
            _start_near(head, target, vocabulary)
    return head


def _start_near(head: DraftHead, target: Target, vocabulary: Tensor) -> None:
    """Let a head begin with what the target knows, as far as shapes allow.

    `fc` starts at the highest captured state and `lm_head` at the target's own rows, so that the untrained head already
    reads the target's late state through the target's own output matrix. Where the residual stream is the target's own,
    without norms before `fc` or behind the layers (a plain `eagle3` head), the MLPs start at those of the target's last layers.
    """
    config = head.config
    head.fc.weight.mul_(0.1)
    head.fc.weight[:, -config.target_hidden_size :] += torch.eye(config.hidden_size, config.target_hidden_size)
    output = target.model.get_output_embeddings()
    if config.kind != "eagle1" and output is not None and output.weight.shape[1] == config.hidden_size:
        with align_module_device(output):  # brings back what accelerate keeps elsewhere
            head.lm_head.weight.copy_(output.weight[vocabulary.to(output.weight.device)].float())
    if config.kind != "eagle3" or config.fc_norm or config.norm_before_fc or config.norm_output:
        return
    own: list[Any] = [head.midlayer, *head.layers]
    for mine, last in zip(reversed(own), reversed(layers_of(target)), strict=False):
        mlp: Any = getattr(last, "mlp", None)
        norm = _norm_before_mlp(last)
        names = [name for name, _ in mine.mlp.named_children() if name != "act_fn"]
        if norm is None or not all(_alike(getattr(mlp, name, None), getattr(mine.mlp, name).weight) for name in names):
            continue
        for name in names:
            with align_module_device(getattr(mlp, name)):
                getattr(mine.mlp, name).weight.copy_(getattr(mlp, name).weight.float())
        with align_module_device(norm):
            factors = norm(torch.ones_like(norm.weight))  # ones have size 1: what becomes of them multiplies
            mine.post_attention_layernorm.weight.copy_(factors.float())


def _norm_before_mlp(layer: nn.Module) -> Any:
    """The RMS norm that a layer's MLP reads, by transformers' names; None where there is none, or the MLP has one behind it."""
    norm = getattr(layer, "post_attention_layernorm", None)
    if hasattr(layer, "post_feedforward_layernorm") or isinstance(norm, nn.LayerNorm):
        return None
    return norm if isinstance(getattr(norm, "weight", None), nn.Parameter) else None


def _alike(part: nn.Module | None, weight: Tensor) -> bool:
    """Whether a part of a target is a matrix of plain numbers, of the shape of `weight`."""
    theirs = getattr(part, "weight", None)
    return type(theirs) is nn.Parameter and theirs.shape == weight.shape and theirs.dtype in DTYPES.values()


def describe_target(target: Target) -> dict[str, str | None]:
    """What identifies a target, for a head's provenance.

    `target`: its name; `revision`: the hub's commit, where it came from there; `weights`: a fingerprint of the weights as they
    were loaded, in their dtype and with their adapter.
    """
    return {"target": target.name, "revision": commit(target.name), "weights": weights_fingerprint(target)}


def save_head(head: DraftHead, folder: Path, provenance: dict[str, Any]) -> None:
    """Write config, weights and provenance, all or nothing."""
    with folder_atomic(folder) as temporary:
        head.save_pretrained(temporary)
        (temporary / "provenance.json").write_text(json.dumps({**provenance, "versions": versions()}, indent=2) + "\n")


def locate(draft: str | Path) -> Path:
    """The folder of a draft: a local one as it is, a hub id's in the hub's cache.

    Raises:
        SlipstreamError: If there is no such folder, and no such repository either.
    """
    path = Path(draft).expanduser()
    if path.exists():
        return path
    if str(draft).count("/") != 1:
        raise SlipstreamError(f"draft head {str(draft)!r} does not exist")
    return fetch(str(draft))


def trained_think(folder: Path) -> bool | None:
    """What the chat template was told about thinking where a head was trained; None where nothing, or nobody says."""
    think: bool | None = read_provenance(folder).get("recipe", {}).get("data", {}).get("think")
    return think


def trained_adapter(folder: Path, target: str) -> str | None:
    """The adapter that a head's target had, where `target` is that target's name; None where it had none, or nobody says."""
    if not same_place(read_json(folder / "config.json").get("target_name") or "", target):
        return None  # it may be the merged one
    adapter: str | None = read_provenance(folder).get("recipe", {}).get("target", {}).get("adapter")
    return adapter


def read_provenance(folder: Path) -> dict[str, Any]:
    """Where a head came from; empty where nobody says."""
    file = folder / "provenance.json"
    return read_json(file) if file.is_file() else {}


def _trained_on(folder: Path) -> tuple[str, torch.dtype | None] | None:
    """Fingerprint of the weights that a head was trained on, and the dtype these had; None where nobody says."""
    told = read_provenance(folder)
    dtype = Recipe.written(told.get("recipe") or {}, folder / "provenance.json")["target"]["dtype"]
    return (told["weights"], DTYPES.get(dtype)) if told.get("weights") else None


def is_head(folder: Path) -> bool:
    """Whether a folder is to be read as a draft head rather than as a causal LM."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return True
    return kind == DraftConfig.model_type or kind not in CONFIG_MAPPING


def check_head(folder: Path) -> None:
    """Make sure that a folder holds a draft head.

    Raises:
        SlipstreamError: If it does not, or in a pickle, which could run any code, or in files outside the folder.
    """
    if not (folder / "config.json").is_file():
        raise SlipstreamError(f"{folder} holds no draft head: config.json is missing")
    if read_json(folder / "config.json").get("model_type") != DraftConfig.model_type:
        raise SlipstreamError(f"{folder} holds no draft head of slipstream's; slipstream import reads other projects'")
    if not any(folder.glob("*.safetensors")):
        raise SlipstreamError(
            f"{folder} holds no draft head: model.safetensors is missing (pickled weights are not read)"
        )
    index = folder / "model.safetensors.index.json"
    for file in read_index(index).values() if index.is_file() else ():
        if not file.endswith(".safetensors"):
            raise SlipstreamError(f"{index} names {file!r}, which is no safetensors file; nothing was read")


def load_head(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DraftHead:
    """Read a head from its folder, or from the hub.

    Raises:
        SlipstreamError: If there is none, its weights are no safetensors, or a tensor is missing, unexpected, unreadable or of
            another shape than config.json says.
    """
    path = locate(folder)
    check_head(path)
    try:
        head, info = DraftHead.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise SlipstreamError(f"draft head {str(folder)!r} cannot be read: {why}") from error
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        raise SlipstreamError(
            f"draft head {str(folder)!r}: {name} has shape {list(shape)}, config.json asks for {list(wanted)}"
        )
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise SlipstreamError(
                f"draft head {str(folder)!r}: {what.replace('_', ' ')} {sorted(map(str, info[what]))}"
            )
    head.trained_on = _trained_on(path)
    head.eval().requires_grad_(False)
    return head.to(device)
