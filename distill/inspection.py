"""What a folder with a draft head holds, and which engines will take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from slipstream.configs.errors import SlipstreamError
from slipstream.distill.draft import DraftConfig, DraftHead
from slipstream.distill.foreign import flatten, format_of, read_foreign
from slipstream.distill.formats import EMBEDDINGS, ENGINES, FORMATS, export_tensors, obstacle, outputs_of
from slipstream.distill.heads import load_head, read_provenance
from slipstream.distill.tensors import read_json, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        facts: What the folder holds, by name.
        engines: Per engine what it needs or why it will not take the folder; empty where it takes it as it is.
    """

    facts: dict[str, str]
    engines: dict[str, str]


def inspect_head(folder: Path, target: str | None = None) -> Inspection:
    """Look into a folder: one of our heads, or another project's.

    Raises:
        SlipstreamError: If config.json or the weights cannot be read.
    """
    raw = read_json(folder / "config.json")
    tensors = read_tensors(folder)
    name = format_of(folder, raw)
    if name == "slipstream":
        config = load_head(folder).config
        reasons = {engine: obstacle(config, engine) for engine in ENGINES}
        engines = {engine: f"no: it {why}" if why else f"after export --to {engine}" for engine, why in reasons.items()}
        return Inspection(_facts(name, config, tensors) | _origin(folder), {"slipstream": "", **engines})
    try:
        foreign = read_foreign(folder, target)
    except SlipstreamError as error:
        return Inspection({"format": name}, {"slipstream": f"no: {error}", **dict.fromkeys(ENGINES, "not judged")})
    found = {engine: _obstacles(engine, foreign.config, flatten(folder, raw), set(tensors)) for engine in ENGINES}
    engines = {engine: f"no: {'; '.join(why)}" if why else "" for engine, why in found.items()}
    facts = _facts(name, foreign.config, tensors) | {f"note {i}": note for i, note in enumerate(foreign.notes, 1)}
    return Inspection(facts, {"slipstream": "after import", **engines})


def _obstacles(engine: str, config: DraftConfig, stated: dict[str, Any], names: set[str]) -> list[str]:
    """What keeps an engine from loading the folder as it is, or from loading it rightly."""
    if why := obstacle(config, engine):
        return [f"it {why}"]
    form = FORMATS[config.kind][engine]
    found = []
    if not set(stated.get("architectures") or []) & set(form.architectures):
        found.append(f"it wants {form.architectures[0]!r} in architectures, not {stated.get('architectures')}")
    if engine == "speculators" and "speculators_model_type" not in stated:
        found.append("it wants speculators_model_type")
    with torch.device("meta"):
        wanted = set(export_tensors(DraftHead(config), engine, None))
    wanted |= {EMBEDDINGS} if form.embeddings else set()
    first = next((prefix for prefix in form.first if any(key.startswith(prefix) for key in names)), None)
    if first is None:
        found.append(f"it wants the layer's tensors as {form.first[0]}*")
        wanted = {key for key in wanted if not key.startswith(form.first[0])}
    known = {key.replace(first, form.first[0], 1) if first and key.startswith(first) else key for key in names}
    if missing := sorted(wanted - known - {"d2t", "t2d"}):
        found.append(f"it misses {missing}")
    if form.strict and (unknown := sorted(known - wanted - {EMBEDDINGS, "t2d"})):
        found.append(f"it stops at {unknown}")
    return found


def _origin(folder: Path) -> dict[str, str]:
    """Which revision of its target a head was trained on, and a fingerprint of its weights, where provenance.json says."""
    told = read_provenance(folder)
    what = {"target's revision": told.get("revision"), "target's weights": told.get("weights")}
    return {name: str(value or "not recorded") for name, value in what.items()}


def _facts(name: str, config: DraftConfig, tensors: dict[str, Tensor]) -> dict[str, str]:
    ids = config.eagle_aux_hidden_state_layer_ids or []
    weights = [value for value in tensors.values() if value.is_floating_point()]
    return {
        "format": name,
        "kind": config.kind,
        "target": config.target_name or "not named",
        "layers": str(config.num_hidden_layers),
        "width": f"{config.hidden_size}, of the target {config.target_hidden_size}",
        "attention": f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} of keys",
        "vocabulary": f"{config.draft_vocab_size} of {config.vocab_size}",
        "reads": f"states entering layers {ids}, outputs of layers {outputs_of(ids)}",
        "rope": ", ".join(f"{key} {value}" for key, value in config.rope_parameters.items()),
        "embeddings": "a copy in the file" if EMBEDDINGS in tensors else "the target's",
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights})),
        "parameters": f"{sum(value.numel() for value in weights):,}",
    }
