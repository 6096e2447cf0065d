"""What a recipe takes, before anything runs: memory, disk and time of its stages, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from slipstream.configs.errors import SlipstreamError
from slipstream.data.batches import Batches
from slipstream.distill.adapters import add_lora
from slipstream.distill.capture import bytes_per_token
from slipstream.distill.draft import DraftConfig, DraftHead, layers_read
from slipstream.distill.heads import check_head, locate, new_head
from slipstream.distill.target import DTYPES, Target, target_config
from slipstream.train.footprint import (
    batch_bytes,
    cache_bytes,
    captured_bytes,
    forward_bytes,
    padded,
    sharded_bytes,
    size_of,
    train_bytes,
    written_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from slipstream.configs.recipe import DataSettings, Recipe

_TEXT = 5  # bytes of a token in a file of conversations
_SPREAD = ("target", "keys and values")  # what is where the target's layers are


@dataclass(frozen=True)
class Machine:
    """What a launch runs on.

    Attributes:
        kind: `cpu`, or that of the accelerator.
        memory: Bytes that a process's device has; with `target.device_map`, each of its devices.
        flops: Per second and process.
        disk: Bytes that are free where the run is written.
        processes: Of the launch; `slipstream regenerate` is one.
        zero: Stage of DeepSpeed's ZeRO; 0 without DeepSpeed.
        cards: Devices of a process: with `target.device_map` the target is spread over them.
    """

    kind: str
    memory: float
    flops: float
    disk: float
    processes: int = 1
    zero: int = 0
    cards: int = 1


@dataclass(frozen=True)
class Text:
    """What is learned from.

    Attributes:
        tokens: Of all conversations.
        answers: Share of them that is the assistant's.
        batch: Tokens of a micro-batch, without its padding.
        counted: Whether it is at hand; otherwise everything is told for so much text.
    """

    tokens: int
    answers: float
    batch: float
    counted: bool = True

    @classmethod
    def of(cls, rows: Dataset, data: DataSettings) -> Text:
        """The text of token rows."""
        batches = Batches(rows, data.batch_tokens, 0, packed=data.packed)
        tokens = int(batches.lengths.sum())
        return cls(tokens, sum(int(row["mask"].sum()) for row in rows) / tokens, tokens / batches.per_epoch)

    @classmethod
    def unknown(cls, data: DataSettings) -> Text:
        """A million tokens, all of them the assistant's."""
        rows, length = padded(data)
        return cls(1_000_000, 1.0, rows * length, counted=False)


@dataclass(frozen=True)
class Stage:
    """One stage of the way from prompts to a head.

    Attributes:
        name: What it is called.
        used: Whether the recipe goes this way.
        held: Bytes on the device of a process from beginning to end, by what takes them.
        passing: Bytes beside these that come and go one after the other; the most counts.
        disk: Bytes written.
        seconds: FLOPs over the speed of the devices: it takes no less.
        read: Bytes read from a store.
    """

    name: str
    used: bool
    held: dict[str, int]
    passing: dict[str, int]
    disk: int
    seconds: float
    read: float = 0

    @property
    def memory(self) -> int:
        """Bytes on the device of a process at the worst moment."""
        return sum(self.held.values()) + max(self.passing.values())

    def on_one(self, cards: int) -> dict[str, float]:
        """What lies on the fullest of a process's devices at the worst moment: its share of the target, and all the rest."""
        held, passing = (
            {part: size / cards if part in _SPREAD else float(size) for part, size in parts.items()}
            for parts in (self.held, self.passing)
        )
        most = max(passing, key=lambda part: passing[part])
        return {**held, most: passing[most]}


def outline(recipe: Recipe) -> tuple[Target, DraftHead]:
    """A recipe's target and head without weights, on the meta device, from their configs alone.

    Raises:
        SlipstreamError: If there is no such target, or no such head to go on from.
    """
    name, settings = recipe.target.name, recipe.head
    config = target_config(name)
    try:
        with torch.device("meta"):
            target = Target(AutoModelForCausalLM.from_config(config, dtype=DTYPES[recipe.target.dtype]), name=name)
    except ValueError as error:
        raise SlipstreamError(f"target {name!r} is no causal language model: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        if settings.init is None:
            target = target.reading(layers_read(settings.kind, target))
            vocabulary = torch.arange(min(settings.draft_vocab_size, target.vocab_size))
            return target, new_head(target, vocabulary, settings, seed=0)
        folder = locate(settings.init)
        check_head(folder)
        head = DraftHead(DraftConfig.from_pretrained(folder))
        head.borrow(target)
        if settings.lora_rank is not None:
            add_lora(head, settings.lora_rank)
    return target.reading(head.layer_ids), head


def stages(recipe: Recipe, target: Target, head: DraftHead, text: Text, machine: Machine) -> list[Stage]:
    """Every stage; training both with the target beside the head and from a store.

    Args:
        recipe: All settings.
        target: From `outline`.
        head: From `outline`.
        text: What is learned from.
        machine: What it runs on.
    """
    stored = recipe.data.features is not None
    whole = {"target": size_of(target.model.parameters())}
    ends = {"target's ends": size_of(p for module in target.ends for p in module.parameters())}
    forward, states = forward_flops(target, recipe.data.max_length), forward_bytes(target, recipe.data)
    seen, captured = _seen(recipe, text, machine)
    learning = seen * step_flops(recipe, target, head, text.answers)
    trained = train_bytes(head, recipe.train, machine.processes, machine.zero)
    micro_batch = batch_bytes(recipe, target, head, machine.kind)
    disk, speed = written_bytes(head, recipe.train), machine.flops * machine.processes
    kept = {}
    if recipe.distill.keep_features and recipe.data.batches is not None:
        kept = {"kept features": round(min(recipe.data.batches * text.batch, text.tokens)) * captured_bytes(target)}
    needed = ends if recipe.train.measure_every is None else whole
    online, running = whole, states
    if recipe.target.shard:
        share, gathered = sharded_bytes(target, machine.processes)
        online, running = {"target": share}, {name: size + gathered for name, size in states.items()}
    return [
        Stage(
            "regenerate",
            used=not text.counted,
            held=whole,
            passing=cache_bytes(target, recipe.data),
            disk=text.tokens * _TEXT,
            seconds=text.tokens * forward / machine.flops,
        ),
        Stage(
            "capture",
            used=stored and not text.counted,
            held=whole,
            passing=forward_bytes(target, replace(recipe.data, packed=False)),
            disk=text.tokens * bytes_per_token(target, "bfloat16"),
            seconds=text.tokens * forward / speed,
        ),
        Stage(
            "train online",
            used=not stored,
            held={**online, **trained, **kept},
            passing={**running, **micro_batch},
            disk=disk,
            seconds=(captured * forward + learning) / speed,
        ),
        Stage(
            "train from a store",
            used=stored,
            held={**needed, **trained},
            passing=micro_batch,
            disk=disk,
            seconds=learning / speed,
            read=seen * bytes_per_token(target, "bfloat16"),
        ),
    ]


def shortages(recipe: Recipe, plan: Sequence[Stage], machine: Machine) -> list[str]:
    """What of the stages that are used does not fit, and what would make it smaller."""
    advice = {
        "kept features": "data.batches",
        "head": "train.shard, or head.hidden_size",
        "gradients": "train.shard, or head.hidden_size",
        "optimizer": "train.shard, or ZeRO",
        "average": "train.ema",
    }
    told = []
    for stage in (stage for stage in plan if stage.used):
        parts = stage.on_one(machine.cards)
        needed = sum(parts.values())
        if needed <= machine.memory:
            continue
        part, size = max(parts.items(), key=lambda item: item[1])
        see = advice.get(part, f"data.batch_tokens ({recipe.data.batch_tokens})")
        if part == "target":
            see = _smaller_target(recipe, stage)
        if stage.name == "regenerate":
            see = "regenerate --batch_size, or --server"
        where = f" on one of {machine.cards} cards" if machine.cards > 1 else ""
        told.append(
            f"{stage.name} needs {needed / 1e9:,.1f} GB of memory{where}, there are {machine.memory / 1e9:,.1f} GB; most is "
            f"{part} ({size / 1e9:,.1f} GB): see {see}"
        )
    disk = sum(stage.disk for stage in plan if stage.used)
    if disk > machine.disk:
        told.append(f"{disk / 1e9:,.1f} GB of disk are needed, {machine.disk / 1e9:,.1f} GB are free")
    return told


def _smaller_target(recipe: Recipe, stage: Stage) -> str:
    """What leaves less of the target on a device in a stage."""
    if stage.name == "train from a store":
        return "train.measure_every, which decodes with the target"
    if recipe.target.device_map is not None:
        spread = "more cards (--card GB TFLOP/s COUNT plans for them)"
    elif stage.name == "capture":
        return "target.device_map auto"
    else:
        spread = "more processes" if recipe.target.shard else "target.device_map auto, target.shard"
    return spread if stage.name == "capture" else f"{spread}, or a store (data.features)"


def forward_flops(target: Target, length: int) -> float:
    """FLOPs of the target's layers for one token of a text of `length`; of experts those that a token is sent to."""
    config, shape = target.config, DraftConfig.for_target(target, 1)
    tables = {id(p) for p in target.embeddings.parameters()}
    used = 0.0
    for parameter in target.inner.parameters():
        if parameter.ndim == 3:  # experts, one behind the other
            used += parameter.numel() * getattr(config, "num_experts_per_tok", len(parameter)) / len(parameter)
        elif parameter.ndim == 2 and id(parameter) not in tables:
            used += parameter.numel()
    return 2 * used + 2 * length * shape.num_attention_heads * shape.head_dim * config.num_hidden_layers


def step_flops(recipe: Recipe, target: Target, head: DraftHead, answers: float) -> float:
    """FLOPs of learning from one token: the teacher's logits, and the unrolled head there and back."""
    config, distill = head.config, recipe.distill
    steps = distill.single + (1 - distill.single) * distill.steps
    inner = sum(p.numel() for name, p in head.named_parameters() if p.ndim == 2 and "lm_head" not in name)
    attention = recipe.data.max_length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    output = answers * config.hidden_size * config.draft_vocab_size
    once = 0 if config.kind == "eagle1" else head.fc.weight.numel()  # it fuses before the first step only
    teacher = answers * target.vocab_size * target.config.hidden_size
    return 2 * teacher + 6 * (once + steps * (inner - once + attention + output))


def _seen(recipe: Recipe, text: Text, machine: Machine) -> tuple[float, float]:
    """Tokens learned from in the whole training, and tokens that the target is run over."""
    settings, micro = recipe.train, recipe.train.accumulation * machine.processes
    epoch = min(text.tokens, (recipe.data.batches or text.tokens) * text.batch)
    steps = settings.max_steps or max(1, round(settings.epochs * epoch / text.batch / micro))
    seen = steps * micro * text.batch
    return seen, min(seen, epoch) if recipe.distill.keep_features else seen
