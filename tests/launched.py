"""Runs under `accelerate launch`: trains the tiny head of tests/test_trainer.py by one recipe and writes its weights.

accelerate launch ... tests/launched.py OUT '{"optimizer": "adamw", "accumulation": 2}' [steps after which to stop]

The settings are those of `train`, `target.shard` as `shard_target`, and `broken`, a micro-batch whose features are NaN. Graphs
that are compiled are counted, and made without inductor.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from test_trainer import RECIPE, answers, dataset
from tiny import VOCAB, tiny_head, tiny_target
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import TargetSettings, TrainSettings
from slipstream.data.batches import Batches
from slipstream.distill.shards import layers_of
from slipstream.distill.target import Captured, Target
from slipstream.train.metrics import Metrics
from slipstream.train.trainer import Trainer


def main(out: str, settings: str, stop: str = "0") -> None:
    folder, given = Path(out), json.loads(settings)
    broken = given.pop("broken", None)
    recipe = replace(
        RECIPE,
        target=TargetSettings(shard=given.pop("shard_target", False)),
        train=TrainSettings(max_steps=6, learning_rate=3e-3, mixed_precision="no", log_every=1, clip=0.2, **given),
    )
    target = tiny_target()
    head = tiny_head(target, VOCAB).train()
    trainer = Trainer(recipe, target, head, Batches(dataset(answers(24, 12)), 60, 0), folder)
    begun = trainer.step
    if int(stop):
        for _ in range(int(stop)):
            trainer._optimize(Metrics(3))
        trainer.save()
        return
    if broken is not None:
        spoil(trainer, broken)
        return
    rows = trainer.run()
    head = trainer.result()
    if head is not None:
        torch.save(head.state_dict(), folder / "weights.pt")
        losses = [row["loss"] for row in rows if row["step"] > begun]
        said = {"processes": trainer.launch.processes, "begun": begun, "losses": losses}
        said |= {"held": held(target), "graphs": counters["stats"]["unique_graphs"]}
        said |= {"patience": patience()}
        (folder / "said.json").write_text(json.dumps(said))


def spoil(trainer: Trainer, broken: int) -> None:
    """Run into a micro-batch whose features are NaN, and write down what was said, and whether weights are finite."""
    of, told = trainer.features.of, ""
    trainer.features.of = lambda index, *rest: (
        Captured(*(x * float("nan") for x in of(index, *rest))) if index == broken else of(index, *rest)
    )
    try:
        trainer.run()
    except SlipstreamError as error:
        told = str(error)
    trainer.launch._require_finite()
    said = {"told": told, "finite": all(x.isfinite().all().item() for x in trainer.launch.weights().values())}
    rank = trainer.launch.accelerator.process_index
    (trainer.folder / f"stopped-{rank}.json").write_text(json.dumps(said))


def held(target: Target) -> float:
    """Share of the layers' weights that this process holds."""
    layers = [*layers_of(target).parameters()]
    here = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in layers)
    return here / sum(x.numel() for x in layers)


def patience() -> float | None:
    """Seconds that a process waits for the others of its launch; None where there are none."""
    if not torch.distributed.is_initialized():
        return None
    group = torch.distributed.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend="aot_eager")
    main(*sys.argv[1:])
