"""Who proposes: the head, a small causal LM, the text so far, or nobody."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.cache import FixedCaches, TreeCache, causal
from slipstream.decode.draws import uniforms
from slipstream.decode.speculation import LONGEST
from slipstream.decode.transfer import to_device
from slipstream.decode.tree import Tree, TreeBuilder, TreeShape, fixed_levels, graft, make_tree, root_only
from slipstream.distill.attention import attend_masked
from slipstream.distill.compilation import SIZES, STATIC
from slipstream.distill.packing import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slipstream.distill.draft import Attend, DraftHead
    from slipstream.distill.target import Target


_ENDINGS = range(3, 1, -1)  # tokens an ending must have for a copy to be grafted: a single one says little


@dataclass(frozen=True)
class Round:
    """What a drafter may know when it proposes.

    Attributes:
        ids: All tokens decided so far, [B, S], padded on the right; the last one of each row has not been through the
            target yet.
        text: The same on the host, [B, S].
        lengths: How many of them are real, per row.
        features: Target features of the tokens the target has seen since the last call, [B, m, A*Ht]: those of row b at
            positions lengths[b]-1-fresh[b] .. lengths[b]-2 come first.
        fresh: How many of the m are real, per row.
        shape: Size of the trees.
        temperature: Of the draws, where the shape asks for drawn drafts; 0 takes the likeliest.
        generators: For those draws: one per row, or one for all.
        enough: Asked after each level, with the log-probabilities of the drafts at the nodes just expanded, [B, Q, Vd];
            whether to stop there.
        filler: A token to fill up copies with that no relaxed rule lets pass: one that ends the text.
        static: Whether drafts are made by forwards of static shapes, compiled, where the drafter has them; in one row only,
            and in all rounds of a request or in none.
    """

    ids: Tensor
    text: np.ndarray
    lengths: list[int]
    features: Tensor
    fresh: list[int]
    shape: TreeShape
    temperature: float = 0.0
    generators: Sequence[torch.Generator] = ()
    enough: Callable[[Tensor], bool] | None = None
    filler: int = 0
    static: bool = False

    @cached_property
    def ends(self) -> Tensor:
        """The lengths on the device, [B]."""
        return to_device(self.lengths, self.ids.device)

    @property
    def roots(self) -> Tensor:
        """The last decided token of each row, [B]."""
        return self.ids.gather(1, self.ends[:, None] - 1)[:, 0]


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees of continuations in every round."""

    def begin(self, batch: int) -> None:
        """Forget the requests before; the next round has `batch` rows."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""

    def propose(self, round: Round) -> Tree:
        """One tree per row, all with the same number of nodes."""
        ...


class NoDrafter:
    """Proposes nothing: decoding in this engine, one token a round."""

    def begin(self, batch: int) -> None:
        """Nothing to forget."""

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""

    def propose(self, round: Round) -> Tree:
        """The bare roots."""
        return root_only(round.roots)


@dataclass
class NGramDrafter:
    """Prompt look-up: continues as the text did after the latest earlier place that ends like it does now.

    Attributes:
        longest: Tokens of the longest ending looked for; shorter ones are tried where it does not occur.
    """

    longest: int = 3

    def begin(self, batch: int) -> None:
        """Nothing to forget: the text is the state."""

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to forget."""

    def propose(self, round: Round) -> Tree:
        """A chain per row, as deep as the policy's tree; the bare root where nothing is found in any row."""
        copies = _look_up(round, round.shape.depth, range(self.longest, 0, -1))
        if copies is None:
            return root_only(round.roots)
        width = copies.shape[1]
        tokens = torch.cat([round.roots[:, None], copies], 1)
        parents = (torch.arange(width + 1, device=tokens.device) - 1).clamp(min=0).expand_as(tokens)
        return make_tree(tokens, parents, torch.zeros_like(tokens, dtype=torch.float), width)


def _look_up(round: Round, width: int, endings: range) -> Tensor | None:
    """What followed the latest earlier place where each row ended as it does now, at most `width` tokens, [B, C].

    Endings of the given sizes are tried in turn. Shorter rows are filled up: a wrong draft costs nothing but its place.
    None where no row has such a place. The host knows the text, so no card is waited for.
    """
    found = []
    for ids in (ids[:n] for ids, n in zip(round.text, round.lengths, strict=True)):
        tokens = ids[:0]
        for size in (size for size in endings if size < len(ids)):
            places = np.flatnonzero((sliding_window_view(ids[:-1], size) == ids[-size:]).all(-1))
            if len(places):
                tokens = ids[places[-1] + size :][:width]
                break
        found.append(tokens)
    width = max(map(len, found))
    if not width:
        return None
    filled = [np.pad(tokens, (0, width - len(tokens)), constant_values=round.filler) for tokens in found]
    return to_device(np.stack(filled), round.ids.device)


class _TreeDrafter:
    """Grows trees from a model that gives logits for the next token, level by level, on a cache of its own.

    The cache keeps what came from decided tokens (for the head: from true target features); drafts are dropped.
    """

    vocabulary: Tensor  # draft index to target id
    vocab_size: int  # of the target
    layers: int

    def begin(self, batch: int) -> None:
        """Forget the requests before."""
        self.cache = TreeCache(self.layers, batch, self.vocabulary.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self.cache.keep(rows)

    def _extend(self, round: Round) -> tuple[Tensor, Tensor]:
        """Take in the newly decided tokens: logits [B, Vd] for the one after the root, and the state behind it [B, H]."""
        raise NotImplementedError

    def _step(self, tokens: Tensor, state: Tensor, depth: int, round: Round, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, Vd] and states [B, Q, H] after draft `tokens` [B, Q] of depth `depth`.

        `seen` [B, Q, T] says which drafts so far each of them descends from, itself included; they come last.
        """
        raise NotImplementedError

    def propose(self, round: Round) -> Tree:
        """Draft trees of the shape asked for."""
        logits, state = self._extend(round)
        tree = (self._fixed if round.shape.paths else self._dynamic)(round, logits, state)
        self.cache.rollback()
        if extra := round.shape.copied:
            copies = _look_up(round, tree.levels + extra, _ENDINGS)
            if copies is None and round.temperature:  # how many a row draws must not depend on the rows beside it
                copies = torch.full_like(round.ids[:, :1], round.filler)
            if copies is not None:
                short = tree.levels + extra - copies.shape[1]
                tree = graft(tree, pad(copies, (0, short), value=round.filler), extra)
        return tree

    def _dynamic(self, round: Round, logits: Tensor, state: Tensor) -> Tree:
        """EAGLE-2 (arXiv 2406.16858): expand the best `top_k` of each level, keep the best nodes of all levels."""
        batch, k = len(logits), min(round.shape.top_k, len(self.vocabulary))
        builder = TreeBuilder()
        logp = _log_softmax(logits)
        scores, choice = logp.topk(k)
        tokens = self.vocabulary[choice]
        frontier = builder.add(tokens, torch.full_like(tokens, -1), scores)
        state = state[:, None].expand(-1, k, -1)
        own = torch.eye(k, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        seen = own[:, :, :0]  # drafted rows each frontier node descends from
        for depth in range(1, round.shape.depth):
            if round.enough is not None and round.enough(logp if depth > 1 else logp[:, None]):
                break
            seen = torch.cat([seen, own], dim=2)
            logits, state = self._step(tokens, state, depth, round, seen)
            logp = _log_softmax(logits)  # [B, k, Vd]
            best, choice = logp.topk(k)
            candidates, choice = (scores[:, :, None] + best).flatten(1), self.vocabulary[choice].flatten(1)
            ids = builder.add(choice, frontier.repeat_interleave(k, 1), candidates)
            scores, kept = candidates.topk(k)
            tokens, frontier = choice.gather(1, kept), ids.gather(1, kept)
            state, seen = (_pick(x, kept // k) for x in (state, seen))
        return builder.build(round.roots, round.shape.nodes)

    def _fixed(self, round: Round, logits: Tensor, state: Tensor) -> Tree:
        """Always the same tree: its nodes' ranks among their siblings are given; by likelihood, or in order of draw."""
        if round.shape.top_k > len(self.vocabulary):
            raise SlipstreamError(
                f"the tree has {round.shape.top_k} children of one node, the draft knows {len(self.vocabulary)} tokens"
            )
        batch, width = len(logits), round.shape.top_k
        draw = round.shape.sampled and round.temperature > 0
        tokens, scores = [round.roots[:, None]], [logits.new_zeros(batch, 1, dtype=torch.float)]
        parents = [round.ends.new_zeros(1)]
        drawn = logits.new_zeros(batch, round.shape.nodes, self.vocab_size, dtype=torch.float) if draw else None
        inner, above = parents[0], scores[0]  # nodes to expand, and their scores
        logits, seen = logits[:, None], torch.zeros(batch, 1, 0, dtype=torch.bool, device=logits.device)
        state = state[:, None]
        for depth, level in enumerate(fixed_levels(round.shape.paths, logits.device), 1):
            if drawn is not None:
                logits = logits / round.temperature
                drawn[:, inner] = drawn[:, inner].index_copy(2, self.vocabulary, torch.softmax(logits.float(), -1))
            logp = _log_softmax(logits)
            ranked = logp + _gumbel(logp, round.generators) if draw else logp
            choice = ranked.topk(width).indices
            new = self.vocabulary[choice[:, level.parents, level.ranks]]
            value = above[:, level.parents] + logp.gather(2, choice)[:, level.parents, level.ranks]
            first = sum(x.shape[1] for x in tokens)
            parents.append(level.above)
            tokens.append(new)
            scores.append(value)
            if not len(level.inner) or (round.enough is not None and not draw and round.enough(logp)):
                break
            come = level.parents[level.inner]
            own = torch.eye(len(come), dtype=torch.bool, device=new.device).expand(batch, -1, -1)
            seen = torch.cat([seen[:, come], own], dim=2)
            inner, above = first + level.inner, value[:, level.inner]
            logits, state = self._step(new[:, level.inner], state[:, come], depth, round, seen)
        above_all = torch.cat(parents).expand(batch, -1)
        return make_tree(torch.cat(tokens, 1), above_all, torch.cat(scores, 1), len(tokens) - 1, drawn)


class HeadDrafter(_TreeDrafter):
    """A draft head on the target's features."""

    def __init__(self, head: DraftHead, target: Target) -> None:
        head.borrow(target)
        self.head = head
        self.layers = head.config.num_hidden_layers
        self.packing = pack(head)
        self.embeddings = target.embeddings
        self.vocabulary = head.vocabulary()
        self.vocab_size = target.vocab_size
        self._caches = FixedCaches(self.layers, self.vocabulary.device)
        self.begin(1)

    @cached_property
    def _compiled(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return STATIC.apply(self._run, self.vocabulary.device)

    def _attend(self, visible: Tensor | None) -> Attend:
        """Attention over the cache; `visible` is bool [B, Q, K], None for causal rows with no cache before them."""

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            keys, values = self.cache.layers[layer].update(key, value)
            if visible is not None:
                return attend_masked(query, keys, values, visible)
            grouped = query.shape[1] != keys.shape[1]
            return scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=grouped)

        return attend

    def _run(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, R, Vd] and recurrent features [B, R, H].

        With `rows` [B, R], those wanted, `hidden` [B, Q, A*Ht] is what the target says of the `tokens` [B, Q], and masks
        follow where there are more `positions` than tokens. Without, it is the head's own, [B, Q, H], and all are wanted.
        """
        embedding = self.head.embed(self.embeddings(tokens))
        if rows is not None:
            hidden = self.head.fuse(hidden.to(self.head.fc.weight.dtype))
        if later := positions.shape[1] - tokens.shape[1]:
            mask_embedding, mask_hidden = self.head.masks(len(tokens), later)
            embedding, hidden = torch.cat([embedding, mask_embedding], 1), torch.cat([hidden, mask_hidden], 1)
        out = self.head(embedding, hidden, positions, self._attend(visible))
        out = out if rows is None else _pick(out, rows)
        return self.head.logits(out), out

    def _forward(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`_run`, compiled where shapes are static and few."""
        if self.cache.compiled is None:
            with self.packing.used():
                return self._run(tokens, hidden, positions, visible, rows)
        run = self._compiled if positions.shape[1] <= SIZES[-1] else self._run
        # Copied: graphs are bound to strides, and the state of the step before lies where this one may write.
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        out = run(tokens, hidden, positions, visible, rows)
        self.cache.advance(positions.shape[1])
        return out

    def _extend(self, round: Round) -> tuple[Tensor, Tensor]:
        """Run the head over the rows whose true features are new; a `parallel` one drafts all levels in this pass.

        Worked example: 5 tokens decided, 4 of them through the target, all new: rows 0..3 pair feature p with token
        p+1, and row 3 predicts token 5. If 3 drafts are wanted of a `parallel` head, masks follow at positions 4 and 5,
        and rows 3, 4, 5 predict tokens 5, 6, 7.
        """
        shape, features, device = round.shape, round.features, round.ids.device
        later = shape.depth - 1 if self.head.config.kind == "parallel" else 0
        if round.static and not any(self.cache.lengths):
            widest = SIZES[-1] + max(shape.nodes, shape.top_k * max(shape.depth, LONGEST))
            self.cache = self._caches.take(round.ids.shape[1] + widest)
        if self.cache.compiled:
            wanted = STATIC.size(features.shape[1], shape.depth + shape.copied + 1)
            features = pad(features, (0, 0, 0, wanted - features.shape[1]))
        batch, count = features.shape[:2]
        fresh, new = to_device(round.fresh, device)[:, None], torch.arange(count + later, device=device)
        positions = round.ends[:, None] - 1 + torch.where(new < count, new - fresh, new - count)
        tokens = round.ids.gather(1, (positions[:, :count] + 1).clamp(max=round.ids.shape[1] - 1))
        visible = None
        if later or any(self.cache.lengths):
            seen = (new[:, None] >= new).expand(batch, -1, -1)
            real = (new < fresh) | (new >= count)  # rows of features differ in number
            visible = self.cache.visible(seen & (real[:, None] | (new[:, None] < count)))
        rows = torch.cat([fresh - 1, new[count:].expand(batch, -1)], 1)
        logits, state = self._forward(tokens, features, positions, visible, rows)
        self.cache.commit_first(round.fresh)
        self.cache.compiled = STATIC if round.static else None
        self._ahead = logits  # [B, 1 + later, Vd]
        return logits[:, 0], state[:, 0]

    def _step(self, tokens: Tensor, state: Tensor, depth: int, round: Round, seen: Tensor) -> tuple[Tensor, Tensor]:
        if self.head.config.kind == "parallel":  # the same for every draft of a depth
            return self._ahead[:, depth, None].expand(-1, tokens.shape[1], -1), state
        positions = (round.ends - 2 + depth)[:, None].expand_as(tokens)
        return self._forward(tokens, state, positions, self.cache.visible(seen))


class ModelDrafter(_TreeDrafter):
    """A small causal LM with the target's tokenizer: classic speculative decoding with two models, in trees."""

    def __init__(self, model: Target, target: Target) -> None:
        if model.tokenizer is not None and target.tokenizer is not None:
            theirs, ours = model.tokenizer.get_vocab(), target.tokenizer.get_vocab()
            token = next((token for token in theirs if theirs[token] != ours.get(token)), None)
            if token is not None:
                raise SlipstreamError(
                    f"draft model {model.name} has another tokenizer than {target.name}: token {token!r} is "
                    f"{theirs[token]} there and {ours.get(token, 'unknown')} here"
                )
        if model.vocab_size > target.vocab_size and model.tokenizer is None:
            raise SlipstreamError(
                f"draft model {model.name} has {model.vocab_size} tokens, target {target.name} {target.vocab_size}"
            )
        self.model = model
        self.layers = model.config.num_hidden_layers
        self.vocab_size = target.vocab_size
        self.vocabulary = torch.arange(min(model.vocab_size, target.vocab_size), device=model.device)
        self.begin(1)

    def _logits(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        out = self.model.forward(tokens, position_ids=positions, visible=visible, cache=self.cache)
        return out.logits[..., : len(self.vocabulary)]

    def propose(self, round: Round) -> Tree:
        """A tree per row; the bare roots where one would reach beyond the model's own context."""
        deepest = max(round.lengths) + round.shape.depth
        return root_only(round.roots) if deepest > self.model.context else super().propose(round)

    def _extend(self, round: Round) -> tuple[Tensor, Tensor]:
        """Run the model over the tokens decided since; for one that it does not know it reads its last."""
        fresh = [n - done for n, done in zip(round.lengths, self.cache.lengths, strict=True)]
        new = torch.arange(max(fresh), device=round.ids.device)
        positions = self.cache.rows.tensor[:, None] + new
        tokens = round.ids.gather(1, positions.clamp(max=round.ids.shape[1] - 1)).clamp(max=self.model.vocab_size - 1)
        visible = None
        if any(self.cache.lengths):
            visible = self.cache.visible(causal(len(new), len(tokens), tokens.device))
        logits = self._logits(tokens, positions, visible)
        self.cache.commit_first(fresh)
        last = to_device(fresh, logits.device)[:, None] - 1
        return _pick(logits, last)[:, 0], logits.new_zeros(len(logits), 0)

    def _step(self, tokens: Tensor, state: Tensor, depth: int, round: Round, seen: Tensor) -> tuple[Tensor, Tensor]:
        positions = (round.ends - 1 + depth)[:, None].expand_as(tokens)
        return self._logits(tokens, positions, self.cache.visible(seen)), state


def last_tokens(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The last of the first `lengths[b]` tokens of each row of ids [B, S], [B]."""
    return ids.gather(1, to_device(lengths, ids.device)[:, None] - 1)[:, 0]


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, Q] of x [B, R, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


def _gumbel(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Gumbel noise; the largest of log p + noise is a draw from p, the next one a draw without it, and so on."""
    noise = uniforms(generators, like.shape, like.device).clamp(min=1e-30)
    return -torch.log(-torch.log(noise))
