"""One readable loop over accelerate: features, unroll, step."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import folder_atomic, write_atomic
from slipstream.configs.progress import progress
from slipstream.distill.features import Features, OnlineFeatures, StoredFeatures
from slipstream.distill.objectives import weighted
from slipstream.distill.unroll import Unrolled, unroll
from slipstream.train.metrics import Metrics
from slipstream.train.optimizer import learning_rate, make_optimizers

if TYPE_CHECKING:
    from pathlib import Path

    from slipstream.configs.recipe import Recipe
    from slipstream.data.batches import Batches
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.store import Store
    from slipstream.distill.target import Target


class Trainer:
    """Trains a head on a target's features; `run` goes on from the last checkpoint in `folder`.

    A run's state is its folder: `checkpoint/` (weights, optimizer, RNG; replaced atomically), `metrics.jsonl` (one row
    every `log_every` steps) and `recipe.json`, which must not change under it.

    Args:
        recipe: All settings.
        target: The target.
        head: The head, as it begins.
        batches: Of the conversations.
        folder: Of the run.
        store: Where the states of these conversations are read; None runs the target.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        head: DraftHead,
        batches: Batches,
        folder: Path,
        store: Store | None = None,
    ) -> None:
        self.settings = recipe.train
        self.distill = recipe.distill
        self.objective = weighted(self.distill.objectives)
        self.target = target
        self.batches = batches
        self.folder = folder
        self.accelerator = Accelerator(
            mixed_precision=self.settings.mixed_precision, log_with=list(self.settings.trackers) or None
        )
        set_seed(self.settings.seed, device_specific=True)
        target.model.to(self.accelerator.device)
        # Not wrapped for data parallelism: gradients are sums here, and are added up over the processes by hand.
        self.head = self.accelerator.prepare_model(head, evaluation_mode=True)
        self.optimizers = [
            self.accelerator.prepare_optimizer(optimizer) for optimizer in make_optimizers(self.head, self.settings)
        ]
        micro = self.accelerator.num_processes * self.settings.accumulation
        self.total = self.settings.max_steps or max(1, round(self.settings.epochs * batches.per_epoch / micro))
        self.weights = torch.tensor(
            [self.distill.step_decay**k for k in range(self.distill.steps)], device=self.accelerator.device
        )
        device = self.accelerator.device
        self.features: Features = (
            OnlineFeatures(target, batches, device, keep=self.distill.keep_features)
            if store is None
            else StoredFeatures(store, batches, device)
        )
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self._claim(recipe)

    def _claim(self, recipe: Recipe) -> None:
        """Take the folder for this recipe, or go on with a run of the same one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(asdict(recipe)))
        place = self.folder / "recipe.json"
        if place.exists() and (theirs := json.loads(place.read_text())) != mine:
            section, key = next((s, k) for s in mine for k in mine[s] if mine[s][k] != theirs.get(s, {}).get(k))
            raise SlipstreamError(
                f"{self.folder} holds another run ({section}.{key} is {theirs.get(section, {}).get(key)!r} there, "
                f"{mine[section][key]!r} here); give another --out"
            )
        write_atomic(place, json.dumps(mine, indent=2) + "\n")
        if (self.folder / "checkpoint").exists():
            self.accelerator.load_state(str(self.folder / "checkpoint"))
            state = json.loads((self.folder / "checkpoint" / "progress.json").read_text())
            self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]

    def save(self) -> None:
        """Replace the checkpoint by the present state."""
        with folder_atomic(self.folder / "checkpoint") as temporary:
            self.accelerator.save_state(str(temporary))
            state = {"step": self.step, "seconds": self.seconds, "rows": self.rows}
            (temporary / "progress.json").write_text(json.dumps(state))

    def _micro(self, index: int, then: int) -> Unrolled:
        """Forward and backward of one micro-batch, `then` being the next; gradients add up as sums, not means."""
        batch, captured = self.features.of(index, then)
        steps = self._unrolled()
        with self.accelerator.autocast():
            out = unroll(
                self.head,
                self.target,
                batch.input_ids,
                batch.mask,
                steps=steps,
                objective=self.objective,
                noise=self.distill.noise,
                feature_weight=self.distill.feature_weight,
                captured=captured,
            )
        self.accelerator.backward((out.loss * self.weights[:steps]).sum())
        return out

    def _unrolled(self) -> int:
        """Unroll steps at this point of the training."""
        return 1 if self.step < self.distill.single * self.total else self.distill.steps

    def _optimize(self, metrics: Metrics) -> int:
        """One optimizer step over all micro-batches of all processes; returns its padded tokens here."""
        accelerator, settings = self.accelerator, self.settings
        micro = accelerator.num_processes * settings.accumulation
        first = self.step * micro + accelerator.process_index * settings.accumulation
        rate = learning_rate(self.step, self.total, settings)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        indices = [*range(first, first + settings.accumulation), first + micro]
        outs = [self._micro(index, then) for index, then in pairwise(indices)]
        tokens = sum(self.batches[first + i].mask.numel() for i in range(settings.accumulation))
        rows = accelerator.reduce(torch.stack([out.rows for out in outs]).sum(0).float(), "sum")
        # Sums become the mean over all valid rows of all ranks and micro-batches, each step k at its weight.
        scale = 1.0 / (rows * self.weights[: len(rows)]).sum().clamp(min=1.0)
        parameters = [p for p in self.head.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "sum") * scale
        norm = accelerator.clip_grad_norm_(parameters, settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for out in outs:
            metrics.add(out, self.weights[: len(rows)])
        metrics.norm = float(norm)
        if not torch.isfinite(norm):
            raise SlipstreamError(
                f"the loss became NaN or infinite at step {self.step}; lower train.learning_rate "
                f"(checkpoint of an earlier step in {self.folder / 'checkpoint'})"
            )
        self.step += 1
        return tokens

    def time_steps(self, steps: int) -> float:
        """Mean seconds of the next `steps` optimizer steps. Nothing is saved."""
        begun = time.perf_counter()
        for _ in range(steps):
            self._optimize(Metrics(self.distill.steps))
        return (time.perf_counter() - begun) / steps

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; returns the metric rows."""
        accelerator = self.accelerator
        if self.settings.trackers:
            accelerator.init_trackers("slipstream", config={"folder": str(self.folder)})
        metrics, clock = Metrics(self.distill.steps), time.perf_counter()
        saved = clock
        self.head.train()
        with progress("train", self.total, "steps") as advance:
            advance(self.step)
            while self.step < self.total:
                metrics.tokens += self._optimize(metrics)
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
                if self.step % self.settings.log_every == 0 or self.step == self.total:
                    row = {"step": self.step, "seconds": round(self.seconds, 1), **metrics.row(accelerator)}
                    row["tokens"] += self.rows[-1]["tokens"] if self.rows else 0
                    self.rows.append(row)
                    accelerator.log(row, step=self.step)
                    metrics = Metrics(self.distill.steps)
                    advance(0, note=f"loss {row['loss']:.3f}, simulated tau {row['simulated_acceptance_length']:.2f}")
                if now - saved > 60 * self.settings.checkpoint_minutes:
                    self.save()
                    saved = time.perf_counter()
                advance()
        self.save()
        if accelerator.is_main_process:
            write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        accelerator.end_training()
        self.head.eval()
        return self.rows
