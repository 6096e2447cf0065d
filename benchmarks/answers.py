"""Answers for training, many at once: ours against transformers' `generate` on the same batches.

python benchmarks/answers.py
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse import auto_cli

from slipstream.configs.progress import progress
from slipstream.data.synthesize import topic_prompts
from slipstream.decode.evaluate import autoregressive
from slipstream.decode.sampling import sample
from slipstream.decode.tasks import encode_first
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slipstream.distill.target import Target

    Answers = list[list[int]]


def theirs(target: Target, prompts: Sequence[Sequence[int]], new: int, temperature: float) -> Answers:
    """By `generate`."""
    return autoregressive(target, prompts, max_new_tokens=new, temperature=temperature)[0]


def ours(target: Target, prompts: Sequence[Sequence[int]], new: int, temperature: float) -> Answers:
    """By `sample`."""
    heat = [temperature] * len(prompts)
    return sample(target, prompts, heat, max_new_tokens=new, stop_ids=target.stop_ids(), seed=1)


def _speed(answer: Callable[..., Answers], *given: Any) -> float:
    begun = time.perf_counter()
    answers = answer(*given)
    return sum(map(len, answers)) / (time.perf_counter() - begun)


def main(
    target: str = "smollm2-135m-instruct",
    batch: int = 160,
    groups: int = 3,
    max_new_tokens: int = 320,
    temperature: float = 1.0,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> None:
    """Print tokens per second of both, and their ratio in every group; groups are answered by both in turn.

    Args:
        target: The target model.
        batch: Prompts answered at once.
        groups: How many times.
        max_new_tokens: Per answer.
        temperature: Of all answers; 0 is greedy.
        dtype: Of the target.
        device: `cpu` or `cuda`.
    """
    model = load_target(target, dtype=dtype, device=device)
    rows = topic_prompts(batch * groups, seed=1)
    prompts = sorted((encode_first(model, row) for row in rows), key=len)
    speeds = []
    for answer in (theirs, ours):
        answer(model, prompts[:2], 4, temperature)
    with progress("batches", groups, "batches") as advance:
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            speeds.append([_speed(way, model, group, max_new_tokens, temperature) for way in (theirs, ours)])
            advance(1)
    means = np.mean(speeds, 0)
    ratios = [b / a for a, b in speeds]
    print(
        f"generate {means[0]:.0f} tokens/s, ours {means[1]:.0f} tokens/s: {np.mean(ratios):.2f}x "
        f"(batches {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
