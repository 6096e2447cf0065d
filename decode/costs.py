"""What a round costs on this device, by the size of its tree: measured on real rounds, interpolated between sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from slipstream.configs.progress import progress
from slipstream.decode.engine import Decoder
from slipstream.decode.recorder import Observer
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slipstream.decode.tree import Tree
    from slipstream.decode.verify import Verdict

PROBES = tuple(
    shape
    for top_k, nodes in ((1, 6), (2, 12), (3, 16), (4, 20), (6, 32))
    for shape in (TreeShape(1, top_k, 1 + top_k), TreeShape(5, top_k, nodes))
)
"""Trees that are timed: of every width the lowest and the deepest, which settles what a level costs; all sizes differ."""

_PASSES = 2
_TOKENS = 24


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round.

    Attributes:
        prompt: Of a prompt's own forward.
        drafting: By top_k: of the first level, and of each further one.
        nodes: Sizes of trees that were timed, ascending.
        target: Of the target's forward at these sizes.
        rest: Of all else.
    """

    prompt: float
    drafting: dict[int, tuple[float, float]]
    nodes: list[int]
    target: list[float]
    rest: list[float]

    def round(self, shape: TreeShape) -> float:
        """Seconds of a round with a tree of this shape; its top_k must be one that was timed."""
        first, further = self.drafting[shape.top_k]
        verifying = np.interp(shape.nodes, self.nodes, np.add(self.target, self.rest))
        return first + (shape.depth - 1) * further + float(verifying)


class _Clock(Observer):
    """An observer that keeps the seconds of prompts, and of rounds whose tree has all its levels."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.prompts: list[float] = []
        self.seconds: list[tuple[float, float, float]] = []

    def round(
        self,
        places: Sequence[int],
        tree: Tree,
        logits: Tensor,
        verdict: Verdict,
        seconds: tuple[float, float, float],
    ) -> None:
        """Keep the seconds."""
        if not tree.levels:
            self.prompts.append(sum(seconds))
        elif tree.levels == self.depth:
            self.seconds.append(seconds)


def measure_costs(decoder: Decoder, prompts: Sequence[Tensor]) -> Costs:
    """Time the rounds of the probes behind prompts, each [1, n]; medians, probes and prompts taking turns."""
    turns = itertools.cycle(prompts)
    clocks = [_Clock(shape.depth) for shape in PROBES]
    with progress("costs of a round", _PASSES * len(PROBES), "trees") as advance:
        for _ in range(_PASSES):
            for shape, clock in zip(PROBES, clocks, strict=True):
                policy = replace(decoder.policy, tree=shape, speculation=Speculation())
                variant = Decoder(decoder.target, decoder.drafter, policy)
                variant.generate(next(turns), max_new_tokens=_TOKENS, verify="exact", eos_token_id=None, observer=clock)
                advance()
    times = {shape: np.median(clock.seconds, axis=0) for shape, clock in zip(PROBES, clocks, strict=True)}
    drafting = {}
    for low, deep in zip(PROBES[::2], PROBES[1::2], strict=True):
        further = max(0.0, times[deep][0] - times[low][0]) / (deep.depth - low.depth)
        drafting[low.top_k] = (float(times[low][0]), float(further))
    by_size = sorted((shape.nodes, *times[shape][1:]) for shape in PROBES)
    nodes, target, rest = (list(column) for column in zip(*by_size, strict=True))
    prompt = float(np.median([seconds for clock in clocks for seconds in clock.prompts]))
    return Costs(prompt, drafting, nodes, [float(t) for t in target], [float(t) for t in rest])
