"""Real clients: the speculators package, in a Python of its own (`make test-clients`), loads and converts our exports."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import save_llama
from safetensors.torch import load_file, save_file
from test_formats import LAYERS, VARIANTS, decoded
from tiny import tiny_head

import slipstream
from slipstream.distill.attention import UnrollAttention
from slipstream.distill.foreign import import_head
from slipstream.distill.formats import export_head
from slipstream.distill.heads import load_head

PYTHON = os.environ.get("SLIPSTREAM_SPECULATORS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="SLIPSTREAM_SPECULATORS_PYTHON names no Python with speculators"),
]
STEPS = 3

FORWARD = """
import sys, torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

for folder in sys.argv[1:]:
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    batch = load_file(folder + ".batch")
    with torch.no_grad():
        model(**batch, document_ids=torch.zeros_like(batch["input_ids"]), ttt_steps=3)
    save_file({"logits": torch.cat(seen), "layers": torch.tensor(model.target_layer_ids)}, folder + ".logits")
"""

CONVERT = """
import json, sys
from speculators.convert import convert_model

model, verifier, out, ids = sys.argv[1:]
convert_model(model=model, verifier=verifier, algorithm="eagle3", output_path=out,
              eagle_aux_hidden_state_layer_ids=json.loads(ids))
"""


def client(script: str, *arguments: object) -> None:
    """Run a script in the client's Python, without compiling."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def target(request, tmp_path, tiny_tokenizer):
    save_llama(tmp_path / "target", tiny_tokenizer, **LAYERS, tie_word_embeddings=request.param)
    return slipstream.load_target(str(tmp_path / "target"), dtype="float32")


@torch.no_grad()
def unrolled(head, target, ids):
    """Logits of each unroll step over all rows, [K, L, Vd], and the batch as speculators wants it.

    Row p reads the embedding of token p+1; speculators leaves that shift to its data, so it is given the tokens from 1 on.
    """
    features = target.forward(ids).features
    length = ids.shape[1]
    shifted = torch.cat([ids[:, 1:], ids.new_zeros(1, 1)], 1)
    hidden, attend, logits = head.fuse(features), UnrollAttention(), []
    for step in range(STEPS):
        tokens = torch.cat([shifted[:, step:], ids.new_zeros(1, step)], 1)
        position = (torch.arange(length) + step)[None]
        hidden = head(head.embed(target.embeddings(tokens)), hidden, position, attend)
        logits.append(head.logits(hidden))
    batch = {"hidden_states": features, "input_ids": shifted, "position_ids": torch.arange(length)[None]}
    return torch.cat(logits), {key: value.contiguous() for key, value in batch.items()}


def test_speculators_forward_gives_our_logits(tmp_path, target):
    ids = torch.randint(3, 280, (1, 11), generator=torch.Generator().manual_seed(0))
    wanted = {}
    for i, settings in enumerate([{}, *VARIANTS, {"size": target.vocab_size}, {"residual": True}]):
        folder, settings = str(tmp_path / f"export{i}"), dict(settings)
        residual = settings.pop("residual", False)
        head = tiny_head(target, **settings)
        head.config.norm_before_residual = head.midlayer.norm_before_residual = residual
        export_head(head, "speculators", Path(folder), target=target)
        wanted[folder], batch = unrolled(head, target, ids)
        save_file(batch, f"{folder}.batch")
    client(FORWARD, *wanted)
    for folder, logits in wanted.items():
        theirs = load_file(f"{folder}.logits")
        assert theirs["layers"].tolist() == head.layer_ids
        torch.testing.assert_close(theirs["logits"], logits, rtol=1e-4, atol=1e-4)


def test_speculators_converts_our_eagle_export_and_we_read_it_back(tmp_path, target):
    head = tiny_head(target, 64)
    export_head(head, "eagle", tmp_path / "eagle")
    client(CONVERT, tmp_path / "eagle", target.name, tmp_path / "converted", json.dumps(head.layer_ids))
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == head.layer_ids
    foreign = import_head(Path(tmp_path / "converted"), tmp_path / "back")
    assert foreign.format == "speculators"
    back = load_head(tmp_path / "back")
    assert {key: value.tolist() for key, value in back.state_dict().items()} == {
        key: value.tolist() for key, value in head.state_dict().items()
    }
    assert back.config.rope_parameters == head.config.rope_parameters
    assert decoded(target, back) == decoded(target, head)
