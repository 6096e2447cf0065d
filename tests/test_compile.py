"""`train.compile`: the layers through `torch.compile` learn what they learn without, in a handful of graphs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_launch import ADAMW, FILES, alone, assert_same, launch, port
from test_trainer import RECIPE, answers, dataset
from tiny import HEADS, VOCAB, tiny_head, tiny_target
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DistillSettings, TrainSettings
from slipstream.data.batches import Batches
from slipstream.distill.adapters import add_lora
from slipstream.distill.unroll import Distillation
from slipstream.train.launch import Launch
from slipstream.train.metrics import Metrics
from slipstream.train.trainer import Trainer

__all__ = ["alone"]  # a fixture

SHAPES = [(3, 20), (1, 25), (4, 17), (1, 12), (5, 11), (2, 30)]  # of batches
RECIPE = replace(RECIPE, train=replace(RECIPE.train, compile=True))


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs; they are run as they are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def learned(kind: str, *, compiled: bool, lora: bool = False, autocast: bool = False, shapes=SHAPES, then=lambda: None):
    """Losses of batches of some shapes and gradients of the weights; `then` is called after each batch."""
    head = tiny_head(tiny_target(), VOCAB, **HEADS[kind]).train()
    target = tiny_target().reading(head.layer_ids)
    if lora:
        add_lora(head, 4)
    names = list(head.state_dict())
    if compiled:
        head.compile_layers()
    assert list(head.state_dict()) == names
    module = Distillation(head, target, DistillSettings(), autocast=autocast)
    draw, losses = torch.Generator().manual_seed(0), []
    for shape in shapes:
        ids = torch.randint(3, VOCAB, shape, generator=draw)
        loss, _ = module(ids, torch.ones_like(ids).bool(), torch.tensor([1.0, 0.8, 0.6]))
        loss.backward()
        losses.append(loss.item())
        then()
    return losses, {name: x.grad for name, x in head.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(
    ("kind", "autocast"),
    [
        pytest.param(kind, autocast, marks=[pytest.mark.slow] if (kind, autocast) != ("eagle3", True) else [])
        for kind, autocast in product(HEADS, [False, True])
    ],
)
def test_compiled_layers_learn_the_same_in_a_handful_of_graphs(counter, kind, autocast):
    graphs = []
    losses, grads = learned(kind, compiled=True, autocast=autocast, then=lambda: graphs.append(counter.frame_count))
    wanted, slopes = learned(kind, compiled=False, autocast=autocast)
    assert losses == wanted
    assert grads.keys() == slopes.keys()
    assert all(torch.equal(grads[name], slope) for name, slope in slopes.items())
    assert 0 < graphs[0] < graphs[1] <= 20  # batches of several rows, and of one
    assert graphs[1:] == graphs[1:2] * (len(SHAPES) - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("counter")
def test_compiled_low_rank_updates_learn_the_same():
    losses, grads = learned("eagle3", compiled=True, lora=True)
    wanted, slopes = learned("eagle3", compiled=False, lora=True)
    assert losses == wanted
    assert all(torch.equal(grads[name], slope) for name, slope in slopes.items())


def trainer(folder, recipe=RECIPE):
    target = tiny_target()
    head = tiny_head(target, VOCAB).train()
    return Trainer(recipe, target, head, Batches(dataset(answers()), 120, 0), folder)


def test_a_compiled_run_is_the_run_and_goes_on_to_bit_equal_weights(counter, tmp_path):
    plain = trainer(tmp_path / "plain", replace(RECIPE, train=replace(RECIPE.train, compile=False)))
    rows = plain.run()
    assert not counter.frame_count
    first = trainer(tmp_path / "cut")
    for _ in range(4):
        first._optimize(Metrics(3))
    first.save()
    second = trainer(tmp_path / "cut")
    assert [row["loss"] for row in second.run()] == [row["loss"] for row in rows][-2:]
    assert counter.frame_count
    for name, weight in plain.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name]), name
    assert second.result() is not None


def test_zero_stage_3_is_refused():
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    with pytest.raises(SlipstreamError, match=r"train\.compile .* launch with stage 2"):
        Launch(accelerator, torch.nn.Linear(1, 1), TrainSettings(optimizer="adamw", compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_two_processes_that_compile_do_what_one_does(alone, tmp_path, name):
    if name == "zero2":
        pytest.importorskip("deepspeed")
    launch(
        tmp_path,
        {**ADAMW, "accumulation": 2, "compile": True, "shard": name == "fsdp2"},
        *("--config_file", FILES / f"{name}.yaml", "--num_processes", 2, "--main_process_port", port()),
        launcher="accelerate.commands.launch",
        DS_ACCELERATOR="cpu",
    )
    assert_same(tmp_path, alone, 2, compiled=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_inductor_learns_the_same():
    torch._dynamo.reset()
    with fresh_inductor_cache():
        losses, grads = learned("eagle3", compiled=True, shapes=SHAPES[::2])
    wanted, slopes = learned("eagle3", compiled=False, shapes=SHAPES[::2])
    assert losses == pytest.approx(wanted, rel=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(grads[name], slope, rtol=1e-3, atol=1e-4)
