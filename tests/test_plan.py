"""`train --plan`: what it foretells, held to what a real step, store and checkpoint take."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import ARCHITECTURES, tiny_target
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from slipstream.cli import _parser, main
from slipstream.commands.data import regenerate
from slipstream.configs.recipe import (
    DataSettings,
    DistillSettings,
    HeadSettings,
    Recipe,
    TargetSettings,
    TrainSettings,
)
from slipstream.data.batches import Batches
from slipstream.distill.capture import claim, finish, plan_store, write_shards
from slipstream.distill.heads import load_head, new_head, save_head
from slipstream.distill.target import Target
from slipstream.planning import figures
from slipstream.train.footprint import ANSWERS, optimizer_bytes, size_of, train_bytes
from slipstream.train.metrics import Metrics
from slipstream.train.optimizer import make_optimizers
from slipstream.train.plan import Machine, Text, forward_flops, outline, shortages, stages
from slipstream.train.trainer import Trainer

LENGTH, BATCH, VOCABULARY = 128, 512, 2000
MACHINE = Machine("cpu", memory=80e9, flops=1e12, disk=1e12)


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """A folder with the config of a Llama in which weights, states and logits all matter; no weights."""
    folder = tmp_path_factory.mktemp("shape")
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    config.save_pretrained(folder)
    return folder


def recipe(
    shape: Path,
    head: dict | None = None,
    train: dict | None = None,
    objective: str = "forward_kl",
    *,
    packed: bool = False,
) -> Recipe:
    return Recipe(
        target=TargetSettings(str(shape)),
        data=DataSettings(max_length=LENGTH, batch_tokens=BATCH, packed=packed),
        head=HeadSettings(**{"draft_vocab_size": VOCABULARY, **(head or {})}),
        distill=DistillSettings(steps=4, single=0.0, objectives={objective: 1.0}),
        train=TrainSettings(**{"max_steps": 4, **(train or {})}),
    )


def real_target(shape: Path) -> Target:
    config = LlamaConfig.from_pretrained(shape)
    return Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), name=str(shape))


def token_rows(rows: int = 16) -> Dataset:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (rows, LENGTH)).tolist()
    return Dataset.from_list([{"input_ids": row, "mask": [1] * LENGTH} for row in ids]).with_format("numpy")


def real_trainer(folder: Path, settings: Recipe, target: Target) -> Trainer:
    head = new_head(target, torch.arange(VOCABULARY), settings.head, seed=0).train()
    return Trainer(settings, target, head, Batches(token_rows(), BATCH, 0, packed=settings.data.packed), folder)


def peak(step) -> int:
    """Bytes allocated above the beginning at the worst moment of a call, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(np.cumsum([change for _, change in changes]))


@pytest.mark.parametrize(
    ("head", "train", "objective", "packed"),
    [
        ({}, {"optimizer": "adamw"}, "forward_kl", False),
        ({}, {"optimizer": "adamw"}, "forward_kl", True),
        ({"kind": "eagle1"}, {"optimizer": "adamw", "ema": 0.9}, "lk_lambda", False),
        ({"kind": "parallel"}, {}, "lk_lambda", False),
        ({"layers": 2, "norm_before_fc": True}, {"mixed_precision": "no"}, "forward_kl", False),
        ({"hidden_size": 128}, {}, "forward_kl", False),
        ({"layers": 2}, {"optimizer": "adamw", "gradient_checkpointing": True}, "forward_kl", False),
    ],
)
def test_a_real_step_takes_the_memory_that_was_foretold(shape, tmp_path, head, train, objective, packed):
    settings = recipe(shape, head, train, objective, packed=packed)
    outlined, empty = outline(settings)
    online = stages(settings, outlined, empty, Text.unknown(settings.data), MACHINE)[2]
    target = real_target(shape).reading(outlined.layer_ids)
    trainer = real_trainer(tmp_path, settings, target)
    trainer._optimize(Metrics(4))
    state = [x for o in trainer.launch.optimizers for kept in o.state.values() for x in kept.values()]
    held = [*target.model.parameters(), *trainer.head.parameters(), *trainer.head.lm_head.parameters()]
    held += [*trainer.head.buffers(), *trainer.average.values(), *state]
    real = size_of(held) + peak(lambda: trainer._optimize(Metrics(4)))
    assert real <= online.memory <= 1.15 * real


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_keep_what_was_foretold(shape, kind):
    settings = recipe(shape, train={"optimizer": kind})
    _, empty = outline(settings)
    head = new_head(real_target(shape), torch.arange(VOCABULARY), settings.head, seed=0)
    optimizers = make_optimizers(head, settings.train)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    state = size_of(x for o in optimizers for kept in o.state.values() for x in kept.values() if x.ndim)
    assert optimizer_bytes(empty, settings.train) == state


def test_a_checkpoint_is_as_large_as_was_foretold(shape, tmp_path):
    settings = recipe(shape)
    target, empty = outline(settings)
    disk = stages(settings, target, empty, Text.unknown(settings.data), MACHINE)[2].disk
    trainer = real_trainer(tmp_path, settings, real_target(shape))
    trainer._optimize(Metrics(4))
    trainer.save()
    save_head(trainer.head, tmp_path / "draft", {})
    written = 2 * (tmp_path / "checkpoint.pt").stat().st_size
    written += (tmp_path / "draft" / "model.safetensors").stat().st_size
    assert disk == pytest.approx(written, rel=0.01)


def test_a_store_is_as_large_as_was_foretold(tiny_tokenizer, tmp_path):
    target, rows, data = tiny_target(), token_rows(), DataSettings()
    target.tokenizer = tiny_tokenizer
    small = rows.map(lambda row: {"input_ids": row["input_ids"] % 97}).with_format("numpy")
    manifest = plan_store(target, small, data, "bfloat16")
    claim(tmp_path, manifest)
    write_shards(target, small, tmp_path, manifest, range(len(manifest.shards)), BATCH)
    finish(tmp_path, manifest)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    settings = Recipe(data=data, train=TrainSettings(max_steps=1))
    head = new_head(target, torch.arange(64), HeadSettings(), seed=0)
    capture = stages(settings, target, head, Text.of(small, data), MACHINE)[1]
    assert capture.disk == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "qwen2_moe"])
def test_flops_of_the_target_are_those_that_are_counted_in_a_forward(architecture):
    assert architecture in ARCHITECTURES
    target = tiny_target(architecture, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(3, 90, (1, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target.model.base_model(input_ids=ids, use_cache=False)
    # Eager attention computes what a mask then hides; the plan counts what is seen.
    shape = target.config
    width = shape.num_attention_heads * (getattr(shape, "head_dim", None) or shape.hidden_size // 4)
    hidden = 2 * 64 * width * shape.num_hidden_layers
    assert forward_flops(target, 64) + hidden == pytest.approx(counter.get_total_flops() / 64, rel=0.1)


def test_a_lora_is_trained_alone(shape, tmp_path):
    head = new_head(real_target(shape), torch.arange(VOCABULARY), HeadSettings(draft_vocab_size=VOCABULARY), seed=0)
    save_head(head, tmp_path / "head", {})
    settings = recipe(shape, {"init": str(tmp_path / "head"), "lora_rank": 4}, {"optimizer": "adamw"})
    target, empty = outline(settings)
    held = train_bytes(empty, settings.train)
    whole = size_of([*load_head(tmp_path / "head").parameters()])
    assert held["head"] > whole > 20 * held["gradients"]
    assert held["optimizer"] == 2 * held["gradients"]
    assert target.layer_ids == head.layer_ids


def test_shards_are_shared(shape):
    settings = recipe(shape, train={"optimizer": "adamw"}).train
    _, empty = outline(recipe(shape))
    alone = train_bytes(empty, settings)
    weights = alone["gradients"]
    assert train_bytes(empty, settings, processes=4) == alone
    assert train_bytes(empty, replace(settings, shard=True), processes=4)["optimizer"] == alone["optimizer"] // 4
    for stage in (1, 2, 3):
        share = train_bytes(empty, settings, processes=4, zero=stage)
        assert share["optimizer"] == (alone["optimizer"] + weights) // 4
        assert share["gradients"] == weights + (weights // 4 if stage > 1 else 0)
        assert share["head"] == alone["head"] + (alone["head"] // 4 if stage > 2 else 0)


def test_from_a_store_the_targets_layers_are_not_held(shape):
    settings = recipe(shape)
    target, head = outline(settings)
    _, _, online, stored = stages(settings, target, head, Text.unknown(settings.data), MACHINE)
    layers = size_of(target.model.model.layers.parameters()) + size_of(target.model.model.norm.parameters())
    assert online.held["target"] - stored.held["target's ends"] == layers
    assert (online.used, stored.used) == (True, False)
    kept = replace(settings, data=replace(settings.data, features="store"))
    assert [stage.used for stage in stages(kept, target, head, Text.unknown(kept.data), MACHINE)] == [
        True,
        True,
        False,
        True,
    ]


def test_time_grows_with_the_passes_and_shrinks_with_the_processes(shape):
    settings = replace(recipe(shape), train=TrainSettings(epochs=2.0))
    target, head = outline(settings)
    text = Text(1_024_000, 0.5, BATCH)
    seconds = partial(stages, target=target, head=head, text=text)
    once = seconds(settings, machine=MACHINE)[2].seconds
    twice = replace(settings, train=TrainSettings(epochs=4.0))
    assert seconds(twice, machine=MACHINE)[2].seconds == pytest.approx(2 * once)
    assert seconds(settings, machine=replace(MACHINE, processes=4))[2].seconds == pytest.approx(once / 4)
    assert seconds(settings, machine=replace(MACHINE, flops=3e12))[2].seconds == pytest.approx(once / 3)


def test_kept_features_are_those_of_the_batches_there_are(shape):
    target, head = outline(recipe(shape))
    text = Text(100 * BATCH, 1.0, BATCH)
    kept = {}
    for count in (10, 100, 10**8):
        data = DataSettings(max_length=LENGTH, batch_tokens=BATCH, batches=count)
        settings = replace(recipe(shape), data=data, distill=DistillSettings(keep_features=True))
        kept[count] = stages(settings, target, head, text, MACHINE)[2].held["kept features"]
    assert kept[10**8] == kept[100] == 10 * kept[10]


def test_what_does_not_fit_is_said_with_the_setting_to_change(shape):
    settings = recipe(shape)
    target, head = outline(settings)
    small = replace(MACHINE, memory=60e6, disk=1e6)
    plan = stages(settings, target, head, Text(1_000_000, 1.0, BATCH), small)
    memory, disk = shortages(settings, plan, small)
    assert "train online needs" in memory
    assert "data.batch_tokens (512)" in memory
    assert "GB of disk" in disk
    assert shortages(settings, plan, MACHINE) == []


def test_of_several_cards_the_one_with_the_head_on_it_must_have_room(shape):
    settings = replace(recipe(shape), target=TargetSettings(str(shape), device_map="auto"))
    target, head = outline(settings)
    plan = stages(settings, target, head, Text(1_000_000, 1.0, BATCH), MACHINE)
    online = plan[2]
    whole = online.held["target"]
    on_one = online.memory - whole + whole / 4
    assert sum(online.on_one(4).values()) == pytest.approx(on_one)
    assert sum(online.on_one(1).values()) == online.memory
    told = shortages(settings, plan, replace(MACHINE, memory=0.99 * on_one, cards=4))
    assert online.memory < 4 * 0.99 * on_one  # together they have room
    assert len(told) == 1
    assert "train online needs" in told[0]
    assert " GB of memory on one of 4 cards, there are " in told[0]
    assert shortages(settings, plan, replace(MACHINE, memory=1.01 * on_one, cards=4)) == []


@pytest.mark.parametrize(
    ("stored", "target", "train", "named"),
    [
        (False, {}, {}, "see target.device_map auto, target.shard, or a store (data.features)"),
        (False, {"device_map": "auto"}, {}, "see more cards (--card GB TFLOP/s COUNT plans for them), or a store"),
        (False, {"shard": True}, {}, "see more processes, or a store"),
        (True, {"device_map": "auto"}, {"measure_every": 5}, "see train.measure_every"),
        (True, {}, {"measure_every": 5}, "see train.measure_every"),
    ],
)
def test_the_setting_to_change_is_one_that_would_help(shape, stored, target, train, named):
    settings = recipe(shape, train=train)
    data = replace(settings.data, features="store" if stored else None)
    settings = replace(settings, target=TargetSettings(str(shape), **target), data=data)
    outlined, head = outline(settings)
    plan = stages(settings, outlined, head, Text(1_000_000, 1.0, BATCH), MACHINE)
    heavy = [replace(stage, held={**stage.held, "target": 10**12}) for stage in plan]
    (told,) = shortages(settings, heavy, MACHINE)
    assert "most is target" in told
    assert named in told


def test_answers_at_once_are_what_regenerate_takes():
    assert inspect.signature(regenerate).parameters["batch_size"].default == ANSWERS


def test_the_command_prints_and_writes_nothing(shape, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = ["--target.name", str(shape), "--data.max_length", "128", "--out", str(tmp_path / "run")]
    assert main(["train", *options, "--plan", "--card", "0.05", "2"]) == 0
    said = capsys.readouterr().out
    assert "1,000,000 tokens, as the data cannot be counted here" in said
    assert "processes 8, each with a card of 0.05 GB and 2.00 TFLOP/s (as given by --card)" in said
    assert "warning: train online needs" in said
    assert "estimated" in said
    assert not (tmp_path / "run").exists()
    assert main(["train", *options, "--target.device_map", "auto", "--plan", "--card", "0.05", "2", "4"]) == 0
    said = capsys.readouterr().out
    assert "processes 8, each with 4 times a card of 0.05 GB and 2.00 TFLOP/s" in said
    assert "GB of memory on one of 4 cards, there are 0.1 GB" in said
    monkeypatch.setenv("RANK", "1")
    assert main(["train", *options, "--plan"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("datasets_cache")
def test_the_command_counts_data_that_is_here(tiny_target_folder, tmp_path, capsys):
    talks = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello"}]
    talks.write_text((json.dumps({"messages": messages}) + "\n") * 10)
    options = ["--target.name", str(tiny_target_folder), "--data.conversations", str(talks), "--data.max_length", "64"]
    assert main(["train", *options, "--out", str(tmp_path / "run"), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "data: 140 tokens\n" in said
    assert "of a matrix product here" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--plan", "--target.name", "nobody/nothing"), "target 'nobody/nothing' cannot be read"),
        (("--plan", "--card", "80"), "--card takes the GB and the TFLOP/s"),
        (("--plan", "--card", "80", "400", "1.5"), "--card takes the GB and the TFLOP/s"),
        (("--card", "80", "400"), "--plan"),
    ],
)
def test_what_cannot_be_planned_is_one_line(shape, tmp_path, capsys, options, named):
    assert main(["train", "--target.name", str(shape), *options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
CARDS = Machine("card", memory=80e9, flops=400e12, disk=1e15)
CORES = Machine("cpu", memory=16e9, flops=0.5e12, disk=1e15)
SHAPES: dict[str, PreTrainedConfig] = {  # of the targets that recipes are for, as their configs say
    "smollm2-135m-instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
}


@pytest.mark.parametrize(
    ("name", "machine", "shown"),
    [
        ("quickstart", CORES, ("train online",)),
        ("longrun", CORES, ("train online",)),
        ("llama-3.1-8b", replace(CARDS, processes=8), ("regenerate", "train online")),
        ("llama-3.3-70b", CARDS, ("capture",)),
        ("llama-3.3-70b", replace(CARDS, processes=16), ("train from a store",)),
        ("qwen3-8b", replace(CARDS, processes=8), ("regenerate", "train online")),
        ("hass", replace(CARDS, processes=8), ("regenerate", "train online")),
        ("eagle1", replace(CARDS, processes=8), ("regenerate", "train online")),
    ],
)
def test_a_recipe_says_what_is_planned_for_it(tmp_path, name, machine, shown):
    file = files("slipstream.configs") / f"{name}.yaml"
    values = vars(_parser().parse_args(["train", "--config", str(file), "--out", "anywhere"]).train)
    settings = Recipe(**{f.name: f.default_factory(**vars(values[f.name])) for f in fields(Recipe)})
    SHAPES[settings.target.name].save_pretrained(tmp_path)
    settings = replace(settings, target=TargetSettings(str(tmp_path)))
    target, head = outline(settings)
    plan = stages(settings, target, head, Text.unknown(settings.data), machine)
    header = [line.removeprefix("#").split() for line in file.read_text().splitlines() if line.startswith("#")]
    for stage in plan:
        assert (" ".join(figures(stage)).split() in header) == (stage.name in shown)
