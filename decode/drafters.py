"""Who proposes: the head, or nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slipstream.decode.cache import TreeLayer
from slipstream.decode.tree import Tree, TreeBuilder, TreeShape, root_only

if TYPE_CHECKING:
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.target import Target


class Drafter(Protocol):
    """Proposes a tree of continuations in every round."""

    def reset(self) -> None:
        """Forget the request before."""

    def propose(self, sequence: Tensor, features: Tensor, shape: TreeShape) -> Tree:
        """Draft behind `sequence`.

        Args:
            sequence: All tokens decided so far, [n]; the last one has not been through the target yet.
            features: Target features of the tokens it has been through since the last call, [m, A*Ht]: those at
                positions n-1-m .. n-2.
            shape: Size of the tree.
        """
        ...


class NoDrafter:
    """Proposes nothing: decoding in this engine, one token a round."""

    def reset(self) -> None:
        """Nothing to forget."""

    def propose(self, sequence: Tensor, features: Tensor, shape: TreeShape) -> Tree:
        """The bare root."""
        return root_only(sequence[-1])


class HeadDrafter:
    """EAGLE-2 dynamic trees (arXiv 2406.16858) from a draft head.

    The head's cache keeps only entries that came from true target features; what a draft wrote is dropped.
    """

    def __init__(self, head: DraftHead, target: Target) -> None:
        self.head = head
        self.embeddings = target.embeddings
        self.vocabulary = head.vocabulary()
        self.cache = TreeLayer()

    def reset(self) -> None:
        """Forget the request before."""
        self.cache = TreeLayer()

    def _step(self, tokens: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """One head forward over Q rows; `visible` is bool [Q, keys], None for causal rows with no cache before them."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.cache.update(key, value)
            return scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=visible,
                is_causal=visible is None,
                enable_gqa=query.shape[1] != keys.shape[1],
            )

        embedding = self.embeddings(tokens)[None].to(hidden.dtype)
        return self.head(embedding, hidden[None], positions[None], attend)[0]

    def _extend(self, sequence: Tensor, features: Tensor) -> Tensor:
        """Run the head over the rows whose true features are new; returns the last row's recurrent feature, [1, H].

        Worked example: 5 tokens decided, 4 of them through the target, all new: rows 0..3 pair feature p with token
        p+1, and row 3 predicts token 5.
        """
        new = len(features)
        start = len(sequence) - 1 - new
        positions = torch.arange(start, start + new, device=sequence.device)
        visible = None
        if start:
            visible = torch.arange(start + new, device=sequence.device)[None] <= positions[:, None]
        hidden = self.head.fuse(features.to(self.head.fc.weight.dtype))
        out = self._step(sequence[start + 1 :], hidden, positions, visible)
        self.cache.commit(range(new))
        return out[-1:]

    def propose(self, sequence: Tensor, features: Tensor, shape: TreeShape) -> Tree:
        """Draft a tree: expand the best `top_k` of each level, keep the best nodes of all levels."""
        k = min(shape.top_k, len(self.vocabulary))
        hidden = self._extend(sequence, features)
        builder = TreeBuilder(shape)
        scores, choice = torch.log_softmax(self.head.logits(hidden)[0].float(), -1).topk(k)
        tokens = self.vocabulary[choice]
        frontier = builder.add(tokens, torch.full_like(tokens, -1), scores)
        hidden = hidden.expand(k, -1)
        committed = torch.ones(k, self.cache.length, dtype=torch.bool, device=tokens.device)
        own = torch.eye(k, dtype=torch.bool, device=tokens.device)
        seen = own[:, :0]  # drafted rows each frontier node descends from
        for level in range(1, shape.depth):
            seen = torch.cat([seen, own], dim=1)
            positions = torch.full_like(tokens, len(sequence) - 2 + level)
            hidden = self._step(tokens, hidden, positions, torch.cat([committed, seen], dim=1))
            logp, choice = torch.log_softmax(self.head.logits(hidden).float(), -1).topk(k)  # [k, k]
            candidates = (scores[:, None] + logp).flatten()
            ids = builder.add(self.vocabulary[choice.flatten()], frontier.repeat_interleave(k), candidates)
            scores, best = candidates.topk(k)
            tokens, frontier = self.vocabulary[choice.flatten()[best]], ids[best]
            hidden, seen = hidden[best // k], seen[best // k]
        self.cache.rollback()
        return builder.build(sequence[-1])
