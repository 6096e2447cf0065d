"""How far to speculate, round by round: a fixed tree, or one that follows how the drafts fare and what they cost here."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.decode.cache import TreeCache, causal, fixed_capacity
from slipstream.decode.tree import TreeShape
from slipstream.distill.compilation import SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slipstream.decode.tree import Tree
    from slipstream.distill.target import Target

SCHEDULES = {"fixed": 0.0, "heuristic": 0.0, "confidence": 0.4, "entropy": 0.3, "cost": 0.0}
"""Schedules and the threshold each has by default."""

LONGEST = 20
"""Drafts in a row, whatever a schedule wants."""

_EXPLORE = 16  # rounds between looks at the whole tree, under `cost`
_KEEP = 0.9  # weight of the past in exponential averages


@dataclass(frozen=True)
class Speculation:
    """When to stop drafting.

    Attributes:
        schedule: `fixed`, the policy's tree; `heuristic`, two levels deeper after a round in which all was accepted, one
            less otherwise (transformers); `confidence`, no level below drafts that are all less likely than the threshold,
            which is tuned online (transformers' dynamic speculation); `entropy`, none where the root of the draft's
            entropy is above it (SVIP, arXiv 2411.18462); `cost`, depth and nodes that promise most tokens per second
            by this device's measured times, down to no drafts at all.
        threshold: Of `confidence` (a probability) or `entropy`; None is the schedule's default.
    """

    schedule: str = "fixed"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise SlipstreamError(f"unknown speculation schedule {self.schedule!r}{near(self.schedule, SCHEDULES)}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", SCHEDULES[self.schedule])
        assert self.threshold is not None
        if self.threshold < 0 or (self.schedule == "confidence" and self.threshold > 1):
            raise SlipstreamError(f"the threshold of {self.schedule} is out of range: {self.threshold:g}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def controller(self, shape: TreeShape, target: Target) -> Controller:
        """What decides in one request, beginning with `shape`."""
        assert self.threshold is not None
        if self.schedule == "heuristic":
            return Heuristic(shape)
        if self.schedule == "confidence":
            return Confidence(shape, self.threshold)
        if self.schedule == "entropy":
            return Entropy(shape, self.threshold)
        if self.schedule == "cost":
            return CostAware(shape, target_costs(target, shape.nodes))
        return Controller(shape)


class Controller:
    """Always the same tree; the others derive from it."""

    def __init__(self, shape: TreeShape) -> None:
        self.base = shape

    def shape(self) -> TreeShape | None:
        """The tree to draft in the next round; None drafts nothing."""
        return self.base

    def enough(self, logp: Tensor) -> bool:
        """Whether to stop below nodes whose drafts have these log-probabilities, [B, Q, Vd]."""
        return False

    def observe(self, tree: Tree, paths: Sequence[Sequence[int]], drafting: float, verifying: float) -> None:
        """Learn from a round: its trees, the nodes accepted of each, and the seconds both parts took."""

    def _deep(self, depth: int) -> TreeShape:
        """The base with another depth; a chain grows with it, a tree keeps its nodes."""
        if self.base.paths:
            return replace(self.base.within(depth), copied=self.base.copied)
        return replace(self.base, depth=depth, nodes=depth + 1 if self.base.top_k == 1 else self.base.nodes)


class Heuristic(Controller):
    """transformers' schedule: two more after full acceptance, one less otherwise."""

    def __init__(self, shape: TreeShape) -> None:
        super().__init__(shape)
        self.depth = shape.depth

    def shape(self) -> TreeShape:
        return self._deep(self.depth)

    def observe(self, tree: Tree, paths: Sequence[Sequence[int]], drafting: float, verifying: float) -> None:
        own = min(self.shape().depth, tree.levels)  # copies may reach deeper
        full = all(len(path) > own for path in paths)
        self.depth = min(LONGEST, self.depth + 2) if full else max(1, self.depth - 1)


class Confidence(Controller):
    """Stops where the draft is unsure; the threshold follows what unsure drafts turned out to be worth."""

    _GRID = torch.linspace(0.05, 0.95, 19)
    _ENOUGH = 24  # drafts seen before the threshold moves

    def __init__(self, shape: TreeShape, threshold: float) -> None:
        super().__init__(shape)
        self.threshold = threshold
        self.seen: list[tuple[float, bool]] = []  # likeliest draft of each level: probability, and whether it passed

    def enough(self, logp: Tensor) -> bool:
        return float(logp.max().exp()) < self.threshold

    def observe(self, tree: Tree, paths: Sequence[Sequence[int]], drafting: float, verifying: float) -> None:
        levels = torch.arange(1, tree.levels + 1, device=tree.depths.device)[:, None]
        scores = torch.where(tree.depths[:, None] == levels, tree.scores[:, None], -torch.inf)  # [B, levels, N]
        likeliest = scores.argmax(-1)
        own = (tree.scores - tree.scores.gather(1, tree.parents)).exp().gather(1, likeliest)
        told = torch.stack([likeliest.double(), own.double(), scores.amax(-1).double()], -1).tolist()  # read at once
        for row, path in zip(told, paths, strict=True):
            for node, probability, score in row[: len(path)]:  # behind a refused draft nothing is learnt
                if not math.isfinite(score):  # copies have no probability to learn from
                    break
                self.seen.append((probability, int(node) in path))
        self.seen = self.seen[-512:]
        chance, passed = torch.tensor([p for p, _ in self.seen]), torch.tensor([ok for _, ok in self.seen])
        if len(self.seen) >= self._ENOUGH and passed.any() and not passed.all():
            drafted = chance[None] >= self._GRID[:, None]
            wasted = (drafted & ~passed).sum(1) / (~passed).sum()
            missed = (~drafted & passed).sum(1) / passed.sum()
            self.threshold = float(self._GRID[int((wasted + 3 * missed).argmin())])  # transformers' weights


class Entropy(Controller):
    """Stops where the draft's entropy is high (SVIP)."""

    def __init__(self, shape: TreeShape, threshold: float) -> None:
        super().__init__(shape)
        self.threshold = threshold

    def enough(self, logp: Tensor) -> bool:
        entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
        return float(entropy.clamp(min=0).sqrt().min()) > self.threshold


class CostAware(Controller):
    """Depth and nodes that promise the most tokens per second.

    A tree of depth d and n nodes should yield 1 + c sum(v) tokens: v are its nodes' draft probabilities, best n - 1 first,
    and c says how much of that the drafts of this request have kept. Both are exponential averages over rounds, and the
    times are this device's. Every few rounds the whole tree is drafted, so that a change of the text is noticed.
    """

    def __init__(self, shape: TreeShape, costs: dict[int, float]) -> None:
        super().__init__(replace(shape, copied=0))  # copies have no probability to reckon with
        self.costs = dict(costs)  # seconds of a target forward, by nodes
        self.sizes = [n for n in SIZES if 1 < n < shape.nodes] + [shape.nodes]
        self.worth: dict[tuple[int, int], float] = {}  # sum of v by depth and nodes
        self.kept: dict[int, float] = {}  # accepted drafts by depth of the tree, no deeper ones counted
        self.drafting: dict[int, float] = {}  # seconds by depth
        self.rounds = 0

    def shape(self) -> TreeShape | None:
        self.rounds += 1
        if self.base.paths or not self.worth or self.rounds % _EXPLORE == 0:
            return self.base
        depth, nodes = max(self.worth, key=lambda pair: self._speed(*pair))
        if self._speed(depth, nodes) <= 1 / self.costs[1]:
            return None
        return TreeShape(depth, self.base.top_k, nodes)

    def _speed(self, depth: int, nodes: int) -> float:
        """Tokens per second expected of a tree."""
        deepest = max(self.drafting)
        drafting = self.drafting.get(depth, self.drafting[deepest] * (depth + 1) / (deepest + 1))
        share = self.kept[depth] / max(1e-9, self.worth[depth, self._full(depth)])
        return (1 + share * self.worth[depth, nodes]) / (drafting + self.costs[nodes])

    def _full(self, depth: int) -> int:
        return max(n for d, n in self.worth if d == depth)

    def _update(self, averages: dict[Any, float], key: Any, value: float) -> None:
        averages[key] = _KEEP * averages[key] + (1 - _KEEP) * value if key in averages else value

    def observe(self, tree: Tree, paths: Sequence[Sequence[int]], drafting: float, verifying: float) -> None:
        self._update(self.costs, tree.nodes, verifying)
        if tree.nodes == 1:
            return
        self._update(self.drafting, tree.levels, drafting)
        chance, depths = tree.scores.exp(), tree.depths
        order = tree.scores[:, 1:].sort(dim=1, descending=True).indices + 1
        levels = torch.arange(1, tree.levels + 1, device=depths.device)[:, None, None]
        values = (chance * (depths <= levels)).gather(2, order.expand(len(levels), -1, -1)).cumsum(2).mean(1).tolist()
        for depth, value in enumerate(values, 1):
            for nodes in self.sizes:
                if nodes <= tree.nodes and (nodes > depth or nodes == tree.nodes):
                    self._update(self.worth, (depth, nodes), value[nodes - 2])
            accepted = [min(len(path) - 1, depth) for path in paths]
            self._update(self.kept, depth, sum(accepted) / len(accepted))


def target_costs(target: Target, nodes: int, repeats: int = 3) -> dict[int, float]:
    """Seconds a forward of the target takes here, by nodes; measured once per target, the best of a few."""
    known: dict[int, float] = target.__dict__.setdefault("_costs", {})
    wanted = [1, *(n for n in SIZES if 1 < n < nodes), nodes]
    how = target.compiled
    behind = max(1, min(64, target.context - nodes))
    capacity = fixed_capacity(behind + how.size(nodes)) if how else 0
    cache = TreeCache(target.config.num_hidden_layers, 1, target.device, capacity)
    target.forward(torch.zeros(1, behind, dtype=torch.long, device=target.device), cache=cache, logits_to_keep=1)
    cache.commit_first([behind])
    cache.compiled = how
    for count in wanted:
        if count in known:
            continue
        size = how.size(count) if how else count
        ids = torch.zeros(1, size, dtype=torch.long, device=target.device)
        times = []
        for _ in range(repeats + 1):
            visible = cache.visible(causal(size, 1, ids.device))
            positions = torch.arange(behind, behind + size, device=ids.device).clamp(max=target.context - 1)[None]
            begun = time.perf_counter()
            out = target.forward(ids, position_ids=positions, visible=visible, cache=cache)
            out.logits.flatten()[0].item()  # waits for a card
            times.append(time.perf_counter() - begun)
            cache.rollback()
        known[count] = min(times[1:])
    return {n: known[n] for n in wanted}
