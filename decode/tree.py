"""Draft trees: which tokens are proposed, and who descends from whom. Node 0 is the last token already decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError


@dataclass(frozen=True)
class TreeShape:
    """How large a tree to draft (EAGLE-2, arXiv 2406.16858).

    Attributes:
        depth: Draft tokens on the longest path.
        top_k: Children per expanded node, and nodes expanded per level; 1 is a chain.
        nodes: Nodes the target verifies at once, the root included.
    """

    depth: int = 4
    top_k: int = 4
    nodes: int = 16

    def __post_init__(self) -> None:
        for name, low in (("depth", 1), ("top_k", 1), ("nodes", 2)):
            if getattr(self, name) < low:
                raise SlipstreamError(f"tree {name} must be at least {low}, not {getattr(self, name)}")

    def within(self, room: int) -> TreeShape:
        """This shape, shrunk so that no path needs more than `room` >= 1 tokens."""
        return TreeShape(min(self.depth, room), self.top_k, self.nodes)


@dataclass(frozen=True)
class Tree:
    """A draft tree of N nodes, parents before children.

    Attributes:
        tokens: Target token ids, [N].
        parents: Index of each node's parent, [N]; the root's is 0.
        depths: Distance from the root, [N].
        ancestors: Bool [N, N]; row i marks i itself and its ancestors.
        scores: Cumulative draft log-probability, [N]; 0 at the root.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self) -> list[dict[int, int]]:
        """Each node's children: token to node."""
        out: list[dict[int, int]] = [{} for _ in range(len(self))]
        for node, (parent, token) in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True)):
            if node:
                out[parent][token] = node
        return out


def make_tree(tokens: Tensor, parents: Tensor, scores: Tensor, levels: int) -> Tree:
    """Complete a tree of at most `levels` levels below the root from tokens, parents and scores, each [N]."""
    ancestors = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(levels):
        ancestors = ancestors | ancestors[parents]
    return Tree(tokens, parents, ancestors.sum(1) - 1, ancestors, scores)


def root_only(token: Tensor) -> Tree:
    """The tree of no drafts: `token` is a scalar tensor."""
    return make_tree(token[None], torch.zeros_like(token)[None], torch.zeros(1, device=token.device), 0)


class TreeBuilder:
    """Collects scored candidates level by level, then keeps the best: ancestors of a kept node are always kept."""

    def __init__(self, shape: TreeShape) -> None:
        self.shape = shape
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []  # index among all candidates, -1 for the root
        self._scores: list[Tensor] = []
        self._count = 0

    def add(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Tensor:
        """Add a level's candidates, each [C], and return their indices."""
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._scores.append(scores)
        start, self._count = self._count, self._count + len(tokens)
        return torch.arange(start, self._count, device=tokens.device)

    def build(self, root: Tensor) -> Tree:
        """The tree of the `nodes - 1` best candidates under `root` (a scalar tensor)."""
        tokens, parents, scores = torch.cat(self._tokens), torch.cat(self._parents), torch.cat(self._scores)
        level = torch.cat([torch.full_like(t, i) for i, t in enumerate(self._tokens)])
        keep = min(self.shape.nodes - 1, len(tokens))
        # A child that is certain ties with its parent; the level decides, so that the parent stays.
        kept = (scores.double() - 1e-9 * level).topk(keep).indices.sort().values
        place = torch.zeros(len(tokens) + 1, dtype=torch.long, device=tokens.device)
        place[kept] = torch.arange(1, keep + 1, device=tokens.device)  # the last place stays 0: parent -1 is the root
        return make_tree(
            torch.cat([root[None], tokens[kept]]),
            torch.cat([place[-1:], place[parents[kept]]]),
            torch.cat([scores.new_zeros(1), scores[kept]]),
            len(self._tokens),
        )
