"""A target in shards: every process holds its part, all get what a whole target gives, and what cannot work is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_launch import ADAMW, FILES, alone, assert_same, cpus, launch, port, run
from test_plan import CARDS, SHAPES
from tiny import ARCHITECTURES, tiny_target

from slipstream import cli
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings, DistillSettings, Recipe, TargetSettings
from slipstream.distill.shards import layers_of, shard
from slipstream.train.footprint import size_of
from slipstream.train.plan import Text, outline, shortages, stages

__all__ = ["alone"]  # a fixture


@pytest.mark.slow
def test_targets_of_every_architecture_give_the_same_and_their_layers_come_one_by_one():
    run("sharded.py", options=cpus(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_under_deepspeed_a_head_learns_the_same_from_shards(alone, tmp_path, name):
    pytest.importorskip("deepspeed")
    launch(
        tmp_path,
        {**ADAMW, "accumulation": 2, "shard_target": True},
        *("--config_file", FILES / f"{name}.yaml", "--num_processes", 2, "--main_process_port", port()),
        launcher="accelerate.commands.launch",
        DS_ACCELERATOR="cpu",
    )
    assert_same(tmp_path, alone, 2, held=0.5)


@pytest.fixture
def recipe(tiny_target_folder, tmp_path) -> list[str]:
    """Options of a target in shards, and of conversations."""
    talks = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello"}]
    talks.write_text((json.dumps({"messages": messages}) + "\n") * 10)
    options = ["--target.name", str(tiny_target_folder), "--target.shard", "true", "--train.max_steps", "4"]
    return [*options, "--data.conversations", str(talks), "--data.batch_tokens", "32"]


@pytest.mark.slow
@pytest.mark.usefixtures("datasets_cache")
def test_the_command_trains_and_says_whose_the_head_is(recipe, tmp_path):
    same = ["--train.mixed_precision", "no", "--train.optimizer", "adamw"]
    command = ["train", *recipe, *same, "--out", tmp_path / "shards"]
    run(cli.__file__, *command, options=cpus(2), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    whole = ["--target.shard", "false", "--train.accumulation", "2", "--out", str(tmp_path / "whole")]
    assert main(["train", *recipe, *same, *whole]) == 0
    ours, theirs = (tmp_path / name / "draft" for name in ("shards", "whole"))
    for name, weight in load_file(theirs / "model.safetensors").items():
        torch.testing.assert_close(load_file(ours / "model.safetensors")[name], weight, rtol=1e-3, atol=2e-5)
    said = [json.loads((folder / "provenance.json").read_text()) for folder in (ours, theirs)]
    assert said[0]["weights"] == said[1]["weights"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_found_in_every_architecture(architecture):
    target = tiny_target(architecture)
    layers = layers_of(target)
    assert len(layers) == target.config.num_hidden_layers
    own = {id(x) for x in layers.parameters()}
    rest = [x for x in target.model.parameters() if id(x) not in own]
    assert size_of(rest) < size_of(layers.parameters())


def test_the_plan_counts_a_share_of_the_layers_and_those_that_are_gathered(tmp_path):
    SHAPES["meta-llama/Llama-3.3-70B-Instruct"].save_pretrained(tmp_path)
    data = DataSettings(max_length=2048, batch_tokens=2048)
    settings = Recipe(target=TargetSettings(str(tmp_path)), data=data, distill=DistillSettings(steps=1))
    sharded = replace(settings, target=replace(settings.target, shard=True))
    target, head = outline(settings)
    machine = replace(CARDS, processes=16)
    whole, parts = (
        stages(recipe, target, head, Text.unknown(settings.data), machine) for recipe in (settings, sharded)
    )
    layers = layers_of(target)
    saved = size_of(layers.parameters()) * 15 / 16
    assert whole[2].held["target"] - parts[2].held["target"] == pytest.approx(saved)
    gathered = parts[2].passing["target's forward"] - whole[2].passing["target's forward"]
    assert gathered == 3 * size_of(layers[0].parameters())
    assert "target.shard" in shortages(settings, whole[2:], machine)[0]
    assert not shortages(sharded, parts[2:], machine)
    assert whole[:2] == parts[:2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "needs several processes"),
        (["--target.device_map", "auto"], "set one of them"),
        (["--data.features", "a/store"], "leave target.shard out"),
        (["--distill.keep_features", "true", "--data.batches", "2"], "capture a store"),
        (["--train.measure_every", "5"], "holds no whole target"),
    ],
)
@pytest.mark.usefixtures("datasets_cache")
def test_what_cannot_work_is_refused_in_one_line(recipe, tmp_path, capsys, options, named):
    assert main(["train", *recipe, "--out", str(tmp_path / "run"), *options]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert named in line
    assert not any("Traceback" in other for other in before)


def test_capture_is_sent_to_a_device_map(tiny_target_folder, tmp_path, capsys):
    options = ["--target.name", str(tiny_target_folder), "--target.shard", "true", "--out", str(tmp_path / "store")]
    assert main(["capture", *options]) == 2
    assert "use target.device_map" in capsys.readouterr().err


def test_quantised_weights_are_not_cut_up():
    target = tiny_target()
    target.model.config.quantization_config = {"quant_method": "any"}
    with pytest.raises(SlipstreamError, match="quantised"):
        shard(target, torch.device("cpu"))
