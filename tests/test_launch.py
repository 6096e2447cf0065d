"""However many processes train, however gradients are added up: the same losses and the same weights."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from launched import main

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import TrainSettings
from slipstream.train.launch import Launch

HERE = Path(__file__).parent
FILES = HERE.parent / "configs" / "launch"
ADAMW = {"optimizer": "adamw"}


def launch(out, settings, *options, stop=0, **environment):
    """Run tests/launched.py under a launcher."""
    run("launched.py", out, json.dumps(settings), stop, options=options, **environment)


def run(script, *arguments, options, launcher="torch.distributed.run", **environment):
    """Run a script of tests/ under a launcher."""
    command = [sys.executable, "-m", launcher, *options, HERE / script, *arguments]
    done = subprocess.run(
        [*map(str, command)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def cpus(count):
    return ("--nproc_per_node", count, "--master_port", port())


def outcome(folder):
    said = json.loads((folder / "said.json").read_text())
    return said, torch.load(folder / "weights.pt")


def assert_same(folder, reference, processes, begun=0, loose=1, held=1, compiled=False):
    said, weights = outcome(folder)
    expected, wanted = outcome(reference)
    assert (said["processes"], said["begun"], said["held"]) == (processes, begun, held)
    assert said["patience"] == (24 * 3600 if processes > 1 else None)  # the first may have much to tokenize
    assert (0 < said["graphs"] < 20) if compiled else not said["graphs"]
    assert said["losses"] == pytest.approx(expected["losses"][begun:], rel=1e-4 * loose)
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5 * loose)


@pytest.fixture(scope="module", params=["adamw"])
def alone(request, tmp_path_factory):
    """One process that takes four micro-batches a step."""
    folder = tmp_path_factory.mktemp(request.param)
    main(str(folder), json.dumps({"optimizer": request.param, "accumulation": 4}))
    return folder


@pytest.mark.parametrize("shard", [False, True], ids=["", "a target in shards"])
def test_two_processes_do_what_one_does(alone, tmp_path, shard):
    launch(tmp_path, {**ADAMW, "accumulation": 2, "shard_target": shard}, *cpus(2))
    assert_same(tmp_path, alone, 2, held=0.5 if shard else 1)


@pytest.mark.slow
@pytest.mark.parametrize("alone", ["muon"], indirect=True)
def test_two_processes_do_what_one_does_with_muon(alone, tmp_path):
    launch(tmp_path, {"optimizer": "muon", "accumulation": 2}, *cpus(2))
    assert_same(
        tmp_path, alone, 2, loose=50
    )  # torch's Muon turns a matrix round in bf16, which the order of sums moves


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    main(str(tmp_path), json.dumps({**ADAMW, "accumulation": 4}), "3")
    launch(tmp_path, {**ADAMW, "accumulation": 2}, *cpus(2))
    assert_same(tmp_path, alone, 2, begun=3)


@pytest.mark.parametrize(
    "target", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "and a target in shards"]
)
def test_sharded_over_two_processes_it_is_the_same_and_goes_on(alone, tmp_path, target):
    settings = {**ADAMW, "accumulation": 2, "shard": True, "shard_target": target}
    launch(tmp_path, settings, *cpus(2), stop=3)
    launch(tmp_path, settings, *cpus(2))
    assert_same(tmp_path, alone, 2, begun=3, held=0.5 if target else 1)


def assert_stopped_and_goes_on(folder, reference, settings, *options, **launcher):
    """A micro-batch that one of two processes alone sees as NaN stops both, with the checkpoint and weights before it."""
    launch(folder, {**settings, "broken": 9, "checkpoint_minutes": 1e-9}, *options, port(), **launcher)
    for rank in range(2):
        stopped = json.loads((folder / f"stopped-{rank}.json").read_text())
        assert "the loss became NaN or infinite at step 2" in stopped["told"]
        assert stopped["finite"]
        assert (folder / f"bad-step-2-process-{rank}.safetensors").is_file()
    launch(folder, {**settings, "checkpoint_minutes": 1e-9}, *options, port(), **launcher)
    assert_same(folder, reference, 2, begun=2)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(alone, tmp_path):
    settings = {**ADAMW, "accumulation": 2}
    assert_stopped_and_goes_on(tmp_path, alone, settings, "--nproc_per_node", 2, "--master_port")


@pytest.mark.slow
def test_two_nodes_do_what_one_process_does(alone, tmp_path):
    options = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port())
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, options), "--node_rank"]
    rest = [str(HERE / "launched.py"), str(tmp_path), json.dumps({**ADAMW, "accumulation": 2})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([*command, str(rank), *rest], env=environment) for rank in (0, 1)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert_same(tmp_path, alone, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_over_two_processes_is_the_same(alone, stage, tmp_path):
    pytest.importorskip("deepspeed")
    config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}))
    zero = ("--use_deepspeed", "--deepspeed_config_file", file, "--num_processes", 2, "--num_machines", 1)
    zero = (*zero, "--deepspeed_multinode_launcher", "standard", "--main_process_port")
    launcher = {"launcher": "accelerate.commands.launch", "DS_ACCELERATOR": "cpu"}
    assert_stopped_and_goes_on(tmp_path, alone, {**ADAMW, "accumulation": 2}, *zero, **launcher)
    assert [p.name for p in (tmp_path / "checkpoint").glob("step-*")] == ["step-6"]
    assert (tmp_path / "checkpoint" / "latest").read_text() == "step-6"


def test_a_checkpoint_of_deepspeed_counts_when_all_its_parts_are_there(tmp_path):
    latest, events = tmp_path / "latest", []
    latest.write_text("step-1")
    (tmp_path / "step-1").mkdir()

    def save(place, tag, client_state, save_latest):
        assert not save_latest
        (Path(place) / tag).mkdir()
        events.append("saved")

    def wait():
        assert (tmp_path / "step-1").is_dir()
        assert latest.read_text() == "step-1"
        events.append("waited")

    launch = SimpleNamespace(deepspeed=True, main=True, agree=bool, processes=2, shares=[1.0])
    launch.module, launch.accelerator = SimpleNamespace(save_checkpoint=save), SimpleNamespace(wait_for_everyone=wait)
    launch._require_finite = lambda: events.append("looked")
    for _ in range(2):  # the second is there already, and stays as it is
        Launch.save(launch, tmp_path, {"step": 2})
    assert events == ["looked", "saved", "waited", "looked"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-2"]
    assert latest.read_text() == "step-2"


def test_a_checkpoint_of_deepspeed_that_cannot_be_read_is_one_line(tmp_path):
    def load(place, tag):
        raise RuntimeError("PytorchStreamReader failed\nmore")

    (tmp_path / "latest").write_text("step-4")
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    launch = SimpleNamespace(deepspeed=True, processes=1, everywhere=Path.exists)
    launch.module = SimpleNamespace(load_checkpoint=load)
    with pytest.raises(SlipstreamError, match=r"^[^\n]* cannot be read \(PytorchStreamReader failed\); [^\n]*$"):
        Launch.load(launch, tmp_path)


@pytest.mark.parametrize(
    ("deepspeed", "processes", "told"),
    [
        (True, 3, "was written by 2 processes under DeepSpeed and goes on with as many"),
        (False, 2, "was written under DeepSpeed; go on with it"),
    ],
)
def test_a_checkpoint_of_deepspeed_wants_as_many_processes_under_deepspeed(tmp_path, deepspeed, processes, told):
    folder = tmp_path / "checkpoint"
    (folder / "step-4").mkdir(parents=True)
    (folder / "latest").write_text("step-4")
    for rank in range(2):
        (folder / "step-4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    launch = SimpleNamespace(deepspeed=deepspeed, processes=processes, everywhere=Path.exists)
    with pytest.raises(SlipstreamError, match=told):
        Launch.load(launch, folder)


@pytest.mark.parametrize("latest", ["", "step-5"])
def test_a_checkpoint_of_deepspeed_without_its_parts_is_named(tmp_path, latest):
    (tmp_path / "latest").write_text(latest)
    launch = SimpleNamespace(deepspeed=True, processes=2, everywhere=Path.exists)
    with pytest.raises(SlipstreamError, match="is damaged or cut short; delete it"):
        Launch.load(launch, tmp_path)


def test_deepspeed_refuses_shards_of_fsdp2():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(SlipstreamError, match=r"set train\.shard false, or launch with configs/launch/ddp\.yaml"):
        Launch(accelerator, torch.nn.Linear(1, 1), TrainSettings(optimizer="adamw", shard=True))


def test_a_plain_checkpoint_does_not_go_on_under_deepspeed(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SlipstreamError, match="was not written under DeepSpeed"):
        Launch.load(SimpleNamespace(deepspeed=True, everywhere=Path.exists), tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_launch_files_are_accelerates(name):
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (1, 8)
    stage = (config.deepspeed_config or {}).get("zero_stage")
    assert stage == {"zero2": 2, "zero3": 3}.get(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_launch_files_launch(alone, name, tmp_path):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    launch(
        tmp_path,
        {**ADAMW, "accumulation": 2, "shard": name == "fsdp2"},
        *("--config_file", FILES / f"{name}.yaml", "--num_processes", 2, "--main_process_port", port()),
        launcher="accelerate.commands.launch",
        DS_ACCELERATOR="cpu",
    )
    assert_same(tmp_path, alone, 2)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm_starts_one_launcher_on_every_machine(tmp_path):
    commands = {  # as Slurm and accelerate have them
        "scontrol": "echo one; seq 100000",  # more hosts than a pipe holds
        "srun": '[ "$1" = --kill-on-bad-exit=1 ]; shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": "printf '%s|' \"$@\" $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK; echo",
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "some[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    slurm |= {"SLURM_CPUS_PER_TASK": "60"}
    mine = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", FILES / "slurm.sh", "--config", "a recipe.yaml"],
        env={**mine, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for rank, line in enumerate(done.stdout.splitlines()):
        words = line.split("|")
        assert words[:3] == ["launch", "--config_file", "configs/launch/ddp.yaml"]
        options = dict(zip(words[3:13:2], words[4:13:2], strict=True))
        assert options == {
            "--num_machines": "2",
            "--num_processes": "16",
            "--machine_rank": str(rank),
            "--main_process_ip": "one",
            "--main_process_port": "29500",
        }
        assert words[13:] == ["-m", "slipstream.cli", "train", "--config", "a recipe.yaml", "7", "60", ""]
    assert rank == 1


FREED = """
import resource, sys, torch
from slipstream.train.launch import keep_freed_memory

def resident():
    return resource.getpagesize() * int(open("/proc/self/statm").read().split()[1])

if "keep" in sys.argv:
    keep_freed_memory()
before = resident()
held = [torch.ones(5 << 20) for _ in range(3)]  # 20 MB each
del held
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_training_keeps_the_memory_that_it_frees():
    gone, kept = (
        int(subprocess.run([sys.executable, "-c", FREED, how], check=True, capture_output=True, text=True).stdout)
        for how in ("return", "keep")
    )
    assert gone < 20e6 < 55e6 < kept  # bytes
