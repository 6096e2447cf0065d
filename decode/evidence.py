"""What verification looks at: a few numbers per node, read off the target's logits or, later, off a trace."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from slipstream.distill.largest import Largest

if TYPE_CHECKING:
    from slipstream.decode.tree import Tree


class Evidence(Protocol):
    """What the target thinks at the N nodes of each tree; logits in nats, as float32."""

    @property
    def top(self) -> Tensor:
        """The largest logit, [B, N]."""
        ...

    @property
    def decided(self) -> Tensor:
        """The token that has it, [B, N]."""
        ...

    @property
    def own(self) -> Tensor:
        """The logit of each node's token at its parent, [B, N]; at the root it means nothing."""
        ...

    @property
    def total(self) -> Tensor:
        """The log-sum-exp of all logits, [B, N]."""
        ...

    @property
    def entropy(self) -> Tensor:
        """Of the distribution, nats, [B, N]."""
        ...

    def best(self, count: int) -> Tensor:
        """The `count` largest logits in descending order, [B, N, count]; all of them where there are fewer."""
        ...

    def margins(self, path: Tensor) -> Tensor:
        """Gap between the two largest logits at the nodes `path` [B, D], [B, D]."""
        ...

    def at(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the tokens [B] that end a round at the nodes [B], [B]."""
        ...


class LogitEvidence:
    """Evidence from logits [B, N, V]; each number is made when it is first asked for."""

    def __init__(self, tree: Tree, logits: Tensor) -> None:
        self.tree = tree
        self.logits = logits
        self._of = Largest(logits)
        self._rows = torch.arange(len(logits), device=logits.device)
        self._best: Tensor | None = None  # the largest that were asked for so far

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        values, tokens = self._of.first()
        return values.float(), tokens

    @property
    def top(self) -> Tensor:
        return self._largest[0]

    @property
    def decided(self) -> Tensor:
        return self._largest[1]

    @cached_property
    def own(self) -> Tensor:
        return self.logits[self._rows[:, None], self.tree.parents, self.tree.tokens].float()

    @cached_property
    def total(self) -> Tensor:
        return self.logits.float().logsumexp(-1)

    @cached_property
    def entropy(self) -> Tensor:
        p = torch.softmax(self.logits.float(), -1)
        return -(p * p.clamp(min=1e-9).log()).sum(-1)

    def best(self, count: int) -> Tensor:
        count = min(count, self.logits.shape[-1])
        if self._best is None or self._best.shape[-1] < count:
            self._best = self._of.values(count).float()
        return self._best[..., :count]

    def margins(self, path: Tensor) -> Tensor:
        pair = self.best(2)[self._rows[:, None], path]
        return pair[..., 0] - pair[..., 1]

    def at(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        return self.logits[self._rows, nodes, tokens].float()
