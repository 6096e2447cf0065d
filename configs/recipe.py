"""One `Recipe` says everything that can be set; YAML files and the command line fill it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal

from slipstream.configs.errors import SlipstreamError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: 0 < x < inf,
    "0 or above": lambda x: 0 <= x < inf,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "from 0 to below 1": lambda x: 0 <= x < 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "from 0 to below 2**32": lambda x: 0 <= x < 2**32,
    "a finite number": isfinite,
}


def _require(settings: Any, section: str, ranges: dict[str, tuple[str, ...]]) -> None:
    """Refuse numbers of a section, alone, in pairs or by name, that lie outside their range; None is no number."""
    for words, names in ranges.items():
        for name in names:
            value = getattr(settings, name)
            several = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            if not all(number is None or _RANGES[words](number) for number in several):
                raise SlipstreamError(f"{section}.{name} must be {words}, not {value}")


@dataclass(frozen=True)
class TargetSettings:
    """The target model.

    Attributes:
        name: A model folder, a GGUF file, a hub id, or `smollm2-135m-instruct`.
        dtype: `bfloat16`, `float16` or `float32`.
        adapter: A peft adapter to merge into the target, folder or hub id.
        device_map: `auto` spreads the target over all devices of the process (and the memory and disk behind them); None
            puts it on the one that trains.
        shard: Spread the weights of the target's layers over the processes of the launch (FSDP2), for a target that no
            single device holds.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    adapter: str | None = None
    device_map: Literal["auto"] | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        if self.shard and self.device_map is not None:
            raise SlipstreamError(
                "target.shard spreads the target over processes, target.device_map over the devices of one: set one of them"
            )


@dataclass(frozen=True)
class DataSettings:
    """What the head learns from.

    Attributes:
        conversations: A JSON, JSONL, Parquet or Arrow file, a folder of them, a data set of the hub (`owner/name`, with
            `:split` if it is not `train`), or a list of these; None is the set that ships with the package.
        stream: Read data sets of the hub over the network, without downloading them first.
        malformed: Share of the rows that may be malformed; above it nothing is read.
        think: Whether answers think before they speak, for templates with `enable_thinking`; as in `regenerate --think`.
        features: A store that `slipstream capture` wrote: training reads its conversations and the target's states of
            them there, and `conversations` is not read; None runs the target.
        max_length: Longer conversations are cut, tokens; where one is longer than the target's context then, nothing
            begins.
        batch_tokens: Tokens per micro-batch and process, padding included.
        packed: Put conversations of any length one behind the other into a micro-batch, kept apart by masks, instead of
            padding ones of similar length.
        batches: Learn from this many micro-batches only, over and over (from all of them, where there are fewer); None
            takes all the data, and puts it into other batches every epoch.
    """

    conversations: tuple[str, ...] | str | None = None
    stream: bool = False
    malformed: float = 0.05
    think: bool | None = None
    features: str | None = None
    max_length: int = 512
    batch_tokens: int = 1024
    packed: bool = False
    batches: int | None = None

    def __post_init__(self) -> None:
        _require(self, "data", {"above 0": ("max_length", "batch_tokens", "batches"), "from 0 to 1": ("malformed",)})


@dataclass(frozen=True)
class HeadSettings:
    """The draft head.

    Attributes:
        kind: `eagle3`, `eagle1` (over several unroll steps: HASS), or `parallel` (P-EAGLE).
        draft_vocab_size: Tokens the head can propose: the most frequent ones of the assistant.
        layers: Decoder layers.
        hidden_size: Width; None is the target's.
        intermediate_size: Of the MLP; None is the target's.
        norm_output: Feed the feature back after its last norm (EAGLE-3.1).
        norm_before_fc: One norm over the captured states together.
        fc_norm: One norm for each captured state (EAGLE-3.1).
        init: A head's folder to go on from; its own shape and vocabulary hold, and nothing above is read.
        lora_rank: Train low-rank updates of that head only (peft); they are merged in the end, and kept beside the head.
        from_target: Start fc at the highest captured layer, lm_head at the target's own rows and, in a head of kind `eagle3`
            without the norms above, the MLPs at those of the target's last layers, not at random.
    """

    kind: Literal["eagle3", "eagle1", "parallel"] = "eagle3"
    draft_vocab_size: int = 8192
    layers: int = 1
    hidden_size: int | None = None
    intermediate_size: int | None = None
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    init: str | None = None
    lora_rank: int | None = None
    from_target: bool = True

    def __post_init__(self) -> None:
        names = ("draft_vocab_size", "layers", "hidden_size", "intermediate_size", "lora_rank")
        _require(self, "head", {"above 0": names})
        if self.lora_rank is not None and self.init is None:
            raise SlipstreamError("head.lora_rank updates a head that exists: give its folder as head.init")


@dataclass(frozen=True)
class DistillSettings:
    """What the head is asked to match.

    Attributes:
        steps: Unroll steps K of the training-time test.
        step_decay: Weight of step k is `step_decay ** k`, over the sum of the weights.
        objectives: Weights of `forward_kl`, `total_variation`, `lk_alpha`, `lk_lambda`, `top_k`, and, for a head that is to
            be verified by a relaxed rule, `margin_mass`, `lk_margin`, `tree_hinge`.
        relaxed_signal: That rule's: `ratio`, `margin` or `odds`.
        relaxed_threshold: And its threshold.
        noise: Width of uniform noise on the target features.
        feature_weight: Of the distance between the head's output and the target's last hidden state, beside the objective.
        single: Share of the training, from its beginning, in which the head is unrolled one step only: cheaper, and all
            that matters while its first draft is mostly wrong.
        keep_features: Keep the features of `data.batches` in memory after their first pass, 2 * (A + 1) * Ht bytes a
            token in bf16, so that the target runs once per batch and not once per pass.
    """

    steps: int = 3
    step_decay: float = 0.8
    objectives: dict[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    relaxed_signal: str = "margin"
    relaxed_threshold: float = 0.5
    noise: float = 0.0
    feature_weight: float = 0.0
    single: float = 0.5
    keep_features: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "above 0": ("steps", "step_decay"),
            "0 or above": ("objectives", "noise", "feature_weight"),
            "from 0 to 1": ("single",),
            "a finite number": ("relaxed_threshold",),
        }
        _require(self, "distill", ranges)
        if not any(self.objectives.values()):
            raise SlipstreamError(f"distill.objectives needs an objective of a weight above 0, not {self.objectives}")


@dataclass(frozen=True)
class TrainSettings:
    """How it learns.

    Attributes:
        max_steps: Optimizer steps; None derives them from `epochs`.
        epochs: Passes over the data.
        optimizer: `muon` (for the matrices inside the head; AdamW, at a fifth of the rate, for the rest), or `adamw` for all.
        learning_rate: Peak of the cosine schedule.
        betas: Of AdamW.
        weight_decay: Of both.
        warmup: Share of the steps.
        clip: Gradient norm.
        accumulation: Micro-batches per optimizer step and process.
        shard: Shard weights and optimizer over the processes of the launch (FSDP2).
        ema: Decay of a running average of the weights, which then is the head; None keeps the last weights.
        measure_every: Optimizer steps between real tree decodings of held-out prompts; the best head by them is kept. None
            measures nothing.
        measure_prompts: Their file, JSONL of Spec-Bench rows; None takes the tuning prompts that ship with the package.
        measure_tokens: New tokens an answer.
        mixed_precision: `bf16` or `no`; weights stay fp32.
        gradient_checkpointing: Keep no activations of the head's MLPs, which are the larger part of what its unrolled steps
            keep, but make them again on the way back: less memory for more time.
        compile: Run the head's layers through `torch.compile`; a CPU needs a C++ compiler for it.
        seed: Of initialisation, order and noise.
        log_every: Steps between metric rows.
        checkpoint_minutes: Minutes between checkpoints, at least: one is written beside a metric row.
        trackers: accelerate trackers beside `metrics.jsonl`: `wandb`, `tensorboard`.
    """

    max_steps: int | None = None
    epochs: float = 2.0
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 8e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 0.5
    accumulation: int = 1
    shard: bool = False
    ema: float | None = None
    measure_every: int | None = None
    measure_prompts: str | None = None
    measure_tokens: int = 64
    mixed_precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    checkpoint_minutes: float = 2.0
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        above = ("learning_rate", "clip", "accumulation", "log_every", "epochs", "max_steps", "checkpoint_minutes")
        ranges = {
            "above 0": (*above, "measure_every", "measure_tokens"),
            "0 or above": ("weight_decay",),
            "from 0 to below 1": ("warmup", "betas"),
            "above 0 and below 1": ("ema",),
            "from 0 to below 2**32": ("seed",),
        }
        _require(self, "train", ranges)
        if self.shard and self.optimizer == "muon":
            raise SlipstreamError("muon needs whole matrices, which train.shard cuts up: set train.optimizer adamw")
        if self.ema is not None and self.shard:
            raise SlipstreamError("train.ema averages whole weights; it does not go with train.shard")


@dataclass(frozen=True)
class Recipe:
    """A whole training run: `slipstream train --config recipe.yaml --section.field value`."""

    target: TargetSettings = field(default_factory=TargetSettings)
    data: DataSettings = field(default_factory=DataSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if self.distill.keep_features and self.data.batches is None:
            raise SlipstreamError("distill.keep_features needs data.batches: the features of how many batches to keep")
        if self.distill.keep_features and self.data.features is not None:
            raise SlipstreamError(
                "distill.keep_features keeps what the target gave; data.features has it on disk already"
            )
        if self.target.shard:
            self._check_shard()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON-ready, by section."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def written(cls, data: Any, place: Path) -> dict[str, dict[str, Any]]:
        """What `to_dict` gave, perhaps of an older version: settings that have come since have their defaults.

        Raises:
            SlipstreamError: If what stands in `place` is something else.
        """
        if not isinstance(data, dict) or not all(isinstance(section, dict) for section in data.values()):
            raise SlipstreamError(f"{place} holds no recipe")
        return {**data, **{name: {**now, **data.get(name, {})} for name, now in cls().to_dict().items()}}

    def _check_shard(self) -> None:
        """Refuse what a target in shards cannot do: its processes run it in step, or not at all."""
        if self.data.features is not None:
            raise SlipstreamError("data.features stands in for the target's layers: leave target.shard out")
        if self.distill.keep_features:
            raise SlipstreamError(
                "distill.keep_features runs the target when a process lacks a batch, which target.shard cannot do: all "
                "processes run it at once; capture a store (data.features) instead"
            )
        if self.train.measure_every is not None:
            raise SlipstreamError(
                "train.measure_every decodes on the main process, which holds no whole target under target.shard: leave one out"
            )
