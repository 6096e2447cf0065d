"""Draft trees: which tokens are proposed, and who descends from whom. Node 0 is the last token already decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.transfer import to_device

Paths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TreeShape:
    """How large a tree to draft.

    Attributes:
        depth: Draft tokens on the longest path.
        top_k: Children per expanded node, and nodes expanded per level; 1 is a chain (EAGLE-2, arXiv 2406.16858).
        nodes: Nodes the target verifies at once, the root included.
        paths: A fixed tree instead: each node by the ranks of the drafts that lead to it, `((0,), (1,), (0, 0))`.
        copied: Further nodes beside these: one path of tokens that followed where the text last ended as it does now
            (prompt look-up), from where it leaves the tree. Suffix decoding's hybrid (arXiv 2411.04975).
        sampled: At T > 0 draw the drafts of a fixed tree from the draft's own distribution, without replacement, not
            the likeliest ones.
    """

    depth: int = 4
    top_k: int = 4
    nodes: int = 16
    paths: Paths = ()
    sampled: bool = False
    copied: int = 0

    def __post_init__(self) -> None:
        paths = tuple(sorted({tuple(path) for path in self.paths}, key=lambda path: (len(path), path)))
        object.__setattr__(self, "paths", paths)  # JSON has lists
        if paths:
            for path in paths:
                for needed in (path[:-1], (*path[:-1], path[-1] - 1)):
                    if needed and needed[-1] >= 0 and needed not in paths:
                        raise SlipstreamError(f"tree path {path} needs {needed}, which is not in the tree")
            object.__setattr__(self, "depth", len(paths[-1]))
            object.__setattr__(self, "top_k", 1 + max(path[-1] for path in paths))
            object.__setattr__(self, "nodes", 1 + len(paths))
        else:
            object.__setattr__(self, "paths", ())  # JSON knows lists only
        if self.sampled and not self.paths:
            raise SlipstreamError("a sampled tree is a fixed one: give its paths, or use TreeShape.chain or .fixed")
        if self.sampled and self.copied:
            raise SlipstreamError(
                "a sampled tree has no copied nodes: they were not drawn from the draft's distribution"
            )
        for name, low in (("depth", 1), ("top_k", 1), ("nodes", 2), ("copied", 0)):
            if getattr(self, name) < low:
                raise SlipstreamError(f"tree {name} must be at least {low}, not {getattr(self, name)}")

    @property
    def size(self) -> int:
        """All nodes, copied ones included."""
        return self.nodes + self.copied

    @classmethod
    def chain(cls, depth: int, *, sampled: bool = False) -> TreeShape:
        """`depth` drafts, one after another."""
        return cls.fixed((1,) * depth, sampled=sampled) if sampled else cls(depth, 1, depth + 1)

    @classmethod
    def fixed(cls, widths: tuple[int, ...], *, sampled: bool = False) -> TreeShape:
        """Every node of level i has `widths[i]` children."""
        levels = (product(*map(range, widths[: i + 1])) for i in range(len(widths)))
        return cls(paths=tuple(path for level in levels for path in level), sampled=sampled)

    def within(self, room: int) -> TreeShape:
        """This shape, shrunk so that no path needs more than `room` >= 1 tokens."""
        copied = max(0, min(self.copied, room - self.depth))
        if room >= self.depth:
            return self if copied == self.copied else replace(self, copied=copied)
        if self.paths:
            return TreeShape(paths=tuple(path for path in self.paths if len(path) <= room), sampled=self.sampled)
        return TreeShape(room, self.top_k, self.nodes)


class Level(NamedTuple):
    """One level of a fixed tree, its M nodes by index.

    Attributes:
        parents: Their parents among the nodes of the level before that have children, [M].
        ranks: Their ranks among their siblings, [M].
        above: Their parents in the tree, [M].
        inner: Those of the M that have children.
    """

    parents: Tensor
    ranks: Tensor
    above: Tensor
    inner: Tensor


@lru_cache
def fixed_levels(paths: Paths, device: torch.device) -> list[Level]:
    """The levels of a fixed tree, in the order of its nodes, their indices on `device`."""
    levels: list[Level] = []
    place = {path: node for node, path in enumerate([(), *paths])}
    inner: list[tuple[int, ...]] = [()]
    for depth in range(1, len(paths[-1]) + 1):
        nodes = [path for path in paths if len(path) == depth]
        parents = [inner.index(path[:-1]) for path in nodes]
        above = [place[path[:-1]] for path in nodes]
        inner = [path for path in nodes if any(other[:-1] == path for other in paths)]
        indices = (parents, [path[-1] for path in nodes], above, [nodes.index(path) for path in inner])
        levels.append(Level(*(to_device(index, device, torch.long) for index in indices)))
    return levels


@dataclass(frozen=True)
class Tree:
    """Draft trees of N nodes, one per row of the batch, parents before children.

    Attributes:
        tokens: Target token ids, [B, N].
        parents: Index of each node's parent, [B, N]; the root's is 0.
        depths: Distance from the root, [B, N].
        ancestors: Bool [B, N, N]; row i marks i itself and its ancestors.
        scores: Cumulative draft log-probability, [B, N]; 0 at the root.
        levels: Longest path, in drafts.
        drawn: The distribution each node's children were drawn from without replacement, over the target's vocabulary,
            [B, N, V]; None where they are simply the likeliest.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor
    levels: int
    drawn: Tensor | None = None

    @property
    def nodes(self) -> int:
        """N, the root included."""
        return self.tokens.shape[1]

    def padded(self, nodes: int) -> Tree:
        """The same with further children of the root, up to N = `nodes`; they repeat its token."""
        extra = nodes - self.nodes
        if extra <= 0 or self.drawn is not None:
            return self

        def more(x: Tensor, value: Tensor | float) -> Tensor:
            return torch.cat([x, x.new_zeros(len(x), extra) + value], 1)

        return make_tree(
            more(self.tokens, self.tokens[:, :1]),
            more(self.parents, 0),
            more(self.scores, -torch.inf),
            max(1, self.levels),
        )

    def children(self) -> Tensor:
        """Nodes by parent and rank among siblings, [B, N, W]; -1 where there is none."""
        same = (self.parents[:, :, None] == self.parents[:, None, :]).tril(-1)
        same[:, :, 0] = False  # the root is nobody's sibling
        ranks = same.sum(-1)  # [B, N]
        width = int(ranks.max()) + 1
        out = torch.full((*self.tokens.shape, width), -1, device=self.tokens.device)
        rows = torch.arange(len(self.tokens), device=self.tokens.device)[:, None]
        nodes = torch.arange(self.nodes, device=self.tokens.device)
        out[rows, self.parents[:, 1:], ranks[:, 1:]] = nodes[1:]
        return out


def make_tree(tokens: Tensor, parents: Tensor, scores: Tensor, levels: int, drawn: Tensor | None = None) -> Tree:
    """Complete trees of at most `levels` levels below the root from tokens, parents and scores, each [B, N]."""
    batch, nodes = tokens.shape
    ancestors = torch.eye(nodes, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
    for _ in range(levels):
        ancestors = ancestors | ancestors.gather(1, parents[:, :, None].expand(-1, -1, nodes))
    return Tree(tokens, parents, ancestors.sum(-1) - 1, ancestors, scores, levels, drawn)


def graft(tree: Tree, paths: Tensor, extra: int) -> Tree:
    """The same trees with `extra` more nodes each: a path [B, C >= levels + extra] below the root, from where it leaves.

    Worked example: below the root stand `a` and, under it, `b`; the path `a c d e` adds `c` under `a`, and `d` under `c`,
    for `extra` = 2.
    """
    at = torch.zeros_like(tree.tokens[:, 0])  # where the path stands
    steps, on = at.clone(), torch.ones_like(at, dtype=torch.bool)
    for level in range(tree.levels):
        here = (tree.parents == at[:, None]) & (tree.tokens == paths[:, level, None])
        here[:, 0] = False  # the root is its own parent
        on = on & here.any(1)
        at, steps = torch.where(on, here.int().argmax(1), at), steps + on
    new = torch.arange(extra, device=at.device)
    tokens = paths.gather(1, steps[:, None] + new)
    below = (tree.nodes + new[:-1]).expand(len(at), -1)
    return make_tree(
        torch.cat([tree.tokens, tokens], 1),
        torch.cat([tree.parents, at[:, None], below], 1),
        torch.cat([tree.scores, tree.scores.new_full(tokens.shape, -torch.inf)], 1),
        tree.levels + extra,
    )


def root_only(roots: Tensor) -> Tree:
    """Trees without a draft, from the last decided tokens [B]."""
    zero = torch.zeros_like(roots)[:, None]
    return Tree(roots[:, None], zero, zero, torch.ones_like(zero[:, :, None], dtype=torch.bool), zero.float(), 0)


class TreeBuilder:
    """Collects scored candidates level by level, then keeps the best: ancestors of a kept node are always kept."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []  # index among all candidates, -1 for the root
        self._scores: list[Tensor] = []
        self._count = 0

    def add(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Tensor:
        """Add a level's candidates, each [B, C], and return their indices, [B, C]."""
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._scores.append(scores)
        start, self._count = self._count, self._count + tokens.shape[1]
        return torch.arange(start, self._count, device=tokens.device).expand_as(tokens)

    def build(self, roots: Tensor, nodes: int) -> Tree:
        """The trees of the `nodes - 1` best candidates under `roots` [B]."""
        tokens, parents, scores = (torch.cat(x, 1) for x in (self._tokens, self._parents, self._scores))
        level = torch.cat([torch.full_like(t[0], i) for i, t in enumerate(self._tokens)])
        keep = min(nodes - 1, tokens.shape[1])
        # A child that is certain ties with its parent; the level decides, so that the parent stays.
        # Among equals the earlier stays, so that a smaller tree is part of a larger one.
        ranked = (scores.double() - 1e-9 * level).sort(dim=1, descending=True, stable=True).indices
        kept = ranked[:, :keep].sort().values
        place = torch.zeros(len(tokens), tokens.shape[1] + 1, dtype=torch.long, device=tokens.device)
        order = torch.arange(1, keep + 1, device=tokens.device).expand(len(tokens), -1)
        place.scatter_(1, kept, order)
        above = parents.gather(1, kept)
        above = torch.where(above < 0, tokens.shape[1], above)  # the last place stays 0: the root
        return make_tree(
            torch.cat([roots[:, None], tokens.gather(1, kept)], 1),
            torch.cat([place[:, -1:], place.gather(1, above)], 1),
            torch.cat([scores.new_zeros(len(scores), 1), scores.gather(1, kept)], 1),
            len(self._tokens),
        )
