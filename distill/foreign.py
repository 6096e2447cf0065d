"""Draft heads of other projects, read and checked: SafeAILab's, SGLang's, vLLM's and speculators' checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers.activations import ACT2FN

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic
from slipstream.configs.suggest import near
from slipstream.distill.draft import DraftConfig, DraftHead
from slipstream.distill.formats import EMBEDDINGS, FORMATS, LAYER, VARIANTS, outputs_of
from slipstream.distill.heads import read_provenance, versions
from slipstream.distill.target import aux_layer_ids, load_target, target_config
from slipstream.distill.tensors import read_json, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_ASSUMED = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
"""What EAGLE's code and transformers' LlamaConfig, and so SGLang and vLLM, take where config.json lacks the key."""


@dataclass(frozen=True)
class Foreign:
    """A head of another project, in our names.

    Attributes:
        config: As our heads have it.
        tensors: Named and shaped as our head's.
        format: Whose layout it is.
        notes: What was not stated in config.json, and what was taken instead.
    """

    config: DraftConfig
    tensors: dict[str, Tensor]
    format: str
    notes: tuple[str, ...]


def format_of(folder: Path, config: dict[str, Any]) -> str:
    """Whose layout a folder's config.json is: `slipstream`, or one of `ENGINES`."""
    if config.get("model_type") == DraftConfig.model_type:
        return "slipstream"
    if "speculators_model_type" in config:
        return "speculators"
    stated = config.get("architectures") or []
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise SlipstreamError(f"{folder}/config.json: architectures must be a list of names, not {stated!r}")
    names = ((form.architectures[0], name) for forms in FORMATS.values() for name, form in forms.items())
    return next((name for architecture, name in names if architecture in stated), "eagle")


def flatten(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys of `transformer_layer_config`, where speculators nests them, at the top."""
    return {**_mapping(folder, config, "transformer_layer_config"), **config}


def import_head(folder: Path, out: Path, *, target: str | None = None) -> Foreign:
    """Read a head of another project and write it as one of ours.

    Args:
        folder: config.json and the weights.
        out: Folder of our head.
        target: Its target's name, for what its config.json does not say; the head is bound to it.

    Raises:
        SlipstreamError: If something is missing, unexpected, damaged or contradictory; the message names it.
    """
    foreign = read_foreign(folder, target)
    provenance = read_provenance(folder)
    imported = {"folder": str(folder), "format": foreign.format, "notes": list(foreign.notes)}
    with folder_atomic(out) as temporary:
        foreign.config.save_pretrained(temporary)
        save_file(foreign.tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps({**provenance, "imported": imported, "versions": versions()}, indent=2) + "\n"
        (temporary / "provenance.json").write_text(text, encoding="utf-8")
        if (folder / "decode.json").is_file():
            (temporary / "decode.json").write_bytes((folder / "decode.json").read_bytes())
    return foreign


def read_foreign(folder: Path, target: str | None = None) -> Foreign:
    """A head of another project in our names, every tensor and shape checked; arguments and errors as `import_head`."""
    raw = read_json(folder / "config.json")
    name = format_of(folder, raw)
    if name == "slipstream":
        raise SlipstreamError(f"{folder} is a draft head of slipstream's already")
    stated = flatten(folder, raw)
    if name == "speculators" and stated["speculators_model_type"] != "eagle3":
        raise SlipstreamError(f"{folder} holds a {stated['speculators_model_type']!r} speculator; only eagle3 is read")
    if name == "speculators" and "norm_before_residual" not in stated:
        raise SlipstreamError(f"{folder}/config.json lacks norm_before_residual: speculators takes false, vLLM true")
    given = read_tensors(folder)
    fused = name == "speculators" or "agle3" in str(stated.get("architectures"))
    kind = "eagle3" if fused or any(key.startswith(LAYER) or "hidden_norm" in key for key in given) else "eagle1"
    tensors = {_our_name(key): value for key, value in given.items()}
    notes: list[str] = []
    try:
        config = _config(folder, stated, tensors, kind, target, notes)
    except StrictDataclassError as error:
        raise SlipstreamError(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    except KeyError as error:  # transformers 5.0 looks at the rope when a config is made, later ones in `_check`
        raise SlipstreamError(f"{folder}/config.json: rope lacks or misnames {error}") from error
    _complete(folder, config, stated, tensors, target, notes)
    _check(folder, config, tensors)
    return Foreign(config, {key: value.contiguous() for key, value in tensors.items()}, name, tuple(notes))


def _our_name(key: str) -> str:
    """`layers.0.` is our `midlayer.`; further layers are counted from 1 elsewhere, from 0 here."""
    if key.startswith("layers.0."):
        return key.replace("layers.0.", LAYER, 1)
    return re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) - 1}", key)


def _config(
    folder: Path, stated: dict[str, Any], tensors: dict[str, Tensor], kind: str, target: str | None, notes: list[str]
) -> DraftConfig:
    """Our config from what is stated, else from the shapes, else from the target; what is assumed is noted."""
    sizes = {key: _size(folder, stated, key) for key in ("hidden_size", "num_attention_heads", "vocab_size")}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise SlipstreamError(
            f"{folder}/config.json: hidden_size {sizes['hidden_size']} is no multiple of num_attention_heads "
            f"{sizes['num_attention_heads']}"
        )
    theirs = target_config(target) if target is not None else None
    for key in ("hidden_size", "vocab_size"):
        if theirs is not None and getattr(theirs, key) != sizes[key]:
            raise SlipstreamError(
                f"{folder}/config.json claims {key} {sizes[key]}, but target {target!r} has {getattr(theirs, key)}"
            )
    if (wide := stated.get("target_hidden_size") or sizes["hidden_size"]) != sizes["hidden_size"]:
        raise SlipstreamError(
            f"{folder} is a head of width {sizes['hidden_size']} for a target of width {wide}; they must be equal"
        )
    dtype = _find(folder, tensors, "fc.weight").dtype
    rows = {
        part: len(_find(folder, tensors, f"{LAYER}{part}_proj.weight"))
        for part in ("self_attn.q", "self_attn.k", "mlp.gate")
    }
    head_dim = _size(folder, stated, "head_dim", rows["self_attn.q"] // sizes["num_attention_heads"])
    verifier = _mapping(folder, _mapping(folder, stated, "speculators_config"), "verifier").get("name_or_path")
    bound = target or _mapping(folder, stated, "slipstream").get("target") or verifier or ""
    if not isinstance(bound, str):
        raise SlipstreamError(f"{folder}/config.json: the target's name must be a text, not {bound!r}")
    if not bound:
        notes.append("no target is named: the head will be used with any of its width and vocabulary")
    return DraftConfig(
        **sizes,
        **{key: _stated_or(folder, stated, key, notes) for key in _ASSUMED if key != "rope_theta"},
        **{key: stated.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **{flag: bool(stated.get(flag)) for flag in VARIANTS},
        kind=kind,
        head_dim=head_dim,
        num_key_value_heads=_size(folder, stated, "num_key_value_heads", rows["self_attn.k"] // head_dim),
        intermediate_size=_size(folder, stated, "intermediate_size", rows["mlp.gate"]),
        num_hidden_layers=_size(folder, stated, "num_hidden_layers", 1),
        rope_parameters=_rope(folder, stated, notes),
        draft_vocab_size=_size(folder, stated if kind == "eagle3" else {}, "draft_vocab_size", sizes["vocab_size"]),
        target_hidden_size=sizes["hidden_size"],
        eagle_aux_hidden_state_layer_ids=_layer_ids(folder, stated, kind, theirs and theirs.num_hidden_layers, notes),
        target_name=bound,
        tie_word_embeddings=False,
        fc_bias="fc.bias" in tensors and bool(tensors["fc.bias"].any()),
        architectures=[DraftHead.__name__],
        dtype=dtype,
    )


def _mapping(folder: Path, stated: dict[str, Any], key: str) -> dict[str, Any]:
    """What is nested under a key; nothing where it is missing or null."""
    value = stated.get(key)
    if value is not None and not isinstance(value, dict):
        raise SlipstreamError(f"{folder}/config.json: {key} must be a mapping, not {value!r}")
    return value or {}


def _size(folder: Path, stated: dict[str, Any], key: str, otherwise: int | None = None) -> int:
    value = otherwise if stated.get(key) is None else stated[key]
    if not isinstance(value, int) or value < 1:
        raise SlipstreamError(f"{folder}/config.json: {key} must be a number above 0, not {value!r}")
    return value


def _find(folder: Path, tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise SlipstreamError(f"{folder}: missing tensors {[key]}")
    return tensors[key]


def _stated_or(folder: Path, stated: dict[str, Any], key: str, notes: list[str]) -> Any:
    assumed = _ASSUMED[key]
    if stated.get(key) is None:
        notes.append(f"{key} is not stated: {assumed}, which EAGLE, SGLang and vLLM take then")
        return assumed
    kinds = str if isinstance(assumed, str) else (int, float)  # transformers 5.0 takes any
    if not isinstance(stated[key], kinds):
        raise SlipstreamError(f"{folder}/config.json: {key} must be like {assumed!r}, not {stated[key]!r}")
    if key == "hidden_act" and stated[key] not in ACT2FN:
        raise SlipstreamError(f"{folder}/config.json: unknown hidden_act {stated[key]!r}{near(stated[key], ACT2FN)}")
    return stated[key]


def _rope(folder: Path, stated: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Rope parameters from the spellings of transformers 4 and 5."""
    rope = dict(_mapping(folder, stated, "rope_parameters") or _mapping(folder, stated, "rope_scaling"))
    kind = rope.pop("type", "default")
    theta = _stated_or(folder, rope if rope.get("rope_theta") else stated, "rope_theta", notes)
    return {"rope_type": kind, **rope, "rope_theta": float(theta)}


def _layer_ids(
    folder: Path, stated: dict[str, Any], kind: str, target_layers: int | None, notes: list[str]
) -> list[int]:
    """Layers whose entering states the head reads, from either spelling, else by EAGLE's rule from the target.

    Worked example: `eagle_config` says [1, 15, 28], outputs of layers; the states entering [2, 16, 29] are the same.
    """
    entering = stated.get("eagle_aux_hidden_state_layer_ids")
    nested = _mapping(folder, stated, "eagle_config").get("eagle_aux_hidden_state_layer_ids")
    tagged = _mapping(folder, stated, "slipstream").get("layer_ids")
    for ids, low in ((entering, 0), (tagged, 0), (nested, -1)):
        if ids and not (isinstance(ids, list) and all(isinstance(i, int) and i >= low for i in ids)):
            raise SlipstreamError(f"{folder}/config.json: layer ids must be a list of numbers, not {ids!r}")
    ids = entering or tagged
    if ids and ((tagged or ids) != ids or (nested or ids) not in (ids, outputs_of(ids))):
        raise SlipstreamError(
            f"{folder}/config.json contradicts itself on layer ids: inputs of {entering} at the top, inputs of {tagged} by "
            f"slipstream's tag, outputs of {nested} in eagle_config"
        )
    if ids:
        return list(ids)
    if nested and nested[0] in (1, 2):  # SGLang's rule since pull request 25454: outputs where the first is 1
        return [i + 1 for i in nested] if nested[0] == 1 else list(nested)
    if nested:
        raise SlipstreamError(
            f"{folder}/config.json: layer ids {nested} in eagle_config may be outputs or inputs of layers; write the "
            "layers whose inputs are meant as eagle_aux_hidden_state_layer_ids at the top"
        )
    if target_layers is None:
        raise SlipstreamError(f"{folder}/config.json says no layer ids; name the target with --target")
    ids = [target_layers] if kind == "eagle1" else aux_layer_ids(target_layers)
    notes.append(
        f"layer ids are not stated: {ids}, by the rule of {kind.upper()} for a target of {target_layers} layers"
    )
    return ids


def _complete(
    folder: Path,
    config: DraftConfig,
    stated: dict[str, Any],
    tensors: dict[str, Tensor],
    target: str | None,
    notes: list[str],
) -> None:
    """Bring in place what others leave out, an output matrix that is the target's and vocabulary maps; drop the idle."""
    if not config.fc_bias:
        tensors.pop("fc.bias", None)  # zeros, which SGLang's EAGLE-1 wants
    embeddings = tensors.pop(EMBEDDINGS, None)
    if embeddings is not None:
        if list(embeddings.shape) != [config.vocab_size, config.hidden_size]:
            raise SlipstreamError(
                f"{folder}: {EMBEDDINGS} has shape {list(embeddings.shape)}, config.json claims a vocabulary of "
                f"{config.vocab_size} and a width of {config.hidden_size}"
            )
        notes.append(f"{EMBEDDINGS} was left out: the target's own embeddings are used")
    tied = bool(stated.get("tie_word_embeddings"))
    if config.kind == "eagle3" and "lm_head.weight" not in tensors and (tied or stated.get("draft_vocab_size") is None):
        if tied and embeddings is not None:
            tensors["lm_head.weight"] = embeddings
        elif target is None:
            raise SlipstreamError(f"{folder} has no lm_head.weight, the target's is meant; name it with --target")
        else:
            model = load_target(target, dtype=torch.float32).model
            output = model.get_input_embeddings() if tied else model.get_output_embeddings()
            tensors["lm_head.weight"] = output.weight.detach().to(tensors["fc.weight"].dtype).clone()
        notes.append("lm_head.weight is " + ("the embeddings" if tied else "the target's"))
    if "d2t" not in tensors and config.draft_vocab_size == config.vocab_size:
        tensors["d2t"] = torch.zeros(config.vocab_size, dtype=torch.long)
    if "d2t" in tensors:
        _complete_vocabulary(folder, config, tensors)


def _complete_vocabulary(folder: Path, config: DraftConfig, tensors: dict[str, Tensor]) -> None:
    """Hold `d2t` against the vocabularies, and `t2d` against `d2t`; make `t2d` where it was left out."""
    tensors["d2t"] = tensors["d2t"].long()
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    if len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise SlipstreamError(
            f"{folder}: d2t names a token twice, or one outside the vocabulary of {config.vocab_size} in config.json"
        )
    members = torch.zeros(config.vocab_size, dtype=torch.bool)
    members[ids] = True
    given = tensors.get("t2d", members).bool()
    if given.shape != members.shape:
        raise SlipstreamError(
            f"{folder}: config.json claims a vocabulary of {config.vocab_size}, t2d is for one of {len(given)}"
        )
    if not torch.equal(given, members):
        raise SlipstreamError(f"{folder}: t2d marks other tokens than d2t names")
    tensors["t2d"] = members


def _check(folder: Path, config: DraftConfig, tensors: dict[str, Tensor]) -> None:
    """Every tensor of the head is there in its shape, and nothing else is."""
    try:
        with torch.device("meta"):
            expected = {key: list(value.shape) for key, value in DraftHead(config).state_dict().items()}
    except KeyError as error:
        raise SlipstreamError(
            f"{folder}/config.json: rope {config.rope_parameters} lacks or misnames {error}"
        ) from error
    for what, names in (("missing", set(expected) - set(tensors)), ("unexpected", set(tensors) - set(expected))):
        if names:
            raise SlipstreamError(f"{folder}: {what} tensors {sorted(names)}")
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise SlipstreamError(f"{folder}: {key} has shape {list(tensors[key].shape)}, config.json asks for {shape}")
