"""What a round costs on this device, by the size of its tree: measured on real rounds, interpolated between sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from slipstream.configs.progress import progress
from slipstream.decode.cache import fixed_capacity
from slipstream.decode.engine import Decoder
from slipstream.decode.recorder import Observer
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape
from slipstream.distill.compilation import SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slipstream.decode.tree import Tree
    from slipstream.decode.verify import Verdict, Verifier

PROBES = tuple(
    shape
    for top_k, nodes in ((1, 6), (2, 12), (3, 16), (4, 20), (6, 32))
    for shape in (TreeShape(1, top_k, 1 + top_k), TreeShape(5, top_k, nodes))
)
"""Trees that are timed: of every width the lowest and the deepest, which settles what a level costs; all sizes differ."""

_TOKENS = 24
_WARM = 8  # tokens decoded before anything is timed


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round.

    Attributes:
        prompt: Of a prompt's own forward.
        drafting: By top_k: of the first level, and of each further one.
        nodes: Sizes of trees that were timed, ascending.
        target: Of the target's forward at these sizes.
        rest: Of all else, verified exactly.
        relaxing: Of what a relaxed rule takes beyond that.
    """

    prompt: float
    drafting: dict[int, tuple[float, float]]
    nodes: list[int]
    target: list[float]
    rest: list[float]
    relaxing: float

    def round(self, shape: TreeShape, rule: Verifier) -> float:
        """Seconds of a round with a tree of this shape; its top_k must be one that was timed."""
        first, further = self.drafting[shape.top_k]
        verifying = np.interp(shape.nodes, self.nodes, np.add(self.target, self.rest))
        return first + (shape.depth - 1) * further + float(verifying) + (0.0 if rule.lossless else self.relaxing)

    def speed(self, shape: TreeShape, rule: Verifier, tau: float, length: float) -> float:
        """Tokens per second of answers of so many tokens, of which the prompt's own forward gives the first."""
        return length / (self.prompt + (length - 1) / max(1.0, tau) * self.round(shape, rule))


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


class CostProbe:
    """Times the rounds of the probes, exact and relaxed, behind prompts, each [1, n]."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Tensor]) -> None:
        self._decoder = decoder
        sizes = {fixed_capacity(ids.shape[1] + _TOKENS + SIZES[-1]): ids for ids in prompts}
        self._one_each = list(sizes.values())  # of each size of cache
        self._prompts = itertools.cycle(prompts)
        self._forget()

    def __len__(self) -> int:
        """Probes."""
        return len(self._clocks)

    def _forget(self) -> None:
        self._clocks = {(shape, rule): _Clock(shape.depth) for rule in ("exact", "mars") for shape in PROBES}
        self._turns = itertools.cycle(self._clocks.items())

    def measure(self) -> Costs:
        """Time all probes, one after the other; then forget what was timed.

        Where sizes of trees and caches have graphs of their own, all are recorded before.
        """
        how = self._decoder.target.compiled
        if how is not None and how.static:
            for prompt, (shape, rule) in itertools.product(self._one_each, self._clocks):
                self._run(shape, rule, _TOKENS, prompt=prompt)
        else:
            self._run(PROBES[-1], "mars", _WARM)
        with progress("costs of a round", len(self), "trees") as advance:
            for _ in range(len(self)):
                self.take(1)
                advance()
        costs = self.costs()
        self._forget()
        return costs

    def take(self, count: int) -> None:
        """Time the next few probes, which take turns."""
        for (shape, rule), clock in itertools.islice(self._turns, count):
            self._run(shape, rule, _TOKENS, clock)

    def _run(
        self, shape: TreeShape, rule: str, tokens: int, clock: _Clock | None = None, prompt: Tensor | None = None
    ) -> None:
        policy = replace(self._decoder.policy, tree=shape, speculation=Speculation())
        variant = Decoder(self._decoder.target, self._decoder.drafter, policy)
        ids = next(self._prompts) if prompt is None else prompt
        variant.generate(ids, max_new_tokens=tokens, verify=rule, eos_token_id=None, observer=clock)

    def costs(self) -> Costs:
        """Of what was timed since the last measuring; every probe must have had its turn.

        Medians, which a stall of the machine does not move; then all of them are raised by how much longer all rounds
        together took than their medians say, for stalls there will be.
        """
        timed = {key: np.array(clock.seconds) for key, clock in self._clocks.items()}
        typical = {key: np.median(seconds, axis=0) for key, seconds in timed.items()}
        slack = sum(timed[key].sum() for key in timed) / sum(len(timed[key]) * typical[key].sum() for key in timed)
        both = {
            shape: slack * np.median(np.concatenate([timed[shape, "exact"], timed[shape, "mars"]]), axis=0)
            for shape in PROBES
        }
        drafting = {}
        for low, deep in zip(PROBES[::2], PROBES[1::2], strict=True):
            further = max(0.0, both[deep][0] - both[low][0]) / (deep.depth - low.depth)
            drafting[low.top_k] = (float(both[low][0]), float(further))
        sizes = sorted(PROBES, key=lambda shape: shape.nodes)
        return Costs(
            prompt=float(np.mean([seconds for clock in self._clocks.values() for seconds in clock.prompts])),
            drafting=drafting,
            nodes=[shape.nodes for shape in sizes],
            target=[float(both[shape][1]) for shape in sizes],
            rest=[float(slack * typical[shape, "exact"][2]) for shape in sizes],
            relaxing=float(slack * np.median([typical[s, "mars"][2] - typical[s, "exact"][2] for s in PROBES])),
        )
