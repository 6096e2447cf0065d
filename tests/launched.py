"""Runs under `accelerate launch`: trains the tiny head of tests/test_trainer.py by one recipe and writes its weights.

accelerate launch ... tests/launched.py OUT '{"optimizer": "adamw", "accumulation": 2}' [steps after which to stop]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_trainer import RECIPE, answers, dataset
from tiny import VOCAB, tiny_head, tiny_target

from slipstream.configs.recipe import TrainSettings
from slipstream.data.batches import Batches
from slipstream.train.metrics import Metrics
from slipstream.train.trainer import Trainer


def main(out: str, settings: str, stop: str = "0") -> None:
    folder = Path(out)
    recipe = replace(
        RECIPE,
        train=TrainSettings(
            max_steps=6, learning_rate=3e-3, mixed_precision="no", log_every=1, clip=0.2, **json.loads(settings)
        ),
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
    rows = trainer.run()
    head = trainer.result()
    if head is not None:
        torch.save(head.state_dict(), folder / "weights.pt")
        said = {"processes": trainer.launch.processes, "begun": begun, "losses": [row["loss"] for row in rows]}
        (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
