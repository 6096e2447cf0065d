"""A target that is spread over devices gives what a whole one gives; from a store its layers are left where they are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from test_trainer import RECIPE, answers, dataset
from tiny import tiny_head, tiny_target
from transformers import AutoModelForCausalLM

from slipstream.cli import main
from slipstream.data.batches import Batches
from slipstream.distill.target import Target, load_target
from slipstream.train.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [f"model.layers.{i}" for i in range(4)]
SPLITS = {  # what of a Llama lies in memory; the rest lies on the disk and is read when it is needed
    "a layer on the disk": [*LAYERS[:2], LAYERS[3], "model.embed_tokens", "model.norm", "lm_head"],
    "ends on the disk": LAYERS,
    "all on the disk": [],
}


def spread(folder: Path, split: list[str], offload: Path) -> Target:
    parts = ["model.embed_tokens", *LAYERS, "model.norm", "model.rotary_emb", "lm_head"]
    places = {part: "cpu" if part in split else "disk" for part in parts}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=str(offload)
    )
    return Target(model, name="llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_target().model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_spread_target_gives_the_states_of_a_whole_one(folder, tmp_path, split):
    ours, whole = spread(folder, split, tmp_path), tiny_target()
    assert ours.spread
    assert not whole.spread
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    mine, theirs = ours.capture(ids), whole.capture(ids)
    assert torch.equal(mine.features, theirs.features)
    assert torch.equal(mine.hidden, theirs.hidden)
    assert torch.equal(ours.logits(mine.hidden[0]), whole.logits(theirs.hidden[0]))


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_head_learns_the_same_from_a_spread_target(folder, tmp_path, split, kind):
    losses = []
    for name, target in (("ours", spread(folder, split, tmp_path / "offload")), ("whole", tiny_target())):
        if kind == "eagle1":
            target = target.reading([4])
        trainer = Trainer(
            RECIPE, target, tiny_head(target, kind=kind).train(), Batches(dataset(answers()), 120, 0), tmp_path / name
        )
        losses.append([row["loss"] for row in trainer.run()])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_without_its_layers_a_target_is_moved_at_its_ends(architecture):
    target = tiny_target(architecture, tie_word_embeddings=False)
    target.place(torch.device("meta"), layers=False)
    moved = {name for name, parameter in target.model.named_parameters() if parameter.is_meta}
    output = target.model.get_output_embeddings()
    ends = [target.embeddings.weight, output.weight]
    assert moved == {name for name, x in target.model.named_parameters() if any(x is end for end in ends)}


def test_the_recipe_spreads_the_target(tiny_target_folder, tmp_path, monkeypatch, capsys, datasets_cache):
    talks = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello"}]
    talks.write_text((json.dumps({"messages": messages}) + "\n") * 10)
    recipe = ["--target.name", str(tiny_target_folder), "--data.conversations", str(talks), "--train.max_steps", "2"]
    assert not load_target(str(tiny_target_folder), device="auto").spread  # this machine has one device
    for name, options in (("whole", []), ("auto", ["--target.device_map", "auto"])):
        assert main(["train", *recipe, *options, "--out", str(tmp_path / name)]) == 0
    weights = [(tmp_path / name / "draft" / "model.safetensors").read_bytes() for name in ("whole", "auto")]
    assert weights[0] == weights[1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    capsys.readouterr()
    for command in ("train", "capture"):
        options = recipe[:4] if command == "capture" else recipe
        assert main([command, *options, "--target.device_map", "auto", "--out", str(tmp_path / command)]) == 2
        assert "launch one process a machine" in capsys.readouterr().err
