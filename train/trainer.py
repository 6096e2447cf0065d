"""One readable loop: features, unroll, step; the same on one process and on many."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from slipstream.configs.errors import SlipstreamError, out_of_memory
from slipstream.configs.files import write_atomic, write_through
from slipstream.configs.progress import progress
from slipstream.configs.recipe import Recipe
from slipstream.data.batches import Batch
from slipstream.distill.adapters import rebuild, save_adapter
from slipstream.distill.features import AHEAD, Features, OnlineFeatures, StoredFeatures
from slipstream.distill.shards import shard
from slipstream.distill.tensors import read_json
from slipstream.distill.unroll import Distillation, labelled_rows
from slipstream.train.launch import Launch, read_checkpoint, start
from slipstream.train.measure import Measure
from slipstream.train.metrics import Metrics
from slipstream.train.optimizer import learning_rate
from slipstream.train.tracking import track

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from slipstream.configs.progress import Advance
    from slipstream.data.batches import Batches
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.store import Store
    from slipstream.distill.target import Target


class Trainer:
    """Trains a head on a target's features; `run` goes on from the last checkpoint in `folder`.

    A run's state is its folder: the checkpoint (weights, optimizer; replaced atomically), `best.pt` where heads are
    measured, `metrics.jsonl` (one row every `log_every` steps) and `recipe.json`, which must not change under it.
    Micro-batch i of the run is the same whatever process takes it: step s of P processes with accumulation A takes i from
    s*P*A to (s+1)*P*A - 1, A in a row each.

    Args:
        recipe: All settings.
        target: The target.
        head: The head, as it begins.
        batches: Of the conversations.
        folder: Of the run.
        store: Where the states of these conversations are read; None runs the target.
        accelerator: From `start`; None starts one.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        head: DraftHead,
        batches: Batches,
        folder: Path,
        *,
        store: Store | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.settings = recipe.train
        self.distill = recipe.distill
        self.target = target
        self.batches = batches
        self.folder = folder
        set_seed(self.settings.seed)
        head.check_target(target)  # before its weights are in shards
        head.config.target_name = target.name
        accelerator = accelerator or start(self.settings, folder)
        self.device = accelerator.device
        if recipe.target.shard:
            shard(target, self.device)
        else:
            target.place(self.device, layers=store is None or self.settings.measure_every is not None)
        if self.settings.gradient_checkpointing:
            head.checkpoint_activations()
        if self.settings.compile:
            head.compile_layers()
        self.head = head
        self.lora = recipe.head.lora_rank is not None
        mixed = self.settings.mixed_precision == "bf16"
        self.launch = Launch(accelerator, Distillation(head, target, self.distill, autocast=mixed), self.settings)
        self.micro = self.launch.processes * self.settings.accumulation
        self.total = self.settings.max_steps or max(1, round(self.settings.epochs * batches.per_epoch / self.micro))
        self.weights = torch.tensor([self.distill.step_decay**k for k in range(self.distill.steps)], device=self.device)
        self.measure = Measure(target, head.config, self.settings) if self.settings.measure_every else None
        self.average: dict[str, Tensor] = {}
        self.features: Features = (
            OnlineFeatures(target, batches, keep=self.distill.keep_features)
            if store is None
            else StoredFeatures(store, batches)
        )
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self._claim(recipe)

    def _claim(self, recipe: Recipe) -> None:
        """Take the folder for this recipe, or go on with a run of the same one."""
        mine = recipe.to_dict()
        mine["train"]["accumulation"] = self.micro  # more processes may take fewer micro-batches each
        place = self.folder / "recipe.json"
        if place.exists() and (theirs := Recipe.written(read_json(place), place)) != mine:
            section, key = next(
                (s, k)
                for s in {**theirs, **mine}
                for k in {**theirs.get(s, {}), **mine.get(s, {})}
                if theirs.get(s, {}).get(k, ...) != mine.get(s, {}).get(k, ...)
            )
            name = f"{section}.{key}" if key != "accumulation" else "train.accumulation times the processes"
            raise SlipstreamError(
                f"{self.folder} holds another run ({name} is {theirs.get(section, {}).get(key)!r} there, "
                f"{mine.get(section, {}).get(key)!r} here); give another --out"
            )
        self.launch.accelerator.wait_for_everyone()  # all have looked before it is written
        if self.launch.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(mine, indent=2) + "\n")
        state = self.launch.load(self.folder / "checkpoint")
        if state is not None:
            if state.get("data", self.batches.digest) != self.batches.digest:  # older versions did not write it
                raise SlipstreamError(
                    f"{self.folder} was begun on other data: the conversations, or the template that makes tokens of them, "
                    "have changed since; put them back, or give another --out"
                )
            self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
            self.average = {name: weight.to(self.device, copy=True) for name, weight in state["average"].items()}

    def save(self) -> None:
        """Replace the checkpoint by the present state."""
        state = {"step": self.step, "seconds": self.seconds, "rows": self.rows, "average": self.average}
        state["data"] = self.batches.digest
        self.launch.save(self.folder / "checkpoint", state)

    def _unrolled(self) -> int:
        """Unroll steps at this point of the training."""
        return 1 if self.step < self.distill.single * self.total else self.distill.steps

    def _optimize(self, metrics: Metrics) -> int:
        """One optimizer step over all micro-batches of all processes; returns its padded tokens here."""
        settings, steps = self.settings, self._unrolled()
        indices = [self._index(self.step * settings.accumulation + i) for i in range(settings.accumulation + AHEAD)]
        batches = {index: self._batch(index) for index in indices[: settings.accumulation]}
        # The loss is a mean over all labelled rows of all processes and micro-batches, each unroll step at its weight.
        labels = torch.stack([labelled_rows(b.mask, steps, b.starts) for b in batches.values()])
        rows = self.launch.sum(labels.sum(0).float())
        scale = self.weights[:steps] / (rows * self.weights[:steps]).sum().clamp(min=1.0)
        lost = torch.zeros((), device=self.device)
        for place, (index, batch) in enumerate(batches.items(), start=1):
            captured = self.features.of(index, batch, indices[place : place + AHEAD])
            noise = torch.Generator(self.device).manual_seed(settings.seed * 1_000_003 + index)
            loss, out = self.launch.module(batch.input_ids, batch.mask, scale, captured, noise, batch.starts)
            self.launch.backward(loss, last=place == settings.accumulation)
            lost += loss.detach()
            metrics.add(out, self.weights[:steps])
        norm = self.launch.step(learning_rate(self.step, self.total, settings), lost)
        if not math.isfinite(norm):
            self._keep_bad(batches)
        metrics.norm = norm
        if settings.ema is not None:
            for name, weight in self.head.named_parameters():
                self.average.setdefault(name, weight.detach().clone()).lerp_(weight.detach(), 1 - settings.ema)
        self.step += 1
        return sum(batch.mask.numel() for batch in batches.values())

    def _index(self, number: int) -> int:
        """The micro-batch of the run that is this process's `number`-th.

        Worked example: process 1 of 2 with accumulation 2 takes 2, 3, 6, 7, 10, ...
        """
        step, place = divmod(number, self.settings.accumulation)
        return step * self.micro + self.launch.accelerator.process_index * self.settings.accumulation + place

    def _batch(self, index: int) -> Batch:
        """The index-th micro-batch, on the device."""
        return self.batches[index].to(self.device)

    def _keep_bad(self, batches: dict[int, Batch]) -> None:
        """Write down what the loss became NaN on, and stop."""
        place = self.folder / f"bad-step-{self.step}-process-{self.launch.accelerator.process_index}.safetensors"
        tensors = {
            f"{name}.{i}": x for i, batch in batches.items() for name, x in batch._asdict().items() if x is not None
        }
        save_file(tensors, place)
        raise SlipstreamError(
            f"the loss became NaN or infinite at step {self.step} (its batch is in {place}); lower train.learning_rate and "
            "give another --out"
        )

    def time_steps(self, steps: int) -> float:
        """Mean seconds of the next `steps` optimizer steps. Nothing is saved."""
        begun = time.perf_counter()
        for _ in range(steps):
            self._optimize(Metrics(self.distill.steps))
        return (time.perf_counter() - begun) / steps

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; returns the metric rows.

        Raises:
            SlipstreamError: If the loss is not finite, or memory runs out.
        """
        self.head.train()
        with (
            track(self.launch.accelerator, self.settings, self.folder),
            progress("train", self.total, "steps") as advance,
        ):
            try:
                self._steps(advance)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise SlipstreamError(
                    f"out of memory at step {self.step}: lower data.batch_tokens ({self.batches.batch_tokens}) and raise "
                    "train.accumulation by as much, set train.gradient_checkpointing, or lower data.max_length, and give "
                    "another --out"
                ) from error
        self.save()
        self.head.eval()
        return self.rows

    def _steps(self, advance: Advance) -> None:
        settings = self.settings
        written = self.folder / "metrics.jsonl"
        if self.launch.main:
            write_atomic(written, "".join(json.dumps(row) + "\n" for row in self.rows))  # no row beyond the checkpoint
        metrics, clock = Metrics(self.distill.steps), time.perf_counter()
        saved = clock
        advance(self.step)
        while self.step < self.total:
            metrics.tokens += self._optimize(metrics)
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            measured = self._measure()
            if self.step % settings.log_every == 0 or self.step == self.total or measured:
                row = {"step": self.step, "seconds": round(self.seconds, 1), **metrics.row(self.launch.sum), **measured}
                row["tokens"] += self.rows[-1]["tokens"] if self.rows else 0
                self.rows.append(row)
                if self.launch.main:
                    with written.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                self.launch.accelerator.log(row, step=self.step)
                metrics = Metrics(self.distill.steps)
                advance(0, note=f"loss {row['loss']:.3f}, simulated tau {row['simulated_acceptance_length']:.2f}")
                if self.launch.agree(now - saved > 60 * settings.checkpoint_minutes):  # at a row: none is half counted
                    self.save()
                    saved = time.perf_counter()
            if measured:
                clock = time.perf_counter()
            advance()

    def _measure(self) -> dict[str, float]:
        """The acceptance length of real decoding, where it is due; the best head so far is written to `best.pt`."""
        every = self.settings.measure_every
        if self.measure is None or every is None or (self.step % every and self.step != self.total):
            return {}
        weights = self._weights()
        if self.launch.main:
            tau = self.measure(weights)
            best = max((row.get("acceptance_length", 0.0) for row in self.rows), default=0.0)
            if tau > best:
                with write_through(self.folder / "best.pt") as file:
                    torch.save(weights, file)
            return {"acceptance_length": tau}
        return {"acceptance_length": 0.0}

    def _weights(self) -> dict[str, Tensor]:
        """The head's weights as they stand (their average, where one is kept), on the CPU."""
        prefix = "head."
        weights = {name.removeprefix(prefix): x for name, x in self.launch.weights().items()}
        return {**weights, **{name: x.cpu() for name, x in self.average.items()}}

    def result(self) -> DraftHead | None:
        """The head of a finished run, on the main process: the best by measured acceptance, where measured, or the last."""
        best, weights = self.folder / "best.pt", self._weights()
        if not self.launch.main:
            return None
        if best.exists():
            weights = read_checkpoint(best)
        if self.lora:
            save_adapter(self.head.config, weights, self.folder.parent / "adapter")
        head = rebuild(self.head.config, weights)
        head.borrow(self.target)
        return head.eval()
