"""Measured acceptance during training: real tree decoding of held-out prompts, not a simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import answer
from slipstream.decode.tasks import read_prompts, tuning_prompts
from slipstream.distill.adapters import rebuild

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.configs.recipe import TrainSettings
    from slipstream.distill.draft import DraftConfig
    from slipstream.distill.target import Target


class Measure:
    """Decodes prompts exactly with a head's weights; calls give the acceptance length, pooled over all rounds."""

    def __init__(self, target: Target, config: DraftConfig, settings: TrainSettings) -> None:
        self.target = target
        self.tokens = settings.measure_tokens
        self.prompts = read_prompts(settings.measure_prompts) if settings.measure_prompts else tuning_prompts()
        self.config = config

    def __call__(self, weights: dict[str, Tensor]) -> float:
        head = rebuild(self.config, weights).to(self.target.device, self.target.dtype).eval()
        decoder = Decoder(self.target, HeadDrafter(head, self.target))
        records = [answer(decoder, "exact", row, max_new_tokens=self.tokens) for row in self.prompts]
        lengths = [n for record in records for n in record.accept_lengths]
        return round(sum(lengths) / max(1, len(lengths)), 4)
